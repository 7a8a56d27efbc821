"""Maps of parts of the channels, paddings with a bias, and maps over another number of axes."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from repvgg.algebra import (
    Axis,
    ConvMap,
    compose,
    constant,
    over_axes,
    pad_with_bias,
    replace_channels,
)
from repvgg.errors import BorderError, NotLinearError

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(cin, cout, k=3, groups=1, bias=True, spatial=2, **geometry):
    weight = numbers(cout, cin // groups, *(k,) * spatial, seed=cout)
    return ConvMap.of(weight, numbers(cout, seed=7) if bias else None, groups=groups, border="zeros", **geometry)


X = numbers(2, 6, 7, 8, seed=9)


@pytest.mark.parametrize("channels", [slice(0, 2), slice(1, 4), slice(4, None), slice(None)])
def test_replaced_channels(channels):
    whole = conv(6, 6, padding=(1,) * 4)
    expected = whole(X)
    part = conv(6, len(range(6)[channels]), 1)
    expected[:, channels] = part(X)
    assert_close(replace_channels(whole, channels, part)(X), expected, **EXACT)
    zero = constant(part, numbers(part.out_channels))
    expected[:, channels] = numbers(part.out_channels).view(-1, 1, 1)
    assert_close(replace_channels(whole, channels, zero)(X), expected, **EXACT)
    for wrong in (slice(0, 5, 2), slice(0, 1)):
        with pytest.raises(NotLinearError, match="do not fit"):
            replace_channels(whole, wrong, conv(6, 3, 1))


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("axes", [(0, 2), (2, 0), (1, 3), (0, 1)])
def test_a_linear_layer_is_a_pointwise_convolution(groups, axes):
    before, after = axes
    point = conv(6, 6, 1, groups=groups, spatial=before)
    again = over_axes(point, after)
    assert (again.spatial, again.groups) == (after, groups)
    # One pixel, as a batch of vectors, is an input for any number of axes.
    first, second = (f(numbers(5, 6, *(1,) * f.spatial)).flatten(1) for f in (point, again))
    assert_close(first, second, **EXACT)
    assert over_axes(ConvMap.identity(4), 0).kernel.unit


def test_a_convolution_of_pixels_has_its_axes():
    with pytest.raises(NotLinearError, match="not pointwise"):
        over_axes(conv(6, 6), 0)


def test_padding_with_the_bias():
    point = conv(6, 4, 1)
    sides = (Axis(before=1, after=2), Axis(before=0, after=1))
    y = point(X)
    expected = point.bias.view(1, -1, 1, 1).expand(2, 4, 10, 9).clone()
    expected[:, :, 1:8, :8] = y
    padded = pad_with_bias(point, sides)
    assert_close(padded(X), expected, **EXACT)
    last = conv(4, 3)
    assert_close(compose(padded, last)(X), F.conv2d(expected, last.weight, last.bias), **EXACT)
    with pytest.raises(BorderError, match="still see the image"):
        pad_with_bias(conv(6, 4, 3), sides)
    with pytest.raises(BorderError, match="reflect"):
        pad_with_bias(ConvMap.of(numbers(4, 6, 1, 1), padding=(1,) * 4, border="reflect"), sides)
