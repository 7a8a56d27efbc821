"""Whole networks of torchvision and timm: no norm is left, and outputs are the same."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import repvgg
from tests.collapse.models import image, trained


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name):
    _check(torchvision.models.get_model(name, weights=None))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "repghostnet_050", "regnetx_002"])
def test_networks_of_timm(name):
    _check(timm.create_model(name))


def _check(model):
    model = trained(model)
    plain, report = repvgg.reparameterize(model)
    assert not any(isinstance(part, _BatchNorm) and "running_mean" in part._buffers for part in plain.modules())
    assert report.left == ()
    assert "relative error" in report.proof
    x = image(3, 64, 96)
    with torch.no_grad():
        expected, found = model(x), plain(x)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-10)
    assert repvgg.is_plain(plain)
    kept = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert kept == [name for name, part in plain.named_modules() if isinstance(part, nn.Linear)]


def test_memory_that_is_used_anew_is_not_shared():
    """In-place activations write to memory that earlier tensors had; results must not depend on the allocator."""
    model = trained(torchvision.models.get_model("shufflenet_v2_x0_5", weights=None))
    reports = [repvgg.reparameterize(model, prove=False)[1] for _ in range(3)]
    assert {len(report.folded) for report in reports} == {56}
    assert {report.left for report in reports} == {()}
