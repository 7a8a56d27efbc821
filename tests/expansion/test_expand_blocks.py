"""User-defined blocks: nothing is assumed about their names or structure."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.blocks import ConvBN
from repvgg.errors import NothingExpandedWarning
from tests.expansion.models import assert_same_outputs, image, module, trained, untouched, vgg


def like(conv, kernel=3, padding=1, groups=None, bias=False):
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, conv.stride, padding, groups=groups or conv.groups, bias=bias
    )


def summed(*branches):
    return module(lambda self, x: sum(branch(x) for branch in self.parts), parts=nn.ModuleList(branches))


def asymmetric(conv):
    strips = ConvBN(like(conv, (3, 1), (1, 0))), ConvBN(like(conv, (1, 3), (0, 1)))
    return summed(*strips, ConvBN(like(conv)))


def diverse(conv):
    squeezed = nn.Sequential(
        nn.Conv2d(conv.in_channels, conv.in_channels, 1, bias=False, groups=conv.groups), like(conv)
    )
    mean = nn.Sequential(like(conv, 1, 0), nn.AvgPool2d(3, 1, 1)) if conv.stride == (1, 1) else like(conv, 1, 0)
    return summed(squeezed, nn.Sequential(squeezed[0], like(conv)), mean, ConvBN(like(conv)))


def overparametrized(conv):
    return summed(*(ConvBN(like(conv)) for _ in range(3)), ConvBN(like(conv, 1, 0)))


def scaled(conv):
    def forward(self, x):
        return self.dense(x) * self.scale + self.point(x) / 2 + self.shift

    out = module(forward, dense=like(conv), point=like(conv, 1, 0))
    out.scale = nn.Parameter(torch.rand(conv.out_channels, 1, 1) + 0.5)
    out.shift = nn.Parameter(torch.zeros(conv.out_channels, 1, 1))
    return out


def trained_norms(conv):
    return trained(summed(ConvBN(like(conv)), ConvBN(like(conv, 1, 0))), torch.float32)


BLOCKS = {
    "asymmetric strips": asymmetric,
    "diverse branches": diverse,
    "overparametrized": overparametrized,
    "scale and shift": scaled,
    "norms far from fresh": trained_norms,
    "the convolution itself, and a norm": lambda conv: ConvBN(conv),
    "a convolution with a bias": lambda conv: summed(like(conv, bias=True), like(conv, 1, 0, bias=True)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("data", [None, image(batch=4)])
def test_blocks_that_fit(name, data):
    torch.manual_seed(0)
    model = trained(vgg())
    expanded, report = untouched(repvgg.expand, model, BLOCKS[name], data=data)
    assert [entry.name for entry in report.expanded] == ["0", "2", "5"], report
    assert_same_outputs(model, expanded, image(), image(3, 16, 11))


def wide(conv):
    return summed(like(conv), nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride))


def zero_scaled(conv):
    out = ConvBN(like(conv))
    nn.init.zeros_(out.bn.weight)
    return out


class Normalized(nn.Conv2d):
    def forward(self, x):
        weight = F.normalize(self.weight.flatten(1)).view_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, 1, 1, self.groups)


def failing(conv):
    raise KeyError("nothing for it")


def single(conv):
    """Computes with a float32 constant, whatever the dtype of its parameters."""
    ones = torch.ones(conv.out_channels, conv.in_channels // conv.groups, 1, 1)
    return module(lambda self, x: self.dense(x) + F.conv2d(x, ones, groups=conv.groups), dense=like(conv, bias=True))


NOT = {
    "nothing": (lambda conv: None, "there is no block for it"),
    "an error": (failing, "cannot be made (KeyError"),
    "not linear": (lambda conv: nn.Sequential(like(conv), nn.ReLU()), "not a linear"),
    "other padding": (lambda conv: like(conv, padding=0), "the block is a ConvMap"),
    "a larger kernel": (lambda conv: like(conv, 5, 2), "no convolution in the block has a kernel of 8x2x3x3"),
    "a larger branch": (lambda conv: summed(like(conv, 5, 2), like(conv)), "the block is a ConvMap"),
    "no dense branch": (
        lambda conv: summed(like(conv, (3, 1), (1, 0)), like(conv, (1, 3), (0, 1))),
        "no convolution in",
    ),
    "no norm statistics": (
        lambda conv: nn.Sequential(like(conv), nn.BatchNorm2d(conv.out_channels, track_running_stats=False)),
        "without running statistics",
    ),
    "scaled by zero": (zero_scaled, "by zero"),
    "a normalized kernel": (
        lambda conv: Normalized(conv.in_channels, conv.out_channels, 3, conv.stride, 1, groups=conv.groups),
        "not that of its dense convolution",
    ),
    "nowhere for the bias": (like, "nothing in the block can carry the bias"),
    "a dropped bias": (
        lambda conv: nn.Sequential(like(conv), nn.BatchNorm2d(conv.out_channels, affine=False)),
        "nothing in the block can carry the bias",
    ),
    "other groups": (
        lambda conv: summed(like(conv), nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1)),
        "the block is a ConvMap",
    ),
}


@pytest.mark.parametrize("name", NOT)
def test_blocks_that_do_not_fit(name):
    make, reason = NOT[name]
    model = trained(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU()))
    with pytest.warns(NothingExpandedWarning):
        expanded, report = untouched(repvgg.expand, model, make)
    assert reason in report.left[0].reason
    torch.testing.assert_close(expanded(image(4)), model(image(4)), rtol=0, atol=0)


def test_bias_is_not_needed_if_the_convolution_has_none():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False)))
    expanded, report = repvgg.expand(model, lambda conv: summed(like(conv), like(conv, 1, 0)))
    assert len(report.expanded) == 1
    assert_same_outputs(model, expanded, image(4))


def test_one_block_for_two_convolutions_is_refused():
    model = trained(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))))
    block = ConvBN(nn.Conv2d(4, 4, 3, padding=1))
    expanded, report = untouched(repvgg.expand, model, lambda conv: block)
    assert [entry.name for entry in report.expanded] == ["0"]
    assert "shares tensors" in report.left[0].reason
    assert_same_outputs(model, expanded, image(4))


def test_block_that_contains_its_convolution_is_refused():
    model = trained(vgg())
    with pytest.warns(NothingExpandedWarning, match="shares tensors"):
        untouched(repvgg.expand, model, lambda conv: nn.Sequential(model[0]))


def test_numbers_that_do_not_fit_into_half_precision():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), torch.float16)
    model[0].weight.data *= 3e4

    def quarter(conv):
        shift = nn.Parameter(torch.zeros(4, 1, 1))
        return module(lambda self, x: self.dense(x) * 0.25 + self.shift, dense=like(conv), shift=shift)

    with pytest.warns(NothingExpandedWarning, match="do not fit into torch.float16"):
        untouched(repvgg.expand, model, quarter)
