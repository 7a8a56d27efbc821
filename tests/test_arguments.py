"""One sentence where something else than a model, or another shape, is given."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import repvgg
from repvgg import deploy, measure, models
from repvgg._arguments import check_shape
from repvgg.errors import UsageError

FUNCTIONS = {
    "is_plain": repvgg.is_plain,
    "expand": repvgg.expand,
    "replace_convs": lambda model: repvgg.replace_convs(model, "repvgg"),
    "insert_bn": lambda model: repvgg.insert_bn(model, torch.zeros(2, 3, 8, 8)),
    "trace": repvgg.trace,
    "equivalent_conv": repvgg.equivalent_conv,
    "count": measure.count,
    "walk": lambda model: measure.walk(model, torch.zeros(1, 3, 8, 8)),
    "profile": lambda model: measure.profile(model, torch.zeros(1, 3, 8, 8)),
    "export_onnx": lambda model: deploy.export_onnx(model, "a.onnx", (3, 8, 8)),
    "export_program": lambda model: deploy.export_program(model, "a.pt2", (3, 8, 8)),
    "load_weights": lambda model: models.load_weights(model, "a.pth"),
}
NO_MODELS = {
    "a path": ("a.safetensors", r"not the path 'a.safetensors': load it first, with repvgg.load\(PATH\).model"),
    "a Path": (Path("a.pth"), "not the path 'a.pth'"),
    "a class": (nn.ReLU, r"not the class ReLU: make a model of it first, ReLU\(…\)"),
    "a state dict": (nn.Linear(2, 2).state_dict(), "not a state dict: load it into a model first"),
    "a loaded file": (SimpleNamespace(model=nn.ReLU()), "not a SimpleNamespace: pass its .model"),
    "a function": (torch.relu, r"not a function \(relu\): wrap it in an nn.Module"),
    "nothing": (None, "not a value of type NoneType: pass an nn.Module"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("given", NO_MODELS)
def test_what_is_no_model(function, given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    value, text = NO_MODELS[given]
    with pytest.raises(UsageError, match=f"^{function} takes a model, {text}") as error:
        FUNCTIONS[function](value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "expand"])  # which reports them
def test_lazy_layers_without_shapes(function, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(UsageError, match=r"^'0' \(LazyConv2d\) has no shape yet: call the model on an image first\.$"):
        FUNCTIONS[function](model)
    with pytest.raises(UsageError, match="has no shape yet"):
        repvgg.verify(model, model, torch.zeros(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((3, 8), r"\(3, 8\)"),
        ((1, 3, 8, 8), r"\(1, 3, 8, 8\)"),
        ((3, 8, 0), r"\(3, 8, 0\)"),
        ((3, 8.0, 8), r"\(3, 8.0, 8\)"),
        ((3, True, 8), r"\(3, True, 8\)"),
        ("abc", "'abc'"),
        (224, "224"),
        (torch.zeros(1, 3), r"a tensor of shape \(1, 3\)"),
    ],
)
def test_wrong_shapes(shape, got, tmp_path):
    for call in (
        lambda: check_shape(shape, "(C, H, W)"),
        lambda: deploy.export_onnx(nn.ReLU(), tmp_path / "a.onnx", shape),
        lambda: deploy.export_program(nn.ReLU(), tmp_path / "a.pt2", shape),
    ):
        with pytest.raises(UsageError, match=rf"^input_shape must be \(C, H, W\), 3 positive integers, got {got}\.$"):
            call()


def test_right_shapes():
    assert check_shape([3, 8, 9], "(C, H, W)") == (3, 8, 9)
    assert check_shape(torch.zeros(3, 8, 9), "(C, H, W)") == (3, 8, 9)
