"""Permutations, reshapes and means around maps of the channels: the same map, over axes in another place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg import trace
from repvgg.algebra import over_axes
from repvgg.errors import NotLinearError
from repvgg.symbolic import (
    IMAGES,
    SEQUENCES,
    VECTORS,
    VOLUMES,
    Arrangement,
    Layout,
    Source,
    SymbolicTensor,
    channels_of,
)
from tests.bn_statistics import trained_like

EXACT = {"rtol": 1e-12, "atol": 1e-12}
ROWS_OF_3, ROWS_OF_4 = Layout(3, rows=True), Layout(4, rows=True)


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(module):
    return trained_like(module).double()


class Parts(nn.Module):
    """Layers of each kind; ``forward`` combines them."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.linear, self.last = nn.Linear(4, 4), nn.Linear(4, 5)
        self.conv1d, self.wide = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(numbers(4))
        self.combine = forward

    def forward(self, x):
        return self.combine(self, x)


def rows_and_back(m, x):
    return m.bn2(m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous())


def moved(m, x):
    y = m.linear(torch.movedim(m.conv(x), 1, -1)) * m.scale
    return m.point(y.movedim((-1,), (1,)) - x)


def two_transposes(m, x):
    y = m.linear(x.transpose(1, 2).transpose(2, 3))
    return m.point(y.swapaxes(-1, -2).transpose(1, 2))


def tokens(m, x):
    n, c, h, w = x.shape
    y = m.linear(m.conv(x).flatten(2).transpose(1, 2))
    y = m.bn1((y + m.scale).transpose(-2, -1)).view(n, c, h, w)
    return m.point(y) + x


def tokens_by_product(m, x):
    n, c, h, w = x.size()
    y = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
    y = m.bn1(m.linear(y).reshape(-1, c)).reshape(n, h, w, c)
    return y.permute(0, 3, 1, 2)


def unflattened(m, x):
    y = m.conv1d(x.flatten(2))
    return y.unflatten(2, x.shape[2:]) + x.reshape(x.size(0), x.size(1), -1).view_as(x)


def concatenated_rows(m, x):
    y = x.permute(0, 2, 3, 1)
    return torch.cat([m.linear(y[..., :4]), y], -1).split((4, 4), -1)[0].permute(0, 3, 1, 2)


def squeezed(m, x):
    return m.point(x.unsqueeze(1).squeeze(1)) + x.unsqueeze(-1).flatten(-2)


@pytest.mark.parametrize(
    "forward",
    [
        *(rows_and_back, moved, two_transposes, tokens, tokens_by_product, unflattened, concatenated_rows, squeezed),
    ],
)
def test_images(forward):
    module, x = trained(Parts(forward)), numbers(2, 4, 5, 6)
    conv = trace(module, 4, IMAGES)
    assert conv.spatial == 2
    assert_close(conv(x), module(x), **EXACT)


@pytest.mark.parametrize("forward", [rows_and_back, moved])
@pytest.mark.parametrize("layout", [None, IMAGES])
def test_the_input_is_found_behind_a_permutation(forward, layout):
    assert channels_of(trained(Parts(forward)), layout=layout) == (4, IMAGES)


@pytest.mark.parametrize(
    ("forward", "layout", "shape"),
    [
        (lambda m, x: m.bn1(m.linear(x).transpose(1, 2)).mT, ROWS_OF_3, (2, 5, 4)),
        (lambda m, x: m.bn1(m.linear(x).transpose(1, 2)).transpose(1, 2), ROWS_OF_3, (2, 5, 4)),
        (lambda m, x: m.bn1(m.linear(x).flatten(0, 1)).reshape(x.shape), ROWS_OF_3, (2, 5, 4)),
        (lambda m, x: m.bn1(m.linear(x).flatten(0, 2)).view(*x.shape), ROWS_OF_4, (2, 3, 5, 4)),
        (lambda m, x: m.bn2(m.linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1), ROWS_OF_4, (2, 3, 5, 4)),
        (lambda m, x: m.conv1d(m.linear(x).transpose(1, 2)).transpose(1, 2), ROWS_OF_3, (2, 5, 4)),
        (lambda m, x: m.linear(m.wide(x).mT.contiguous()).mT, SEQUENCES, (2, 4, 9)),
        (lambda m, x: m.bn2(m.linear(x).view(-1, 4, 1, 1)).flatten(1), VECTORS, (3, 4)),
        (lambda m, x: m.linear(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x), VOLUMES, (2, 4, 3, 2, 5)),
    ],
)
def test_other_layouts(forward, layout, shape):
    module, x = trained(Parts(forward)), numbers(*shape)
    assert_close(trace(module, 4, layout)(x), module(x), **EXACT)


