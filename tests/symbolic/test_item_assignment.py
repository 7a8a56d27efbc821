"""Item assignment: a border that is filled with what a layer gives for zeros, and channels that are replaced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg import trace
from repvgg.errors import BorderError, NotLinearError, ReparamError
from repvgg.symbolic import IMAGES, Source, SymbolicTensor
from tests.bn_statistics import trained_like

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(module):
    return trained_like(module).double()


def four_sides(y, v, p):
    y[:, :, 0:p, :] = v
    y[:, :, -p:, :] = v
    y[:, :, :, 0:p] = v
    y[:, :, :, -p:] = v


def ellipsis_and_chain(y, v, p):
    y[..., :p, :], y[..., -p:, :], y[..., :p], y[..., -p:] = v, v, v, v


def row_by_row(y, v, p):
    for i in range(p):
        y[:, :, i] = y[:, :, -1 - i] = v.flatten(2)
        y[..., i] = y[..., -1 - i] = v.flatten(2)


def without_corners_twice(y, v, p):
    y[:, :, p:-p, :p] = v
    y[:, :, p:-p, -p:] = v
    y[:, :, :p] = v
    y[:, :, -p:] = v


def in_channel_slices(y, v, p):
    four_sides(y, 0, p)
    for part in (slice(0, 2), slice(2, None)):
        y[:, part, :p] = y[:, part, -p:] = v[:, part]
        y[:, part, :, :p] = y[:, part, :, -p:] = v[:, part]


ASSIGNMENTS = [four_sides, ellipsis_and_chain, row_by_row, without_corners_twice, in_channel_slices]


class NormAndPad(nn.Module):
    """A 1x1 convolution and a norm, a border with what they give for zeros, then a convolution without padding."""

    def __init__(self, assign=four_sides, pixels=1, affine=True, bias=False, last=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4, affine=affine)
        self.last = last or nn.Conv2d(4, 5, 2 * pixels + 1, bias=False)
        self.norm = nn.BatchNorm2d(4 if isinstance(last, nn.AvgPool2d) else 5)
        self.assign, self.pixels, self.off = assign, pixels, 0.0

    def border(self):
        mean = self.bn.running_mean if self.conv.bias is None else self.bn.running_mean - self.conv.bias
        factor = 1 / torch.sqrt(self.bn.running_var + self.bn.eps)
        if self.bn.affine:
            return self.bn.bias.detach() - mean * self.bn.weight.detach() * factor
        return -mean * factor

    def forward(self, x):
        y = F.pad(self.bn(self.conv(x)), [self.pixels] * 4)
        self.assign(y, self.border().view(1, -1, 1, 1) + self.off, self.pixels)
        return self.norm(self.last(y))


@pytest.mark.parametrize("assign", ASSIGNMENTS)
@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize(("affine", "bias"), [(True, False), (False, True)])
def test_border_of_a_norm(assign, pixels, affine, bias):
    module = trained(NormAndPad(assign, pixels, affine, bias))
    conv = trace(module)
    assert (conv.padding, conv.kernel_size) == ((pixels,) * 4, (2 * pixels + 1,) * 2)
    for size in ((7, 9), (1, 1), (2, 5)):
        x = numbers(2, 3, *size)
        assert_close(conv(x), module(x), **EXACT)


def test_border_before_pools_strides_groups_and_branches():
    for last in (nn.AvgPool2d(3, 2), nn.Conv2d(4, 5, 3, 2), nn.Conv2d(4, 5, (3, 1))):
        module, x = trained(NormAndPad(last=last)), numbers(2, 3, 8, 9)
        assert_close(trace(module)(x), module(x), **EXACT)

    class Dbb(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.branch = nn.Conv2d(3, 5, 3, padding=1), NormAndPad()

        def forward(self, x):
            return self.dense(x) + self.branch(x)

    module, x = trained(Dbb()), numbers(2, 3, 8, 9)
    conv = trace(module)
    assert conv.kernel_size == (3, 3)
    assert_close(conv(x), module(x), **EXACT)


@pytest.mark.parametrize("n", [1, 3])
def test_border_of_sequences_and_volumes(n):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            kind = {1: nn.Conv1d, 3: nn.Conv3d}[n]
            self.first, self.last = kind(2, 3, 1), kind(3, 2, 3)

        def forward(self, x):
            y = F.pad(self.first(x), (1, 1) * n)
            bias = self.first.bias.view(1, -1, *(1,) * n)
            for axis in range(n):
                every = (slice(None),) * (2 + axis)
                y[(*every, slice(0, 1))] = bias
                y[(*every, slice(-1, None))] = bias
            return self.last(y)

    module, x = trained(Module()), numbers(2, 2, *(5, 4, 6)[:n])
    assert_close(trace(module)(x), module(x), **EXACT)


def test_constant_padding_with_the_bias_itself():
    module = trained(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ConstantPad2d(1, 0.5), nn.Conv2d(2, 2, 3)))
    with pytest.raises(BorderError, match=r"padded with 0\.5"):
        trace(module)
    module[0].bias.data.fill_(0.5)
    x = numbers(1, 3, 5, 4)
    assert_close(trace(module)(x), module(x), **EXACT)


@pytest.mark.parametrize(
    ("assign", "error", "reason"),
    [
        (lambda y, v, p: None, BorderError, "leaks"),
        (lambda y, v, p: four_sides(y, 2 * v, p), BorderError, "differs from what the layer"),
        (lambda y, v, p: four_sides(y, v.float(), p), BorderError, "differs from what the layer"),
        (lambda y, v, p: four_sides(y[:, :2], v[:, :2], p), BorderError, "leaks"),
        (lambda y, v, p: four_sides(y, v[:, :2], p), NotLinearError, "one number per channel"),
        (lambda y, v, p: y.__setitem__((..., slice(0, 1)), v), BorderError, "differs from what the layer"),
        (lambda y, v, p: y.__setitem__((..., slice(0, 2)), v), NotLinearError, "only in the padding"),
        (lambda y, v, p: y.__setitem__((..., 3), v[..., 0]), NotLinearError, "only in the padding"),
        (lambda y, v, p: y.__setitem__((..., slice(1, -1), slice(1, -1)), v), NotLinearError, "image itself"),
        (lambda y, v, p: y.__setitem__((0, ..., slice(0, 1)), v[0]), NotLinearError, "all images"),
        (lambda y, v, p: y.__setitem__((..., slice(0, 1)), y[..., 1:2]), BorderError, "leaks"),
        (lambda y, v, p: y.__setitem__(y > 0, 0), NotLinearError, "cannot run on a symbolic input"),
    ],
)
def test_borders_that_are_refused(assign, error, reason):
    with pytest.raises(error, match=reason):
        trace(trained(NormAndPad(assign)), 3, IMAGES)


def test_other_paddings_are_refused():
    class Wide(NormAndPad):
        def forward(self, x):
            y = F.pad(F.conv2d(x, torch.ones(4, 3, 3, 3, dtype=x.dtype)), [1] * 4)
            four_sides(y, 0, 1)
            return self.last(y)

    with pytest.raises(BorderError, match="still see the image"):
        trace(trained(Wide()))


def test_without_values_the_places_decide():
    """On the meta device, a region is planned; whether the values fit is known once they are computed."""
    for module in (NormAndPad(), NormAndPad(lambda y, v, p: four_sides(y, 2 * v, p))):
        assert trace(module.eval().to("meta")).padding == (1, 1, 1, 1)
    for assign, reason in (
        (lambda y, v, p: y.__setitem__((..., slice(0, 1)), v), "does not fill it"),
        (lambda y, v, p: None, "leaks"),
    ):
        with pytest.raises(BorderError, match=reason):
            trace(NormAndPad(assign).eval().to("meta"))
    without_bias = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)).eval()
    assert trace(without_bias.to("meta")).padding == (1, 1, 1, 1)


def test_a_copy_does_not_share_its_border():
    padded = F.pad(SymbolicTensor.of(Source(), 2) + torch.ones(2, 1, 1), [1] * 4)
    copied = padded.copy()
    four_sides(copied, 1.0, 1)
    assert copied.is_convolution
    assert not padded.is_convolution


def channels_replaced(m, x):
    x = x.clone()
    x[:, :2] = m.first(x[:, :2])
    return m.last(x)


def channels_from_zeros(m, x):
    y = torch.zeros_like(x)
    y[:, 2:] = x[:, :2]
    y[:, 1:2] = 0.5
    y[:, :1] = x[:, 3:]
    return m.last(y)


def channels_in_an_alias(m, x):
    y = m.last(x)
    alias = y
    y[:, 1:3, :, :] = m.scale
    y[:] = y * 2
    return alias


@pytest.mark.parametrize("forward", [channels_replaced, channels_from_zeros, channels_in_an_alias])
def test_channels(forward):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.scale = nn.Parameter(numbers(2, 1, 1))

    Module.forward = forward
    module, x = trained(Module()), numbers(2, 4, 6, 7)
    assert_close(trace(module, 4, IMAGES)(x), module(x), **EXACT)


@pytest.mark.parametrize(
    "assign",
    [
        lambda x, y: x.__setitem__((slice(None), slice(0, 2)), y[:, :2]),  # the input
        lambda x, y: y.__setitem__((slice(None), slice(0, 2)), x),  # another number of channels
        lambda x, y: y.__setitem__((slice(None), slice(0, 4, 2)), x[:, :2]),  # every other channel
        lambda x, y: y.__setitem__((..., slice(0, 1)), x[..., :1]),  # pixels
        lambda x, y: y.__setitem__((slice(None), 1), 0.5),  # no slice
        lambda x, y: torch.zeros(1, 4, 5, 5).__setitem__((slice(None), slice(0, 2)), x[:, :2]),
    ],
)
def test_assignments_that_are_refused(assign):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            assign(x, y)
            return y

    with pytest.raises(ReparamError):
        trace(trained(Module()), 4, IMAGES)
