import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repvgg import create_model, list_models
from repvgg.checkpoints import LAYOUTS, recognize_names, rename_to
from repvgg.models import SPECS, ModelSpec, SqueezeExciteSpec, Stage
from repvgg.models.infer_spec import infer_spec

PARTS = [  # paths inside a block: ours, upstream, timm, mmpretrain
    ("conv.dense.conv.weight", "rbr_dense.conv.weight", "conv_kxk.conv.weight", "branch_3x3.conv.weight"),
    (
        "conv.dense.bn.running_mean",
        "rbr_dense.bn.running_mean",
        "conv_kxk.bn.running_mean",
        "branch_3x3.norm.running_mean",
    ),
    ("conv.pointwise.conv.weight", "rbr_1x1.conv.weight", "conv_1x1.conv.weight", "branch_1x1.conv.weight"),
    ("conv.pointwise.bn.bias", "rbr_1x1.bn.bias", "conv_1x1.bn.bias", "branch_1x1.norm.bias"),
    ("conv.identity.running_var", "rbr_identity.running_var", "identity.running_var", "branch_norm.running_var"),
    ("conv.weight", "rbr_reparam.weight", "reparam_conv.weight", "branch_reparam.weight"),
    ("act.se.down.bias", "se.down.bias", "attn.fc1.bias", "se_layer.conv1.conv.bias"),
    ("act.se.up.weight", "se.up.weight", "attn.fc2.weight", "se_layer.conv2.conv.weight"),
]
BLOCKS = [  # paths of blocks, in the same order
    ("stem", "stage0", "stem", "backbone.stem"),
    ("stages.0.1", "stage1.1", "stages.0.1", "backbone.stage_1.1"),
    ("stages.3.13", "stage4.13", "stages.3.13", "backbone.stage_4.13"),
]
PLUS = [
    ("stem.conv.weight", "stage0.rbr_reparam.weight"),
    ("stages.0.7.conv.dense.conv.weight", "stage1.blocks.7.rbr_dense.conv.weight"),
    ("stages.2.11.act.se.down.weight", "stage3_first.blocks.11.post_se.down.weight"),
    ("stages.3.0.conv.identity.bias", "stage3_second.blocks.0.rbr_identity.bias"),
    ("stages.4.0.act.se.up.bias", "stage4.blocks.0.post_se.up.bias"),
    ("auxiliary.stage0.conv.weight", "stage1_aux.0.conv.weight"),
    ("auxiliary.stage1.bn.running_mean", "stage2_aux.0.bn.running_mean"),
    ("auxiliary.stage2.head.bias", "stage3_first_aux.3.bias"),
    ("head.bias", "linear.bias"),
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("part", PARTS)
def test_names_in_both_directions(block, part):
    ours, *theirs = (f"{at}.{name}" for at, name in zip(block, part, strict=True))
    for layout, name in zip(("repvgg", "upstream", "timm", "mmpretrain"), (ours, *theirs), strict=True):
        assert LAYOUTS[layout].theirs(ours) == name
        assert LAYOUTS[layout].ours(name) == ours


def test_names_of_the_classifier():
    for layout, name in (("upstream", "linear.bias"), ("timm", "head.fc.bias"), ("mmpretrain", "head.fc.bias")):
        assert (LAYOUTS[layout].theirs("head.bias"), LAYOUTS[layout].ours(name)) == (name, "head.bias")


@pytest.mark.parametrize(("ours", "plus"), PLUS)
def test_names_of_plus_in_both_directions(ours, plus):
    assert LAYOUTS["upstream_plus"].theirs(ours) == plus
    assert LAYOUTS["upstream_plus"].ours(plus) == ours


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "weight",
            "linear",
            "linear.weight.more",
            "stage0.rbr_dense.weights",
            "stage1.rbr_dense.conv.weight",
        ),
        *("stage00.0.rbr_dense.conv.weight", "stage01.0.rbr_dense.conv.weight", "stage1.-1.rbr_dense.conv.weight"),
        *(
            "stage1.x.rbr_dense.conv.weight",
            "stage99999999.0.rbr_dense.conv.weight",
            "stage1.0.rbr_dense.conv.weight\n",
        ),
        "stage1.1\u0661.rbr_dense.conv.weight",
    ],
)
def test_names_that_are_not_recognized(name):
    assert LAYOUTS["upstream"].ours(name) is None


