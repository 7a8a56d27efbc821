"""PSPNet: shapes, the plain form, checkpoints, and the pyramid against torchvision's operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import CheckpointError, UnknownModelError, UsageError
from repvgg.models import (
    PSPNETS,
    PSPNet,
    PSPNetSpec,
    TrainingOutput,
    create_model,
    describe_model,
    form_of,
    list_segmentation_models,
    load,
    save,
    set_backbone,
)
from repvgg.models.pspnet import BatchNormOfFewValues, PyramidPooling
from tests.bn_statistics import trained_like

NAMES = ("pspnet_repvgg_a0", "pspnet_repvgg_a0_fast", "pspnet_resnet18")


def made(name, **more):
    torch.manual_seed(0)
    return trained_like(create_model(name, 5, **more))


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """A PSPNet in float64 and its plain form."""
    model = made(request.param).double()
    plain, report = repvgg.reparameterize(model, torch.randn(1, 3, 41, 33, dtype=torch.float64))
    return model, plain, report


def test_names():
    assert list_segmentation_models() == list(PSPNETS)
    assert {"pspnet_repvgg_b1g2", "pspnet_repvgg_b2_fast", "pspnet_resnet50", "pspnet_resnet101"} <= PSPNETS.keys()
    with pytest.raises(UnknownModelError, match="pspnet_repvgg_a0"):
        create_model("pspnet_repvgg_ao")


@pytest.mark.parametrize("size", [(41, 33), (40, 32), (35, 50)])
def test_collapse_is_exact_at_every_size(pair, size):
    model, plain, _ = pair
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(x), plain(x)
    assert found.shape == (2, 5, *size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_plain_form_has_no_norm_and_no_auxiliary_head(pair):
    model, plain, report = pair
    assert isinstance(plain, PSPNet)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert plain.auxiliary is None
    assert (form_of(model), form_of(plain)) == ("train", "plain")
    assert report.left == ()
    # Dilation survives in every merged convolution, with the padding that keeps the size.
    dilated = [conv for conv in plain.backbone.modules() if isinstance(conv, nn.Conv2d) and conv.dilation != (1, 1)]
    assert dilated
    assert all(conv.padding == conv.dilation for conv in dilated)


def test_plain_form_is_what_the_factory_builds(pair):
    model, plain, _ = pair
    built = create_model(model.spec.name, 5, plain=True)
    assert {n: x.shape for n, x in built.state_dict().items()} == {n: x.shape for n, x in plain.state_dict().items()}
    built.double().load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 33, 41, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(x), plain(x), rtol=0, atol=0)


def test_training_returns_both_heads_at_image_size_even_for_one_image():
    model = made("pspnet_repvgg_a0").train()
    out = model(torch.randn(1, 3, 33, 25))
    assert isinstance(out, TrainingOutput)
    assert [tuple(x.shape) for x in (out.logits, *out.auxiliary)] == [(1, 5, 33, 25)] * 2
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.pyramid.parameters())


def test_norm_of_a_single_value_takes_the_running_statistics():
    norm, usual = BatchNormOfFewValues(4), nn.BatchNorm2d(4)
    for one in (norm, usual):
        trained_like(one)
    norm.train()
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm(x), usual.eval()(x))
    torch.testing.assert_close(norm.running_mean, usual.running_mean)  # not updated
    x = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(norm(x), usual.train()(x))
    torch.testing.assert_close(norm.running_var, usual.running_var)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        usual(torch.randn(1, 4, 1, 1))


def test_pyramid_by_hand():
    torch.manual_seed(0)
    pyramid = trained_like(PyramidPooling(8, (1, 2, 3, 6), plain=False)).double()
    x = torch.randn(2, 8, 7, 9, dtype=torch.float64)
    parts = [x]
    for grid, bins in zip(pyramid.grids, (1, 2, 3, 6), strict=True):
        cells = torch.stack(
            [
                x[:, :, i * 7 // bins : -(-(i + 1) * 7 // bins), j * 9 // bins : -(-(j + 1) * 9 // bins)].mean((2, 3))
                for i in range(bins)
                for j in range(bins)
            ],
            -1,
        ).view(2, 8, bins, bins)
        parts.append(F.interpolate(grid.conv(cells).relu(), (7, 9), mode="bilinear", align_corners=True))
    torch.testing.assert_close(pyramid(x), torch.cat(parts, 1))
    assert pyramid.out_channels == 16


@pytest.mark.parametrize("form", ["train", "plain"])
@pytest.mark.parametrize(
    ("name", "suffix"), [("pspnet_repvgg_a0", "pth"), ("pspnet_repvgg_a0", "safetensors"), ("pspnet_resnet18", "pth")]
)
def test_checkpoint_round_trip(tmp_path, name, form, suffix):
    model = trained_like(create_model(name, 3, plain=form == "plain"))
    save(tmp_path / f"m.{suffix}", model, describe_model(model, form, classes=("a", "b", "c")))
    loaded = load(tmp_path / f"m.{suffix}")
    assert (loaded.metadata.model, loaded.metadata.form, loaded.metadata.classes) == (name, form, ("a", "b", "c"))
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(1, 3, 17, 25)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(x), model.eval()(x))


def test_loading_the_plain_form_of_a_train_file(tmp_path):
    model = made("pspnet_repvgg_a0_fast")
    save(tmp_path / "m.safetensors", model, describe_model(model, "train"))
    loaded = load(tmp_path / "m.safetensors", plain=True)
    assert form_of(loaded.model) == loaded.metadata.form == "plain"


def test_checkpoint_of_another_dilation_holds_its_specification(tmp_path):
    model = made("pspnet_repvgg_a0", dilation="exact")
    save(tmp_path / "m.safetensors", model, describe_model(model, "train"))
    loaded = load(tmp_path / "m.safetensors").model
    assert loaded.spec.dilation == "exact"
    assert loaded.backbone.stages[2][0].conv["dense"].conv.dilation == (1, 1)


def test_forged_headers_are_refused_in_one_sentence(tmp_path):
    model = create_model("pspnet_repvgg_a0", 3, plain=True)
    right = describe_model(model, "plain")
    for spec in ({"backbone": "repvgg_a0", "bins": [10**9]}, {"backbone": "nothing", "bins": [1]}, {"bins": "x"}):
        header = describe_model(model, "plain", spec=spec)
        save(tmp_path / "m.safetensors", model, header, overwrite=True)
        with pytest.raises(CheckpointError, match="cannot be built"):
            load(tmp_path / "m.safetensors")
    del model.head.classifier
    save(tmp_path / "m.safetensors", model, right, overwrite=True)
    with pytest.raises(CheckpointError, match=r"head\.classifier"):
        load(tmp_path / "m.safetensors")


def test_backbone_from_a_classifier():
    model, classifier = made("pspnet_repvgg_a0"), trained_like(create_model("repvgg_a0", 7), seed=5)
    set_backbone(model, classifier)
    for name, tensor in model.backbone.state_dict().items():
        torch.testing.assert_close(tensor, classifier.state_dict()[name])
    with pytest.raises(CheckpointError, match="do not fit the backbone of pspnet_repvgg_a0"):
        set_backbone(model, create_model("repvgg_a1", 7))


def test_bad_requests():
    with pytest.raises(UsageError, match="dilation is for segmentation models"):
        create_model("repvgg_a0", dilation="exact")
    with pytest.raises(UsageError, match="3 channels, not 1"):
        create_model("pspnet_resnet18", 3, in_channels=1)
    with pytest.raises(UsageError, match="at least one class"):
        create_model("pspnet_repvgg_a0", 0)
    with pytest.raises(UsageError, match="dropout"):
        PSPNetSpec("mine", "repvgg_a0", dropout=1.0)
