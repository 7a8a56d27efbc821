"""Multiply-adds of torchvision models against fvcore's, for the ops that it knows."""

import pytest
import torch

from repvgg.measure import walk
from repvgg.models import BASELINES, resolve

PRODUCTS = ("conv", "linear", "matmul", "addmm", "bmm", "einsum", "mm")
FAST = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"]
SOURCES = {row.source for row in BASELINES.values() if row.source.startswith("torchvision:")}
NAMES = sorted({source.partition(":")[2] for source in SOURCES} | {"densenet121", "googlenet", "squeezenet1_0"})


def fvcore_macs(model: torch.nn.Module, x: torch.Tensor) -> int:
    fvcore = pytest.importorskip("fvcore.nn")
    analysis = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    return sum(counts[name] for name in PRODUCTS)  # fvcore also counts norms and pools


@pytest.mark.filterwarnings("ignore")  # fvcore targets an older PyTorch
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_torchvision_models(name):
    model = resolve(f"torchvision:{name}").model
    x = torch.zeros(1, 3, 96, 96)
    done = walk(model, x)
    assert done.unknown == ()
    assert done.macs == fvcore_macs(model, x)
    assert walk(model.to("meta"), x.to("meta")).macs == done.macs
