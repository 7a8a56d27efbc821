"""Models from source strings: what they build, and the message of each failure."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import create_model
from repvgg.errors import CheckpointError, MissingDependencyError, SourceError, UnknownModelError, UsageError
from repvgg.models import load_weights, resolve
from tests.bn_statistics import trained_like

FILE = """
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

import neighbour_of_net


@dataclass
class Config:
    width: int = neighbour_of_net.WIDTH


def make_net():
    from neighbour_of_net import WIDTH

    return nn.Sequential(nn.Conv2d(3, Config().width, 3), nn.BatchNorm2d(WIDTH)).train()


class Head(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)


ready = nn.ReLU()
number = 5


def makes_nothing():
    return None


def needs_more(depth):
    return nn.ReLU()


def breaks():
    return nn.Linear(2, "three")


def leaves():
    raise SystemExit(3)


def lazy():
    return nn.LazyLinear(3)


def wrapped():
    return nn.DataParallel(make_net())
"""


@pytest.fixture
def file(tmp_path):
    """Write a file and a neighbour that it imports; afterwards check that the import left no files."""
    (tmp_path / "neighbour_of_net.py").write_text("WIDTH = 4\n")
    path = tmp_path / "net.py"
    path.write_text(FILE)
    before = list(sys.path)
    yield path
    assert sys.path == before
    assert not list(tmp_path.rglob("__pycache__"))
    sys.modules.pop("neighbour_of_net", None)


def test_function_in_file(file):
    sourced = resolve(f"{file}:make_net")
    assert isinstance(sourced.model[0], nn.Conv2d)
    assert sourced.model[0].out_channels == 4
    assert not any(module.training for module in sourced.model.modules())
    assert sourced.input_shape == (3, 224, 224)
    assert sourced.weights == "set by make_net(), random unless it loads some"
    assert resolve(f"{file}:make_net", in_channels=1).input_shape == (1, 224, 224)


def test_class_and_module_in_file(file):
    assert resolve(f"{file}:Head").model.out_features == 3
    assert isinstance(resolve(f"{file}:ready").model, nn.ReLU)


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("make_nett", "has no 'make_nett' in it: did you mean make_net"),
        ("number", "'number' in .* is of type int, not a function or a class"),
        ("makes_nothing", r"makes_nothing\(\) of .* returned a value of type NoneType, not an nn.Module"),
        ("needs_more", r"needs_more\(\) of .* failed: TypeError: .*'depth'"),
        ("breaks", r"breaks\(\) of .* failed, at .*net.py:40: TypeError"),
        ("leaves", r"failed, at .*net.py:44: SystemExit: 3"),
        ("lazy", "has no values in 'weight' yet: run the model once"),
    ],
)
def test_factories_that_fail(file, factory, text):
    with pytest.raises(SourceError, match=text):
        resolve(f"{file}:{factory}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("import torch\nx = (1,\n", r"cannot be imported, at .*broken.py:2: SyntaxError: '\(' was never closed"),
        ("import torch\n\nx = torch.zeros(-1)\n", r"cannot be imported, at .*broken.py:3: RuntimeError: "),
        ("import no_such_module_xyz\n", r"at .*broken.py:1: ModuleNotFoundError: No module named 'no_such_module_xyz'"),
        ("from . import x\n", r"at .*broken.py:1: ImportError: attempted relative import"),
        ("raise ValueError\n", r"at .*broken.py:1: ValueError$"),
        ("\0", "cannot be imported.*null bytes"),
    ],
)
def test_files_that_cannot_be_imported(tmp_path, content, text):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(SourceError, match=text):
        resolve(f"{tmp_path}/broken.py:make")
    assert "repvgg_source_broken" not in sys.modules


def test_keyboard_interrupt_passes_through(tmp_path):
    (tmp_path / "long.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        resolve(f"{tmp_path}/long.py:make")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "does not say where the model comes from: timm:NAME, torchvision:NAME"),
        ("repvgg_t0", r"did you mean repvgg:repvgg_t0\?"),
        ("net.py", "name the function in the file, as in net.py:make_model"),
        ("net.py:", "does not say where"),
        ("net.py:make model", "does not say where"),
        ("timm:", "does not say where"),
        ("keras:vgg", "'keras' is neither a Python file nor a collection of models"),
        ("none.py:make", "There is no file at 'none.py'"),
        (f"{'x' * 300}.py:make", "x" * 300),
    ],
)
def test_invalid_source_strings(source, text):
    with pytest.raises(SourceError, match=text):
        resolve(source)


def test_folder_is_no_source(tmp_path):
    (tmp_path / "net.py").mkdir()
    with pytest.raises(SourceError, match="There is a folder at"):
        resolve(f"{tmp_path}/net.py:make")


def test_repvgg():
    sourced = resolve("repvgg:repvgg_t0", num_classes=7, in_channels=1)
    assert (sourced.model.num_classes, sourced.input_shape, sourced.weights) == (7, (1, 32, 32), "random")
    with pytest.raises(UnknownModelError, match="did you mean repvgg_t0"):
        resolve("repvgg:repvgg_tt0")


def test_torchvision():
    sourced = resolve("torchvision:squeezenet1_1", num_classes=7)
    assert sourced.input_shape == (3, 224, 224)
    assert sourced.model.num_classes == 7
    with pytest.raises(UnknownModelError, match="torchvision has no model 'resnet181': did you mean resnet18"):
        resolve("torchvision:resnet181")
    with pytest.raises(UnknownModelError, match="listed by"):
        resolve("torchvision:qqqqqqqq")


def test_nothing_is_downloaded(monkeypatch):
    """The backbone of a segmentation model downloads weights by default."""

    def refuse(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    assert resolve("torchvision:lraspp_mobilenet_v3_large").weights == "random"


def test_timm():
    pytest.importorskip("timm")
    sourced = resolve("timm:test_efficientnet.r160_in1k", num_classes=7, in_channels=1)
    assert (sourced.model.num_classes, sourced.input_shape) == (7, (1, 160, 160))
    with pytest.raises(UnknownModelError, match="timm has no model 'mobileone_s00': did you mean mobileone_s0"):
        resolve("timm:mobileone_s00")
    with pytest.raises(UnknownModelError, match="timm has no model 'hf-hub:timm/resnet18'"):
        resolve("timm:hf-hub:timm/resnet18")
    with pytest.raises(SourceError, match=r"timm:resnet18\.zz cannot be built: Invalid pretrained tag"):
        resolve("timm:resnet18.zz")


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'repvgg\[timm\]'"):
        resolve("timm:resnet18")


def test_invalid_number_of_classes(file):
    with pytest.raises(UsageError, match="at least one class"):
        resolve("repvgg:repvgg_t0", num_classes=0)
    with pytest.raises(UsageError, match=r"which make_net\(\) returns"):
        resolve(f"{file}:make_net", num_classes=3)


WRAPPINGS = {
    "bare": lambda tensors: tensors,
    "module": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "compiled": lambda tensors: {"model": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}},
    "averaged": lambda tensors: {
        "state_dict": {name: tensor + 1 for name, tensor in tensors.items()},
        "state_dict_ema": tensors,
    },
    "old": lambda tensors: {name: tensor for name, tensor in tensors.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("factory", ["make_net", "wrapped"])
def test_weights(file, tmp_path, wrapping, factory):
    tensors = trained_like(resolve(f"{file}:make_net").model).state_dict()
    torch.save(WRAPPINGS[wrapping](tensors), tmp_path / "run.pt")
    sourced = resolve(f"{file}:{factory}", weights=tmp_path / "run.pt")
    model = sourced.model.module if factory == "wrapped" else sourced.model
    assert_close(model.state_dict(), tensors, rtol=0, atol=0)
    assert sourced.weights == "from run.pt"


def test_model_whose_names_look_like_a_wrapper(tmp_path):
    """All of its names begin with ``model.``, which is not the prefix of a wrapper here."""
    model = nn.Sequential()
    model.add_module("model", trained_like(create_model("repvgg_t0")))
    torch.save(model.state_dict(), tmp_path / "run.pt")
    other = nn.Sequential()
    other.add_module("model", create_model("repvgg_t0"))
    load_weights(other, tmp_path / "run.pt")
    assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    model = nn.Conv2d(1, 2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"weight": torch.zeros(2, 1, 3, 3), "bias": torch.zeros(3)}, tmp_path / "run.pt")
    text = r"do not fit a conv: 1 key has another shape \('bias' \(3,\) instead of \(2,\)\)\.$"
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, tmp_path / "run.pt", "a conv")
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
