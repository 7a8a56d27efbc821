import gc
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import _contexts
from repvgg._contexts import derived_seed, eval_mode, gc_paused, meta_device, seeded


def draw(*keys):
    with seeded(*keys):
        return torch.rand(4)


def test_equal_keys_draw_equal_numbers():
    assert_close(draw("step", 1, 2), draw("step", 1, 2), rtol=0, atol=0)
    others = [draw("step", 1, 3), draw("step", 2, 2), draw("fit", 1, 2), draw("step", 12)]
    assert all((draw("step", 1, 2) - other).abs().max() > 1e-3 for other in others)


def test_the_state_outside_is_restored():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    draw(7)
    assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_seed_is_the_same_on_every_machine():
    assert derived_seed("shuffle", 0, 1) == 6569738021446964816
    assert 0 <= derived_seed(-5) < 2**63


def test_contexts_of_eval_mode_that_overlap_restore_at_the_last_end():
    """As those of two threads do, which need not end in the order in which they began."""
    model, other = nn.Sequential(nn.Dropout(), nn.Identity()), nn.Dropout()
    model[1].eval()
    first, second = ExitStack(), ExitStack()
    first.enter_context(eval_mode(model, None))
    second.enter_context(eval_mode(model, other))
    first.close()
    assert [part.training for part in model.modules()] == [False] * 3
    with eval_mode(model[0]):
        second.close()
        assert [part.training for part in model.modules()] == [True, False, False]
    assert [part.training for part in (*model.modules(), other)] == [True, True, False, True]
    with eval_mode(model):
        assert not model[0].training
    assert model[0].training


@pytest.fixture
def collector(monkeypatch):
    """Calls that would freeze or count the objects of this process, in order; nothing is frozen when it starts."""
    calls, frozen = [], [0]

    def freeze():
        calls.append("freeze")
        frozen[0] = 1000

    def unfreeze():
        calls.append("unfreeze")
        frozen[0] = 0

    def count():
        calls.append("count")
        return frozen[0]

    for name, function in (("freeze", freeze), ("unfreeze", unfreeze), ("get_freeze_count", count)):
        monkeypatch.setattr(gc, name, function)
    monkeypatch.setattr(_contexts, "_others_froze", False)
    return calls


def test_pauses_inside_of_one_another_freeze_once(collector):
    assert gc.isenabled()
    with gc_paused():
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        assert collector == ["count", "freeze"]
    assert gc.isenabled()
    assert collector == ["count", "freeze", "unfreeze"]
    with pytest.raises(KeyError), gc_paused():
        raise KeyError
    assert gc.isenabled()
    assert collector[3:] == ["count", "freeze", "unfreeze"]


def test_what_others_froze_stays_frozen_and_is_counted_once(collector):
    gc.freeze()
    for _ in range(3):
        with gc_paused():
            assert not gc.isenabled()
    assert collector == ["freeze", "count"]


WITHOUT_COMPILER = """
import sys
from torch import nn
from repvgg._contexts import meta_device
from repvgg.models import create_model
with meta_device():
    model = create_model("repvgg_a0")
    weight = nn.init.kaiming_normal_(nn.Conv2d(3, 8, 3).weight)
    nn.init.normal_(weight)
assert weight.shape == (8, 3, 3, 3)
assert weight.is_meta and all(p.is_meta for p in model.parameters())
assert "torch._dynamo" not in sys.modules
"""


def test_models_on_meta_do_not_import_the_compiler():
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=True)


def test_normal_values_on_other_devices_are_drawn():
    weight = torch.full((64,), 7.0)
    with meta_device():
        assert nn.init.normal_(weight) is weight
    assert weight.mean().abs() < 1
    assert 0.5 < weight.std() < 2


def test_overlapping_pauses_end_with_the_last():
    first, second = gc_paused(), gc_paused()  # as of two threads
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
