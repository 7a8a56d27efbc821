"""Models from any kind of name: registered architectures, source strings, checkpoints."""

import pytest
import torch
from torch import nn

from repvgg.errors import CheckpointError, SourceError, UnknownModelError, UsageError
from repvgg.measure import count
from repvgg.models import create_model, describe_model, named_model, resolve, save


@pytest.fixture
def checkpoint(tmp_path):
    model = create_model("repvgg_t0", 10, 1, plain=True)
    save(tmp_path / "net.safetensors", model, describe_model(model, "plain", input_size=28))
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("repvgg_t0", (3, 32, 32)),
        ("resnet18", (3, 224, 224)),
        ("efficientnet_b3", (3, 300, 300)),
        ("torchvision:squeezenet1_1", (3, 224, 224)),
    ],
)
def test_names_and_sources(name, shape, values):
    sourced = named_model(name, values=values)
    assert (sourced.source, sourced.input_shape) == (name, shape)
    assert not sourced.model.training
    assert {p.is_meta for p in (*sourced.model.parameters(), *sourced.model.buffers())} == {not values}


@pytest.mark.parametrize("values", [True, False])
def test_checkpoint(checkpoint, values):
    for name in (checkpoint, str(checkpoint)):
        sourced = named_model(name, values=values)
        assert (sourced.input_shape, sourced.weights) == ((1, 28, 28), "from net.safetensors")
        assert sourced.model.num_classes == 10
        assert next(sourced.model.parameters()).is_meta is not values


def test_python_file(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Conv2d(3, 4, 3)\n")
    sourced = named_model(f"{tmp_path}/net.py:make", values=False)
    assert isinstance(sourced.model, nn.Conv2d)
    assert sourced.model.weight.is_meta


def test_registered_name_precedes_file_and_file_precedes_source(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repvgg_t0").write_text("no checkpoint")
    assert named_model("repvgg_t0").weights == "random"
    (tmp_path / "timm:resnet18").write_bytes(checkpoint.read_bytes())
    assert named_model("timm:resnet18").input_shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("repvgg_a00", UnknownModelError, "did you mean repvgg_a0"),
        ("resnet19", UnknownModelError, "did you mean resnet1"),
        ("xyzzy", UnknownModelError, "use a name from 'repvgg list'"),
        ("missing.safetensors", CheckpointError, "There is no file"),
        ("keras:vgg", SourceError, "neither a Python file nor a collection"),
    ],
)
def test_names_of_no_model(name, error, text):
    for values in (True, False):
        with pytest.raises(error, match=text):
            named_model(name, values=values)


def test_constructor_that_computes_with_values_on_meta():
    """torchvision's RegNets compute their widths with tensors."""
    model = resolve("torchvision:regnet_x_400mf", values=False).model
    assert all(p.is_meta for p in model.parameters())
    with_values = resolve("torchvision:regnet_x_400mf").model
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in with_values.state_dict().items()
    }


@pytest.mark.parametrize("name", ["mobileone_s0", "mobilenet_v3_large", "repvgg_a0"])
def test_counts_are_equal_on_meta(name):
    shape = (1, 3, 64, 64)
    assert count(named_model(name, values=False).model, shape) == count(named_model(name).model, shape)


def test_weights_need_values(tmp_path):
    torch.save({}, tmp_path / "run.pt")
    with pytest.raises(UsageError, match="has no values: build it with values"):
        resolve("repvgg:repvgg_t0", weights=tmp_path / "run.pt", values=False)
