from contextlib import ExitStack

import torch
from torch import nn
from torch.testing import assert_close

from repvgg._contexts import derived_seed, eval_mode, seeded


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
