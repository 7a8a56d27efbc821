import pytest
import torch

from repvgg.errors import UsageError
from repvgg.verify import border_inputs


def test_first_size_is_as_given_and_the_others_are_odd():
    assert [tuple(x.shape) for x in border_inputs((2, 3, 32, 32), batches=3)] == [
        (2, 3, 32, 32),
        (2, 3, 33, 35),
        (2, 3, 35, 37),
    ]
    assert [tuple(x.shape) for x in border_inputs((1, 1, 7, 7))] == [(1, 1, 7, 7), (1, 1, 9, 11)]
    assert len(border_inputs((1, 3, 8, 8), batches=1)) == 1


def test_mean_is_1_and_border_is_multiplied_by_4():
    (x,) = border_inputs((8, 3, 32, 32), batches=1)
    inside = x[..., 1:-1, 1:-1]
    edges = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], dim=-1)
    assert float(inside.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(edges.mean()) == pytest.approx(4.0, abs=0.4)
    assert float(edges.std()) == pytest.approx(4.0, abs=0.4)


def test_images_depend_on_the_seed_and_global_state_is_unchanged():
    state = torch.get_rng_state()
    first, again = border_inputs((1, 3, 8, 8), seed=3), border_inputs((1, 3, 8, 8), seed=3)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first[0], border_inputs((1, 3, 8, 8), seed=4)[0])
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_other_dtypes_round_the_same_images():
    exact = border_inputs((1, 2, 5, 5), batches=1, dtype=torch.float64)[0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = border_inputs((1, 2, 5, 5), batches=1, dtype=dtype)[0]
        torch.testing.assert_close(x, exact.to(dtype), rtol=0, atol=0)


def test_default_device_is_ignored():
    with torch.device("meta"):
        assert border_inputs((1, 1, 3, 3), batches=1)[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 32, 32), {}),
        ((0, 3, 32, 32), {}),
        ((1, 3, 32, 32), {"batches": 0}),
        ((1, 3, 32, 32), {"dtype": torch.int8}),
    ],
)
def test_invalid_arguments_are_rejected(shape, options):
    with pytest.raises(UsageError):
        border_inputs(shape, **options)
