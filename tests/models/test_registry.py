"""The registry of architectures, and the baselines in it."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.errors import MissingDependencyError, SourceError, UnknownModelError, UsageError
from repvgg.measure import count
from repvgg.models import BASELINES, SPECS, Baseline, baseline_of, create_baseline, list_baselines


def test_names_are_unique():
    assert list_baselines() == list(BASELINES)
    assert not BASELINES.keys() & SPECS.keys()
    titles = [baseline.title for baseline in BASELINES.values()]
    assert len(titles) == len(set(titles))
    assert {baseline.input_size for baseline in BASELINES.values()} == {224, 300}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "shufflenet_v2_x0_5"])
def test_baseline_is_in_training_mode_with_given_classes(name):
    model = create_baseline(name, num_classes=7)
    assert model.training
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_published_strides_and_v1_5():
    """A bottleneck with its stride in the first 1x1 processes a quarter of the pixels, and has the same tensors."""
    published, v1_5 = create_baseline("resnet50"), create_baseline("resnet50_v1_5")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (published, v1_5)]
    assert shapes[0] == shapes[1]
    moved = [
        name for name, part in published.named_modules() if getattr(part, "stride", 1) == (2, 2) and "conv" in name
    ]
    assert moved == ["conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]
    x = torch.randn(1, 3, 64, 64)
    assert_close(published.eval()(x).shape, v1_5.eval()(x).shape)
    macs_v1_5, macs_published = count(v1_5.to("meta")).macs, count(published.to("meta")).macs
    # In the first block of stages 2 to 4, the 1x1 processes 1/4 of (2h)² pixels, from 4c to 2c channels.
    saved = sum(3 * size**2 * (2 * width) * width for size, width in ((28, 128), (14, 256), (7, 512)))
    assert macs_v1_5 - macs_published == saved


def test_network_without_bottlenecks_has_no_stride_to_move(monkeypatch):
    monkeypatch.setitem(BASELINES, "odd", Baseline("odd", "Odd", "torchvision:resnet18", "", stride_in_1x1=True))
    with pytest.raises(SourceError, match="no bottleneck whose stride could be moved"):
        create_baseline("odd")


def test_unknown_names():
    with pytest.raises(UnknownModelError, match="no baseline 'resnet51': did you mean resnet50"):
        baseline_of("resnet51")
    with pytest.raises(UnknownModelError, match="known are resnet18, "):
        create_baseline("xyzzy")
    with pytest.raises(UsageError, match="at least one class"):
        create_baseline("resnet18", num_classes=0)


def test_timm_is_required_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'repvgg\[timm\]'"):
        create_baseline("mobileone_s0")
    assert isinstance(create_baseline("resnet18"), nn.Module)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_builds(name):
    model = create_baseline(name).eval()
    size = BASELINES[name].input_size
    assert count(model.to("meta"), (1, 3, size, size)).macs > 10_000_000
