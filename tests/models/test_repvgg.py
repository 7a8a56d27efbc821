"""The network class: widths, strides, groups, gates, feature maps, auxiliary heads."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import create_model, list_models, reparameterize
from repvgg.errors import UnknownModelError, UsageError
from repvgg.models import SPECS, ModelSpec, SqueezeExciteSpec, Stage, TrainingOutput, spec_of
from tests.bn_statistics import trained_like
from tests.models.helpers import TINY, TINY_PLUS, convolutions

IMAGENET = [name for name, spec in SPECS.items() if spec.input_size == 224]
WIDTHS = {
    "repvgg_a0": (48, 48, 96, 192, 1280),
    "repvgg_a1": (64, 64, 128, 256, 1280),
    "repvgg_a2": (64, 96, 192, 384, 1408),
    "repvgg_b0": (64, 64, 128, 256, 1280),
    "repvgg_b1": (64, 128, 256, 512, 2048),
    "repvgg_b2": (64, 160, 320, 640, 2560),
    "repvgg_b3": (64, 192, 384, 768, 2560),
    "repvgg_d2se": (64, 160, 320, 640, 2560),
    "repvggplus_l2pse": (64, 160, 320, 640, 640, 2560),
}


@cache
def on_meta(name, **more):
    """Return a shared model on the meta device; tests do not change it."""
    with torch.device("meta"):
        return create_model(name, **more)


def blocks(model):
    """Return all blocks in the order of execution."""
    return [model.stem, *(block for stage in model.stages for block in stage)]


def test_registered_models():
    assert list_models() == list(SPECS)
    assert all(spec.name == name for name, spec in SPECS.items())
    assert len(IMAGENET) == 15


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_and_depths(name):
    spec = spec_of(name)
    assert (spec.stem.channels, *(stage.channels for stage in spec.stages)) == WIDTHS[name]
    depths = tuple(stage.depth for stage in spec.stages)
    expected = {"a": (2, 4, 14, 1), "b": (4, 6, 16, 1), "d": (8, 14, 24, 1), "p": (8, 14, 12, 12, 1)}
    assert depths == expected[name.removeprefix("repvgg").lstrip("_")[0]]
    model = on_meta(name)
    assert model.stem.conv["dense"].conv.out_channels == WIDTHS[name][0]
    assert [len(stage) for stage in model.stages] == list(depths)


@pytest.mark.parametrize("name", IMAGENET)
def test_strides_halve_five_times(name):
    spec = spec_of(name)
    assert spec.stride == 32
    strides = [block.conv.stride[0] for block in blocks(on_meta(name, plain=True))]
    assert strides.count(2) == 5
    assert set(strides) == {1, 2}


@pytest.mark.parametrize("name", list_models())
def test_every_second_layer_from_the_third_is_grouped(name):
    groups = spec_of(name).groups
    assert groups == (int(name[-1]) if name[-2] == "g" else 1)
    for layer, block in enumerate(blocks(on_meta(name))):
        expected = groups if layer in range(2, 28, 2) else 1
        assert block.conv["dense"].conv.groups == block.conv["pointwise"].conv.groups == expected, layer


@pytest.mark.parametrize("name", list_models())
def test_identity_exactly_where_shapes_match(name):
    for block in blocks(on_meta(name)):
        conv = block.conv["dense"].conv
        same = conv.in_channels == conv.out_channels and conv.stride == (1, 1)
        assert list(block.conv) == ["dense", "pointwise", *(["identity"] if same else [])]
        assert not same or block.conv["identity"].num_features == conv.out_channels


@pytest.mark.parametrize(
    ("name", "order", "reduction"),
    [("repvgg_a0", None, 0), ("repvgg_d2se", ["se", "relu"], 16), ("repvggplus_l2pse", ["relu", "se"], 4)],
)
def test_gates(name, order, reduction):
    for block in blocks(on_meta(name, plain=True)):
        if order is None:
            assert type(block.act) is nn.ReLU
            continue
        assert [part for part, _ in block.act.named_children()] == order
        down, up = block.act.se.down, block.act.se.up
        channels = block.conv.out_channels
        assert (down.in_channels, down.out_channels, up.out_channels) == (channels, channels // reduction, channels)
        assert down.bias is not None
        assert up.bias is not None


def test_batch_norms_are_as_published():
    norms = [m for m in on_meta("repvgg_a0").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum, norm.affine, norm.track_running_stats) for norm in norms} == {
        (1e-5, 0.1, True, True)
    }


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("classes", "channels"), [(1, 1), (7, 4)])
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (64, 31)])
def test_any_classes_channels_and_sizes(plain, classes, channels, size):
    model = create_model(TINY, classes, channels, plain).eval()
    assert (model.num_classes, model.in_channels, model.spec) == (classes, channels, TINY)
    with torch.no_grad():
        assert model(torch.randn(2, channels, *size)).shape == (2, classes)


@pytest.mark.parametrize("height", range(32, 65, 11))
def test_feature_maps_of_imagenet_model(height):
    model, images = on_meta("repvgg_a0"), torch.empty(2, 3, height, 70, device="meta")
    maps = model.features(images)
    assert [tuple(each.shape) for each in maps] == [
        (2, width, -(-height // stride), -(-70 // stride))
        for width, stride in zip(WIDTHS["repvgg_a0"], (2, 4, 8, 16, 32), strict=True)
    ]


def test_last_feature_map_is_the_input_of_the_head():
    torch.manual_seed(0)
    model = trained_like(create_model(TINY, 5))
    images = torch.randn(2, 3, 21, 21)
    with torch.no_grad():
        maps = model.features(images)
        assert_close(maps[0], model.stem(images))
        assert_close(model.head(maps[-1].mean((2, 3))), model(images))


def test_features_of_collapsed_model():
    torch.manual_seed(0)
    train = trained_like(create_model(TINY, 5)).double()
    plain, _ = reparameterize(train)
    images = torch.randn(2, 3, 21, 21, dtype=torch.float64)
    with torch.no_grad():
        assert_close(plain.features(images), train.features(images))


def test_auxiliary_heads_run_in_training_mode_only():
    torch.manual_seed(0)
    model = create_model(TINY_PLUS, 7)
    images = torch.randn(2, 3, 64, 64)
    out = model.train()(images)
    assert isinstance(out, TrainingOutput)
    assert out.logits.shape == (2, 7)
    assert [logits.shape for logits in out.auxiliary] == [(2, 7)] * 3
    logits = model.eval()(images)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 7)
    assert isinstance(create_model(TINY, 7).train()(images), torch.Tensor)


def test_auxiliary_heads_read_the_output_of_their_stage():
    torch.manual_seed(0)
    model = trained_like(create_model(TINY_PLUS, 7)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps, out = model.features(images), model(images)
        for index, logits in zip((0, 1, 2), out.auxiliary, strict=True):
            head = model.auxiliary[f"stage{index}"]
            assert head.conv.stride == (2, 2)
            assert head.conv.bias is None
            assert_close(logits, head.head(head.relu(head.bn(head.conv(maps[index + 1]))).mean((2, 3))))


@pytest.mark.parametrize("name", ["repvggplus_l2pse"])
def test_repvggplus_has_heads_after_its_first_three_stages(name):
    model = on_meta(name)
    assert list(model.auxiliary) == ["stage0", "stage1", "stage2"]
    assert [head.conv.in_channels for head in model.auxiliary.values()] == [160, 320, 640]
    assert list(on_meta(name, plain=True).auxiliary) == []


def test_initial_weights_depend_on_the_seed_only():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(create_model("repvgg_t0", 10, 1).state_dict())
    assert_close(models[0], models[1], rtol=0, atol=0)
    assert not torch.equal(models[0]["head.weight"], models[2]["head.weight"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("repvgg_a00", "did you mean repvgg_a0"),
        ("repvgg-b1g4", "did you mean repvgg_b1g4"),
        ("resnet50", "known are repvgg_a0, .*, repvgg_t2"),
        ("", "known are"),
    ],
)
def test_unknown_names_get_a_suggestion(name, text):
    with pytest.raises(UnknownModelError, match=text) as caught:
        create_model(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("classes", "channels"), [(0, 3), (-1, 3), (10, 0), ("10", 3), (10, 3.0)])
def test_counts_below_one(classes, channels):
    with pytest.raises(UsageError, match="at least one class and one input channel"):
        create_model("repvgg_t0", classes, channels)


@pytest.mark.parametrize("field", ["depth", "channels", "stride"])
@pytest.mark.parametrize("value", [0, -1])
def test_invalid_stages(field, value):
    with pytest.raises(UsageError, match="positive depth, width and stride"):
        Stage(**{"depth": 1, "channels": 8, "stride": 2, field: value})


def test_invalid_specs():
    stage = Stage(1, 8)
    with pytest.raises(UsageError, match="must be one layer, not 2"):
        ModelSpec("x", Stage(2, 8), (stage,))
    for index in (-1, 1):
        with pytest.raises(UsageError, match="no stage for each auxiliary head"):
            ModelSpec("x", stage, (stage,), auxiliary=(index,))


def test_specs_are_values():
    spec = ModelSpec("x", Stage(1, 8), (Stage(1, 8),), squeeze_excite=SqueezeExciteSpec("before_relu", 2))
    assert spec == ModelSpec("x", Stage(1, 8), (Stage(1, 8),), squeeze_excite=SqueezeExciteSpec("before_relu", 2))
    assert len({spec, *SPECS.values()}) == len(SPECS) + 1
    with pytest.raises(AttributeError):
        spec.groups = 2


def test_plain_and_train_form_have_equal_geometry():
    dense = {
        name.replace(".dense.conv", ""): geometry
        for name, geometry in convolutions(on_meta("repvgg_b1g4")).items()
        if "pointwise" not in name
    }
    assert convolutions(on_meta("repvgg_b1g4", plain=True)) == dense
