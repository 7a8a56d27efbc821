"""Common blocks: norms, computed kernels, paddings, pools, and the building blocks of timm and torchvision."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

import repvgg
from repvgg.errors import NothingFoldedWarning, TrainingModeError
from tests.collapse.models import Branches, Linear2d, check, collapse, conv, image, module, trained


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Dirac(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("delta", nn.init.dirac_(torch.zeros_like(self.weight)))

    def forward(self, x):
        normed = F.normalize(self.weight.flatten(1)).view_as(self.weight)
        return F.conv2d(x, self.alpha * self.delta + normed, self.bias, self.stride, self.padding)


def summed(*branches, act=None):
    def forward(self, x):
        total = 0
        for branch in self.branches:
            total += branch(x)
        return self.act(total)

    return module(forward, branches=nn.ModuleList(branches), act=act or nn.ReLU())


def layer_scale():
    model = module(lambda self, x: self.act(self.a(x) * self.scale + self.b(x) / self.scale.exp() - x / 3))
    model.a, model.b, model.act = Linear2d(), conv(), nn.ReLU()
    model.scale, model.unused = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(3))
    return model


def norms(*kinds):
    return nn.Sequential(*(part for kind in kinds for part in (conv(padding=0), kind, nn.ReLU())))


def dropped_paths():
    parts = {"a": Linear2d(), "path": timm.layers.DropPath(0.3), "depth": torchvision.ops.StochasticDepth(0.2, "row")}
    return module(lambda self, x: F.relu(self.depth(self.path(self.a(x))) + x), **parts)


def same_even():
    return summed(nn.Conv2d(4, 4, (2, 4), padding="same"), nn.Conv2d(4, 4, 3, padding=1), nn.Identity())


EVERYTHING_FOLDS = {
    "frozen norm": (lambda: norms(torchvision.ops.FrozenBatchNorm2d(4)), 4),
    "synchronized norm": (lambda: norms(nn.SyncBatchNorm(4)), 4),
    "norm without scale": (lambda: norms(nn.BatchNorm2d(4, affine=False)), 4),
    "norm with a cumulative average": (lambda: norms(nn.BatchNorm2d(4, momentum=None, eps=1e-3)), 4),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4), nn.ReLU()), 4),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(conv()), nn.BatchNorm2d(4), nn.ReLU()), 4),
    "standardized weights": (lambda: nn.Sequential(Standardized(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 4),
    "timm's standardized weights": (lambda: nn.Sequential(timm.layers.ScaledStdConv2d(4, 4, 3), nn.BatchNorm2d(4)), 4),
    "dirac": (lambda: nn.Sequential(Dirac(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), 4),
    "layer scale": (layer_scale, 4),
    "sum in a loop": (lambda: summed(Linear2d(), conv(kernel=1), nn.BatchNorm2d(4), nn.Identity()), 4),
    "drop path": (dropped_paths, 4),
    "same padding, even kernel": (same_even, 4),
    "padding of every kind": (
        lambda: summed(*(conv(kernel=3, padding_mode=kind) for kind in ("reflect", "reflect")), conv(kernel=1)),
        4,
    ),
    "kernel of two shapes": (
        lambda: summed(nn.Conv2d(4, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), Linear2d()),
        4,
    ),
    "dilation": (lambda: summed(nn.Conv2d(4, 4, 3, padding=2, dilation=2), conv(kernel=1), nn.BatchNorm2d(4)), 4),
    "groups": (lambda: summed(conv(groups=2), conv(groups=4, kernel=1)), 4),
    "depthwise with multiplier": (lambda: nn.Sequential(conv(4, 8, groups=4), nn.BatchNorm2d(8), nn.ReLU()), 4),
    "stride": (lambda: summed(conv(stride=2), conv(kernel=1, stride=2)), 4),
    "zero padding": (lambda: nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), conv(padding=0), nn.BatchNorm2d(4)), 4),
    "zero padding, no norm": (lambda: nn.Sequential(nn.ZeroPad2d((1, 1, 2, 2)), conv(padding=0), nn.ReLU()), 4),
    "reflection": (lambda: nn.Sequential(nn.ReflectionPad2d(1), conv(padding=0), nn.BatchNorm2d(4)), 4),
    "mean pool": (lambda: summed(conv(), nn.AvgPool2d(3, 1, 1)), 4),
    "basic block": (lambda: torchvision.models.resnet.BasicBlock(4, 4), 4),
    "inverted residual": (lambda: torchvision.models.mobilenetv2.InvertedResidual(8, 8, 1, 4), 8),
    "shuffle": (lambda: torchvision.models.shufflenetv2.InvertedResidual(8, 8, 1), 8),
    "one sequence": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(4)), 4),
}


@pytest.mark.parametrize("name", EVERYTHING_FOLDS)
def test_everything_folds(name):
    make, channels = EVERYTHING_FOLDS[name]
    plain, report = check(trained(make()), image(channels))
    assert report.folded
    assert report.left == ()
    assert repvgg.is_plain(plain)
    assert not any(isinstance(part, (nn.BatchNorm2d, nn.ZeroPad2d, nn.AvgPool2d)) for part in plain.modules())


LEFT = {
    "norm without statistics": (
        lambda: norms(nn.BatchNorm2d(4, track_running_stats=False)),
        "without running statistics",
    ),
    "pool that excludes the padding from its average": (
        lambda: summed(Linear2d(), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        None,
    ),
    "pool in ceil mode": (lambda: summed(Linear2d(), nn.AvgPool2d(3, 1, 1, ceil_mode=True)), None),
    "paddings of two kinds": (lambda: summed(Linear2d(), conv(padding_mode="circular")), None),
    "two strides": (lambda: module(lambda self, x: self.a(x)[:, :, :4, :4] + self.b(x)[:, :, :4, :4]), None),
    "norm before a padded convolution": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv(), nn.ReLU()), "bias"),
    "norm after an activation": (
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()),
        "relu is not a linear",
    ),
    "norm that nothing calls": (
        lambda: module(lambda self, x: F.relu(self.c(x)), c=conv(), bn=nn.BatchNorm2d(4)),
        "the recorded call does not run it",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_inexact_merges_are_skipped(name):
    make, reason = LEFT[name]
    model = make()
    if name == "two strides":
        model.a, model.b = conv(stride=2), conv()
    _, report = check(trained(model), image())
    if reason:
        assert reason in report.left[0].reason


def test_a_norm_in_training_mode_is_named():
    model = trained(nn.Sequential(Branches(), Linear2d()))
    model[1].bn.train()
    with pytest.raises(TrainingModeError, match=r"'1\.bn'"):
        repvgg.reparameterize(model)
    with pytest.raises(TrainingModeError, match=r"'0\.a\.bn'"):
        repvgg.reparameterize(model.train())


@pytest.mark.parametrize(
    "model", [nn.Sequential(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), conv(), nn.BatchNorm2d(4), nn.Identity()]
)
def test_nothing_to_fold_warns(model):
    with pytest.warns(NothingFoldedWarning, match="Nothing was folded"):
        plain, _ = repvgg.reparameterize(model.eval())
    x = image(dtype=torch.float32)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
    assert repvgg.is_plain(plain) is not isinstance(model, nn.BatchNorm2d)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_geometry(mode, stride, dilation, groups):
    common = {"stride": stride, "groups": groups}
    big = nn.Conv2d(4, 6, 3, padding=dilation, dilation=dilation, padding_mode=mode, **common)
    branches = [nn.Sequential(big, nn.BatchNorm2d(6)), nn.Conv2d(4, 6, 1, **common)]
    _, report = check(trained(summed(*branches)), image(4, 11, 14))
    assert len(report.folded) == 1


def test_lazy_modules_before_and_after_initialization():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with pytest.warns(NothingFoldedWarning):
        _, report = repvgg.reparameterize(model)
    assert report.left[0].reason == "it has parameters without a shape: call it once before"
    model(image(dtype=torch.float32))
    _, report = check(trained(model), image())
    assert len(report.folded) == 1


def test_parameters_of_other_dtypes_elsewhere():
    model = trained(nn.Sequential(Branches(), Linear2d()))
    model.register_buffer("z", torch.full((2,), 1 + 2j))
    model.register_buffer("n", torch.arange(3))
    plain, _ = collapse(model)
    assert torch.equal(plain.n, model.n)
    assert torch.equal(plain.z, model.z)


def test_complex_convolutions_are_skipped():
    model = summed(conv(dtype=torch.complex64), conv(dtype=torch.complex64, kernel=1), act=nn.Identity()).eval()
    with pytest.warns(NothingFoldedWarning):
        plain, _ = repvgg.reparameterize(model)
    x = torch.complex(image(dtype=torch.float32), image(seed=4, dtype=torch.float32))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)