@pytest.mark.parametrize(
    ("forward", "layout", "reason"),
    [
        (lambda m, x: m.conv(x).permute(0, 1, 3, 2), IMAGES, "permutation of the pixels"),
        (lambda m, x: m.conv(x.permute(1, 0, 2, 3)), IMAGES, "channels are axis 0 of 4"),
        (lambda m, x: m.conv(x).permute(0, 2, 1, 3), IMAGES, "axes of its output"),
        (lambda m, x: m.bn2(m.conv(x).permute(0, 2, 1, 3)), IMAGES, "channels are axis 2 of 4"),
        (lambda m, x: m.wide(x.flatten(2)), IMAGES, "axes were rearranged"),
        (lambda m, x: F.pad(x.flatten(2), (1, 1)), IMAGES, "axes were rearranged"),
        (lambda m, x: x.flatten(2)[:, :, 1:], IMAGES, "axes were rearranged"),
        (lambda m, x: m.conv(x.permute(0, 2, 3, 1)), IMAGES, "takes another axis for the channels"),
        (lambda m, x: m.linear(x), IMAGES, "takes another axis for the channels"),
        (lambda m, x: x.flatten(1), IMAGES, "merges channels with pixels"),
        (lambda m, x: x.view(x.size(0), -1), IMAGES, "does not keep the channels"),
        (lambda m, x: x.view(x.size(0), 2, -1), IMAGES, "does not keep the channels"),
        (lambda m, x: x.view(2, 4, 5, 6), IMAGES, "does not keep the channels"),
        (lambda m, x: x.view(x.size(0), 4, x.size(3), x.size(2)), IMAGES, "does not keep the channels"),
        (lambda m, x: x.flatten(2) + x, IMAGES, "different layouts"),
        (lambda m, x: x.reshape(x.size(0) * 4, 1, x.size(2), -1), IMAGES, "size of the image"),
        (lambda m, x: x.squeeze(), IMAGES, "name them"),
        (lambda m, x: x.squeeze(-1), IMAGES, "depends on its size"),
        (lambda m, x: x.view(torch.int64), IMAGES, "another dtype"),
        (lambda m, x: x + x.mean((2, 3), keepdim=True), IMAGES, "different layouts"),
        (lambda m, x: x.mean(), IMAGES, "over all axes"),
        (lambda m, x: F.adaptive_avg_pool2d(x, 2), IMAGES, "more than one pixel"),
        (lambda m, x: F.adaptive_avg_pool1d(x, 1), IMAGES, "takes another axis"),
        (lambda m, x: m.conv(x.mean((2, 3), keepdim=True)), IMAGES, "axes were rearranged"),
        (lambda m, x: x.transpose(1, 4), IMAGES, "no axis 4"),
        (lambda m, x: m.linear(x).transpose(1, 2), Layout(None, rows=True), "not known"),
        (lambda m, x: x if x.shape[2] == x.shape[3] else m.conv(x), IMAGES, "size of the image"),
    ],
)
def test_refusals(forward, layout, reason):
    with pytest.raises(NotLinearError, match=reason):
        trace(trained(Parts(forward)), 4, layout)


