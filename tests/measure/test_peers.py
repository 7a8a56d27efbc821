"""The multiply-adds of other people's models, beside fvcore's, where it knows the op."""

import pytest
import torch

from repvgg.measure import walk
from repvgg.models import BASELINES, resolve

PRODUCTS = ("conv", "linear", "matmul", "addmm", "bmm", "einsum", "mm")
FAST = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"]
SOURCES = {row.source for row in BASELINES.values() if row.source.startswith("torchvision:")}
NAMES = sorted({source.partition(":")[2] for source in SOURCES} | {"densenet121", "googlenet", "squeezenet1_0"})


def by_fvcore(model: torch.nn.Module, x: torch.Tensor) -> int:
    fvcore = pytest.importorskip("fvcore.nn")
    analysis = fvcore.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    return sum(counts[name] for name in PRODUCTS)  # it counts norms and pools, too


@pytest.mark.filterwarnings("ignore")  # fvcore was made for an older PyTorch
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_torchvision(name):
    model = resolve(f"torchvision:{name}").model
    x = torch.zeros(1, 3, 96, 96)
    done = walk(model, x)
    assert done.unknown == ()
    assert done.macs == by_fvcore(model, x)
    assert walk(model.to("meta"), x.to("meta")).macs == done.macs
