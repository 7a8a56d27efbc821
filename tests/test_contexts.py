import torch
from torch.testing import assert_close

from repvgg._contexts import derived_seed, seeded


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
