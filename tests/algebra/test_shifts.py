"""A shift is an identity with a bias: composing with it must keep the bias."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from repvgg import trace
from repvgg.algebra import ConvMap, compose, shift
from tests.collapse.models import conv, image, module


@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_composing_with_a_shift_on_either_side(spatial):
    generator = torch.Generator().manual_seed(spatial)
    weight = torch.randn(5, 4, *(2,) * spatial, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    offset = {n: torch.randn(n, generator=generator, dtype=torch.float64) for n in (4, 5)}
    linear = ConvMap.of(weight, bias)
    before = compose(shift(ConvMap.identity(4, torch.float64, None, spatial), offset[4]), linear)
    assert_close(before.bias, bias + weight.flatten(2).sum(2) @ offset[4] if spatial else bias + weight @ offset[4])
    after = compose(linear, shift(ConvMap.identity(5, torch.float64, None, spatial), offset[5]))
    assert_close(after.bias, bias + offset[5])
    assert_close(after.weight, weight)


def test_a_shift_in_front_of_a_convolution_without_padding():
    model = module(lambda self, x: self.conv(x * 2 + 0.3), conv=conv(padding=0)).double().eval()
    found, x = trace(model, 4), image()
    assert_close(F.conv2d(x, found.weight, found.bias), model(x), rtol=1e-12, atol=1e-12)