def test_reshapes_to_numbers_are_followed_if_the_shape_is_known():
    """As in a recorded forward, whose sizes are numbers."""
    source = Source()
    source.shape = (2, 4, 6, 5)
    x = SymbolicTensor.of(source, 4)
    assert x.reshape(2, 4, 30).layout == SEQUENCES
    assert x.reshape(2, 4, 30).reshape(2, 4, 6, 5).has_axes_of_source
    assert x.permute(0, 2, 3, 1).reshape(60, 4).layout == VECTORS
    assert x.permute(0, 2, 3, 1).reshape(-1, 4).view(2, 30, 4).layout == ROWS_OF_3
    strided = F.conv2d(x, torch.ones(3, 4, 3, 3), stride=2, padding=1)
    assert strided.flatten(2).reshape(2, 3, 3, 3).layout == IMAGES
    split = x.flatten(2).reshape(2, 4, 5, 6)
    assert split.layout == IMAGES
    assert not split.has_axes_of_source
    again = x.flatten(2).reshape(2, 4, 5, 6)
    assert (split + again).map.out_channels == 4
    with pytest.raises(NotLinearError, match="different layouts"):
        split + x
    for wrong in ((2, 4, 29), (4, 2, 6, 5), (2, 4, 6, 4), (8, 30), (4, 60)):
        with pytest.raises(NotLinearError, match="does not keep the channels"):
            x.reshape(*wrong)


# What a network ends with: a mean over the pixels, which commutes with maps of the channels.
HEADS = {
    "mean": lambda m, x: m.last(m.bn2(x).mean((2, 3))),
    "mean, negative axes": lambda m, x: m.last(m.bn2(x).mean([-1, -2], keepdim=True).flatten(1)),
    "one axis after the other": lambda m, x: m.last(m.bn2(x).mean(3).mean(-1)),
    "mean of tokens": lambda m, x: m.last(m.bn2(x).flatten(2).mean(-1)),
    "mean of rows": lambda m, x: m.last(m.bn2(x).flatten(2).transpose(1, 2).mean(dim=1)),
    "pool": lambda m, x: m.last(F.adaptive_avg_pool2d(m.bn2(x), 1).flatten(1)),
    "pool, view": lambda m, x: m.last(F.adaptive_avg_pool2d(m.bn2(x), (1, 1)).view(x.size(0), -1)),
    "pool, squeeze": lambda m, x: m.last(m.bn2(F.adaptive_avg_pool2d(x, 1)).squeeze(-1).squeeze(2)),
    "pool, conv": lambda m, x: m.last(m.point(F.adaptive_avg_pool2d(x, 1)).squeeze((2, 3))),
    "conv": lambda m, x: m.last(m.bn1(m.conv(x).mean((2, 3)))),
    "rows": lambda m, x: m.last(m.linear(x.permute(0, 2, 3, 1)).mean((1, 2))),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    """The symbol is the mean of a map: that of the map over the images equals the head."""
    module, x = trained(Parts(HEADS[name])), numbers(2, 4, 5, 6)
    result = module(SymbolicTensor.of(Source(), 4))
    assert result.arrangement.averaged == {1, 2}
    assert result.layout == VECTORS
    assert not result.is_convolution
    assert_close(result.map(x).mean((2, 3)), module(x), **EXACT)
    if name != "conv":  # of a pointwise map, it is the map of the mean, too
        assert_close(over_axes(result.map, 0)(x.mean((2, 3))), module(x), **EXACT)
    with pytest.raises(NotLinearError, match="axes of its output"):
        trace(module, 4, IMAGES)


def test_what_follows_a_mean_costs_next_to_nothing_per_pixel():
    source = Source()
    x = SymbolicTensor.of(source, 4)
    F.linear(F.conv2d(x, torch.ones(8, 4, 1, 1)).mean((2, 3)), torch.ones(5, 8))
    assert (source.multiply_adds, source.weights) == (32, 72)
    source = Source()
    source.sizes = (5, 8)
    F.linear(SymbolicTensor.of(source, 4).mean((2, 3)), torch.ones(10, 4))
    assert (source.multiply_adds, source.weights) == (1.0, 40)


def test_layouts_of_arrangements():
    images = Arrangement.of(IMAGES)
    assert images.layout == IMAGES
    assert images.permuted((0, 2, 3, 1)).layout == ROWS_OF_4
    assert images.flattened(2, 3).layout == SEQUENCES
    assert images.mean((2, 3), keepdim=True).layout == IMAGES
    assert images.mean((2, 3), keepdim=False).layout == VECTORS
    assert Arrangement.of(VECTORS).layout == VECTORS
    with pytest.raises(NotLinearError, match="no layer expects them"):
        _ = images.permuted((0, 2, 1, 3)).layout
