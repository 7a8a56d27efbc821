"""Norms of other classes than PyTorch's batch norms: in eval mode, with running statistics, they are batch norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import NothingFoldedWarning, TrainingModeError
from tests.collapse.models import assert_same_outputs, conv, image, module, trained


class WrittenNorm(nn.Module):
    """As in many repositories: the formula, with statistics in buffers."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        mean, variance = self.running_mean[:, None, None], self.running_var[:, None, None]
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight[:, None, None] + self.bias[:, None, None]


class FunctionalNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FunctionalInstanceNorm(WrittenNorm):
    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.instance_norm(x, *statistics, self.weight, self.bias, use_input_stats=False)


def frozen(channels):
    return pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(channels)


def instance_norm(channels, affine=True):
    return nn.InstanceNorm2d(channels, affine=affine, track_running_stats=True)


NORMS = {
    "instance": instance_norm,
    "instance without weights": lambda channels: instance_norm(channels, affine=False),
    "frozen": frozen,
    "synchronized": nn.SyncBatchNorm,
    "written": WrittenNorm,
    "function": FunctionalNorm,
    "instance norm as a function": FunctionalInstanceNorm,
}


def with_statistics(model):
    model = trained(model)
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        for name, buffer in part.named_buffers(recurse=False):
            values = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
            if name in ("running_mean", "bias", "running_var", "weight"):
                buffer.copy_(values + (0.3 if name in ("running_var", "weight") else -0.5))
    return model


@pytest.mark.parametrize("inputs", [None, image()], ids=["made up", "given"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_with_running_statistics_fold(name, inputs):
    model = with_statistics(nn.Sequential(conv(), NORMS[name](4), nn.ReLU(), conv(), NORMS[name](4)))
    assert not repvgg.is_plain(model, inputs)
    plain, report = repvgg.reparameterize(model, inputs)
    assert_same_outputs(model, plain, image())
    assert (len(report.folded), report.left) == (2, ())
    assert repvgg.is_plain(plain, inputs)


@pytest.mark.parametrize("name", [name for name in NORMS if name != "instance norm as a function"])
def test_norms_without_a_convolution_are_not_plain(name):
    model = with_statistics(nn.Sequential(nn.ReLU(), NORMS[name](4), nn.ReLU()))
    assert not repvgg.is_plain(model, image())
    with pytest.warns(NothingFoldedWarning):
        _, report = repvgg.reparameterize(model, image())
    assert [skipped.name for skipped in report.left] == ["1"]


def test_instance_norms_after_a_concatenation_are_absorbed():
    def forward(self, x):
        return self.act(self.norm(torch.cat([self.a(x), self.b(self.act(x))], 1)))

    model = with_statistics(module(forward, a=conv(), b=conv(), norm=instance_norm(8), act=nn.ReLU()))
    plain, report = repvgg.reparameterize(model, image())
    assert_same_outputs(model, plain, image())
    assert report.left == ()
    assert repvgg.is_plain(plain, image())


def test_instance_norms_that_normalize_each_image_stay():
    model = with_statistics(nn.Sequential(conv(), nn.InstanceNorm2d(4, affine=True), nn.ReLU()))
    with pytest.warns(NothingFoldedWarning):
        plain, _ = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())


def test_instance_norms_in_training_mode_are_named():
    model = with_statistics(nn.Sequential(conv(), instance_norm(4)))
    model[1].train()
    with pytest.raises(TrainingModeError, match=r"'1' \(InstanceNorm2d\) is in training mode"):
        repvgg.reparameterize(model)