def test_stages_count_from_one():
    assert LAYOUTS["upstream"].ours("stage0.0.rbr_dense.conv.weight") is None
    assert LAYOUTS["mmpretrain"].ours("backbone.stage_0.0.branch_3x3.conv.weight") is None


def shapes(spec, plain):
    with torch.device("meta"):
        model = create_model(spec, 11, 4, plain)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def round_trip(layout, spec, plain, prefix=""):
    """Write our names in a layout and recognize them again; return the naming, and our names with shapes."""
    ours = shapes(spec, plain)
    gate = spec.squeeze_excite.place if spec.squeeze_excite else None
    theirs = {prefix + name: shape for name, shape in rename_to(layout, ours, gate).items()}
    assert len(theirs) == len(ours)
    naming = recognize_names(theirs)
    assert naming.unrecognized == ()
    assert naming.prefix == prefix
    assert {naming.used[name]: shape for name, shape in theirs.items()} == ours
    assert all(naming.in_file(ours) == name for name, ours in naming.used.items())
    return naming, ours


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("layout", ["repvgg", "upstream", "timm", "mmpretrain"])
def test_every_architecture_there_and_back(layout, name, plain):
    if name == "repvggplus_l2pse" and layout in ("timm", "mmpretrain"):
        pytest.skip("they have no such model")
    naming, ours = round_trip(layout, SPECS[name], plain)
    wanted = "upstream_plus" if (layout, name) == ("upstream", "repvggplus_l2pse") else layout
    assert naming.layout.name == wanted
    assert infer_spec(ours, naming.layout.gate, naming.layout.halves).spec is SPECS[name]


@st.composite
def specs(draw):
    gate = draw(st.sampled_from([None, "before_relu", "after_relu"]))
    plus = gate == "after_relu"
    number = 5 if plus else draw(st.integers(1, 5))
    groups = draw(st.sampled_from([1, 2, 4]))
    stages = [Stage(draw(st.integers(1, 4)), 8 * draw(st.integers(1, 4))) for _ in range(number)]
    squeeze = SqueezeExciteSpec(gate, draw(st.sampled_from([2, 4, 8]))) if gate else None
    auxiliary = draw(st.sampled_from([(), (0, 1, 2), (1,)])) if plus else ()
    return ModelSpec("custom", Stage(1, 8 * draw(st.integers(1, 3))), tuple(stages), groups, squeeze, auxiliary)


@settings(max_examples=60)
@given(
    spec=specs(),
    plain=st.booleans(),
    layout=st.sampled_from(["upstream", "timm", "mmpretrain"]),
    prefix=st.sampled_from(["", "module.", "module._orig_mod.", "_orig_mod.model."]),
)
def test_any_spec_follows_from_names_and_shapes(spec, plain, layout, prefix):
    gate = spec.squeeze_excite
    naming, ours = round_trip("upstream" if gate and gate.place == "after_relu" else layout, spec, plain, prefix)
    found = infer_spec(ours, naming.layout.gate)
    assert (found.num_classes, found.in_channels, found.form) == (11, 4, "plain" if plain else "train")
    assert shapes(found.spec, plain) == ours  # groups that no layer uses are not recoverable, and have no effect
    assert [(s.depth, s.channels) for s in found.spec.stages] == [(s.depth, s.channels) for s in spec.stages]
    if gate:
        assert found.spec.squeeze_excite.place == gate.place
