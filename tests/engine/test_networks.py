"""Networks of torchvision and timm, after ``reparameterize``, against float64."""

import copy

import pytest
import torch
from torch import nn

import repvgg
import repvgg.engine
from tests.bn_statistics import trained_like
from tests.rounding import predicted_float32_error

FAST = ["torchvision resnet18", "torchvision mobilenet_v2", "timm repghostnet_050", "timm convnext_atto"]
SLOW = [
    *(f"torchvision {name}" for name in ("resnet50", "vgg11", "vgg16", "densenet121", "resnext50_32x4d")),
    *(f"torchvision {name}" for name in ("googlenet", "shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet1_0")),
    *(f"timm {name}" for name in ("mobileone_s0", "mobileone_s1", "mobilenetv2_100", "mobilenetv3_large_100")),
    *(f"timm {name}" for name in ("efficientnet_b0", "regnetx_032", "repvit_m1_0", "repghostnet_100")),
    "repvgg pspnet_small_repvgg_a0",
]


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    library, _, name = name.partition(" ")
    if library == "torchvision":
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None)
    elif library == "timm":
        model = pytest.importorskip("timm").create_model(name, pretrained=False)
    else:
        model = repvgg.create_model(name)
    return trained_like(model)


def check(name: str, size: int, precision: str) -> None:
    """The error of the outputs is that of float32 convolutions, up to 4 times as much with Winograd."""
    plain, _ = repvgg.reparameterize(create(name))
    x = torch.randn(2, 3, size, size)
    compiled = repvgg.engine.compile(plain, (2, 3, size, size), 1, precision=precision)
    with torch.inference_mode():
        wanted = copy.deepcopy(plain).double()(x.double())
    error = (compiled(x).double() - wanted).square().mean().sqrt().item()
    factor = {"highest": 2, "high": 4}[precision]
    assert 0 < error <= factor * predicted_float32_error(plain, x)


@pytest.mark.parametrize("name", FAST)
def test_networks(name):
    check(name, 32, "highest")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_networks_with_winograd(name):
    check(name, 97 if "pspnet" in name else 64, "high")
