"""Compare with timm's RepVGG: the same weights give the same logits."""

import pytest
import torch
from torch.testing import assert_close

from repvgg import create_model, list_models
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage
from tests.bn_statistics import trained_like

timm = pytest.importorskip("timm")
byobnet = pytest.importorskip("timm.models.byobnet")

NAMES = (  # ours, timm's
    ("conv.dense.", "conv_kxk."),
    ("conv.pointwise.", "conv_1x1."),
    ("conv.identity.", "identity."),
    ("act.se.down.", "attn.fc1."),
    ("act.se.up.", "attn.fc2."),
    ("head.", "head.fc."),
)


def timm_name(name):
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def with_weights_of(theirs, name):
    """Return our model with the weights of timm's; every tensor is used exactly once."""
    given = theirs.state_dict()
    ours = create_model(name, theirs.num_classes).to(next(theirs.parameters()))
    renamed = {name: given.pop(timm_name(name)) for name in ours.state_dict()}
    assert given == {}
    ours.load_state_dict(renamed)
    return ours.eval()


def assert_same_logits(theirs, name, size):
    theirs = trained_like(theirs).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(with_weights_of(theirs, name)(images), theirs(images), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "size"), [("repvgg_a0", (64, 64)), ("repvgg_a0", (45, 71))])
def test_logits(name, size):
    torch.manual_seed(0)
    assert_same_logits(timm.create_model(name, num_classes=17), name, size)


@pytest.mark.parametrize("gated", [False, True])
def test_logits_with_groups_or_gates(gated):
    """Small versions of b1g4 and d2se, with fewer and narrower blocks."""
    torch.manual_seed(0)
    stages, groups = ((2, 16), (4, 24), (2, 32), (1, 40)), 1 if gated else 4
    layers = {"attn_layer": "se", "attn_kwargs": {"rd_ratio": 0.25, "rd_divisor": 1}} if gated else {}
    config = byobnet.ByoModelCfg(
        blocks=tuple(
            byobnet.ByoBlockCfg(type="rep", d=depth, c=channels, s=2, gs=group_size(channels, groups))
            for depth, channels in stages
        ),
        stem_type="rep",
        stem_chs=16,
        **layers,
    )
    theirs = byobnet.ByobNet(config, num_classes=7)
    name = ModelSpec(
        "small",
        Stage(1, 16),
        tuple(Stage(depth, channels) for depth, channels in stages),
        groups=groups,
        squeeze_excite=SqueezeExciteSpec("before_relu", 4) if gated else None,
    )
    assert_same_logits(theirs, name, (64, 64))


def group_size(channels, groups):
    """Return timm's group size, in channels per group, for every second layer of a stage; stages have even depths."""
    return (lambda _, layer: channels // groups if (layer + 1) % 2 == 0 else 0) if groups > 1 else 0


@pytest.mark.parametrize("name", [name for name in list_models() if name in timm.list_models("repvgg*")])
def test_names_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    found = {timm_name(key): tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    assert found == {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    strides = [m.stride for key, m in ours.named_modules() if key.endswith("dense.conv")]
    assert strides == [m.stride for key, m in theirs.named_modules() if key.endswith("conv_kxk.conv")]
