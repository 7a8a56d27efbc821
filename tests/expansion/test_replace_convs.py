"""Blocks of the table replace convolutions: equal where the block allows it, else reported as fresh."""

import json

import pytest
import torch
import torchvision
from torch import nn

import repvgg
from repvgg.blocks import BLOCKS
from repvgg.errors import FreshWeightsWarning, NothingExpandedWarning, UsageError
from tests.expansion.models import assert_same_outputs, image, trained, untouched, vgg

FRESH = {"dirac", "expand_cl", "repvgg_relu"}
LARGE = {"unireplk", "expand_ck"}  # on kernels of 5 and more


def three(size=3):
    """A plain chain: wider, the same width, a stride, groups."""
    pad = size // 2
    return trained(
        nn.Sequential(
            nn.Conv2d(3, 8, size, padding=pad),
            nn.ReLU(),
            nn.Conv2d(8, 8, size, padding=pad, bias=False),
            nn.ReLU(),
            nn.Conv2d(8, 8, size, 2, padding=pad, groups=2),
        )
    )


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in FRESH | LARGE | {"repmixer"}])
def test_blocks_that_start_equal_to_their_convolution(name):
    torch.manual_seed(0)
    model = three()
    out, report = untouched(repvgg.replace_convs, model, name)
    assert report.is_exact
    assert [entry.name for entry in report.expanded] == ["0", "2", "4"]
    assert all(entry.error < 1e-10 and not entry.fresh for entry in report.expanded)
    assert_same_outputs(model, out, image(), image(3, 16, 11))
    plain, _ = repvgg.reparameterize(out)
    assert_same_outputs(model, plain, image())


@pytest.mark.parametrize("name", sorted(FRESH))
def test_blocks_that_cannot_start_equal_to_their_convolution(name):
    torch.manual_seed(0)
    model = three()
    with pytest.warns(FreshWeightsWarning, match=r"3 of 3 blocks start with new values"):
        out, report = untouched(repvgg.replace_convs, model, name)
    assert not report.is_exact
    assert all(entry.error is None and entry.fresh for entry in report.expanded)
    assert "new weights: " in str(report)
    assert "nan" not in json.dumps(report.to_dict())
    assert out(image()).shape == model(image()).shape
    assert all(tensor.isfinite().all() for tensor in out.parameters())


def test_convolutions_without_a_block_stay():
    torch.manual_seed(0)
    model = three()
    out, report = repvgg.replace_convs(model, "repmixer")
    assert [entry.name for entry in report.expanded] == ["2"]
    assert [(entry.name, "stride 1" in entry.reason) for entry in report.left] == [("0", True), ("4", True)]
    assert_same_outputs(model, out, image())
    with pytest.warns(NothingExpandedWarning, match="square kernels of 5, 7"):
        repvgg.replace_convs(model, "unireplk")


def test_large_kernels():
    torch.manual_seed(0)
    model = three(7)
    out, report = repvgg.replace_convs(model, "unireplk")
    assert report.is_exact
    assert_same_outputs(model, out, image(3, 19, 22))


@pytest.mark.parametrize(("name", "dtype"), [("dbb", torch.float32), ("acb", torch.bfloat16), ("orepa", torch.float16)])
def test_other_dtypes(name, dtype):
    torch.manual_seed(0)
    model = three().to(dtype)
    out, report = repvgg.replace_convs(model, name)
    assert {tensor.dtype for tensor in out.parameters()} == {dtype}
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert_same_outputs(model, out, image(dtype=dtype), tolerance=tolerance)
    assert report.is_exact


def test_where_selects_convolutions_of_a_network():
    torch.manual_seed(0)
    model = trained(torchvision.models.resnet18(num_classes=7))
    out, report = repvgg.replace_convs(model, "dbb", where=lambda name, conv: name.startswith("layer1"))
    assert [entry.name for entry in report.expanded] == [f"layer1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    assert all(entry.reason == "where= leaves it out" for entry in report.left)
    assert_same_outputs(model, out, image(3, 40, 33))


def test_calibration_on_data():
    """Exact blocks stay exact; blocks with new values are kept."""
    torch.manual_seed(0)
    model, data = vgg().double().eval(), image(3, 16, 16, batch=4)
    out, report = repvgg.replace_convs(model, "acb", data=data)
    assert report.is_exact
    assert_same_outputs(model, out, data)
    with pytest.warns(FreshWeightsWarning):
        _, report = repvgg.replace_convs(model, "dirac", data=data)
    assert len(report.expanded) == 3


def test_user_defined_block():
    model = three()
    out, report = repvgg.replace_convs(model, lambda conv: nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))
    assert report.is_exact
    assert_same_outputs(model, out, image())


def test_unknown_block_raises():
    with pytest.raises(UsageError, match="did you mean dbb"):
        repvgg.replace_convs(three(), "dbbb")
