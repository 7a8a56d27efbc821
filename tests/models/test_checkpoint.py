import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import create_model, load, reparameterize
from repvgg.checkpoints import save_checkpoint
from repvgg.errors import CheckpointError, OutputExistsError, UnknownModelError
from repvgg.models import SPECS, describe_model, save
from repvgg.models.infer_spec import infer_spec
from tests.bn_statistics import trained_like

FORMS = ["train", "plain"]


def build(name="repvgg_t0", form="train", classes=10, channels=1):
    torch.manual_seed(0)
    return trained_like(create_model(name, classes, channels, plain=form == "plain"))


def saved(path, model, form, **about):
    save(path, model, describe_model(model, form, **about))
    return path


def without_header(path, tensors):
    torch.save(dict(tensors), path)
    return path


def rejection(path, model=None):
    """Return the message with which a file is rejected: one sentence that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path, model)
    text = str(caught.value)
    assert repr(str(path)) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.input_size == 32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, name, form, dtype):
    model = build(name, form).to(dtype)
    path = saved(tmp_path / "a.safetensors", model, form, classes=tuple("0123456789"), metrics={"top1": 0.5})
    loaded = load(path, name)
    assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert list(loaded.model.state_dict()) == list(model.state_dict())
    assert (loaded.metadata.model, loaded.metadata.form, loaded.metadata.metrics) == (name, form, {"top1": 0.5})
    assert loaded.metadata.classes == tuple("0123456789")
    assert not any(module.training for module in loaded.model.modules())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_loaded_model_is_the_same_function(tmp_path):
    model = build()
    loaded = load(saved(tmp_path / "a.safetensors", model, "train")).model
    images = torch.randn(2, 1, 17, 15)
    with torch.no_grad():
        assert_close(loaded(images), model(images), rtol=0, atol=0)


def test_header_describes_the_model(tmp_path):
    about = load(saved(tmp_path / "a.safetensors", build(classes=3, channels=2), "train")).metadata
    assert (about.num_classes, about.in_channels, about.input_size) == (3, 2, 32)


@pytest.mark.parametrize("change", [lambda m: m.to(memory_format=torch.channels_last), nn.Module.train])
def test_memory_format_and_mode_do_not_matter(tmp_path, change):
    model = build()
    before = copy.deepcopy(model.state_dict())
    path = saved(tmp_path / "a.safetensors", change(model), "train")
    assert_close(load(path).model.state_dict(), before, rtol=0, atol=0)


def test_loaded_model_can_be_trained_and_collapsed(tmp_path):
    model = load(saved(tmp_path / "a.safetensors", build(), "train")).model
    plain, _ = reparameterize(model)
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("classes", "channels"), [(10, 1), (3, 3), (1000, 3)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["repvgg_t0", "repvgg_t1"])
def test_file_without_header_is_recognized(tmp_path, name, form, classes, channels):
    model = build(name, form, classes, channels)
    loaded = load(without_header(tmp_path / "run.pt", model.state_dict()))
    assert loaded.metadata == describe_model(model, form)
    assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def shapes_of(spec, form):
    with torch.device("meta"):
        model = create_model(spec, 11, 4, plain=form == "plain")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECS)
def test_every_model_is_identified_by_its_shapes(name, form):
    """No two registered models share all names and shapes."""
    found = infer_spec(shapes_of(name, form), None)
    assert (found.spec, found.form, found.num_classes, found.in_channels) == (SPECS[name], form, 11, 4)
    assert found.notes == ()


def set_tensor(tensors, name, value):
    return {**tensors, name: value}


def drop(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: drop(t, "head.bias"), "but 1 key is missing ('head.bias')."),
        (lambda t: drop(t, "head.bias", "head.weight"), "but 2 keys are missing ('head.weight', 'head.bias')."),
        (lambda t: set_tensor(t, "extra", torch.zeros(1)), "but 1 key is unexpected ('extra')."),
        (
            lambda t: set_tensor(t, "head.bias", torch.zeros(9)),
            "but 1 key has another shape ('head.bias' (9,) instead of (10,)).",
        ),
        (
            lambda t: drop(set_tensor(t, "extra", torch.zeros(1)), "head.bias"),
            "missing ('head.bias'); 1 key is unexpected ('extra')",
        ),
        (lambda t: set_tensor(t, "head.bias", torch.zeros(10).half()), "of several types, float16 and float32."),
        (lambda t: {name: tensor.int() for name, tensor in t.items()}, "of type int32."),
        (lambda t: {}, "keys are missing ("),
    ],
)
def test_tensors_that_do_not_fit_the_header(tmp_path, edit, text):
    model = build()
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, edit(model.state_dict()), describe_model(model, "train"))
    found = rejection(path)
    assert "says it is repvgg_t0 in the train form" in found
    assert text in found


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"form": "plain"}, "says it is repvgg_t0 in the plain form, but"),
        ({"model": "repvgg_t1"}, "says it is repvgg_t1 in the train form, but"),
        ({"num_classes": 9}, "instead of (9,"),
        ({"num_classes": 2**31 - 1}, "instead of"),
        ({"in_channels": 2**31 - 1}, "instead of"),
        ({"model": "repvgg_z9"}, "is of a model that is not known here"),
    ],
)
def test_headers_that_do_not_fit_the_tensors(tmp_path, about, text):
    model = build()
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, model.state_dict(), replace(describe_model(model, "train"), **about))
    assert text in rejection(path)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: drop(t, "head.bias"), "looks like repvgg_t0 in the train form, but 1 key is missing ('head.bias')."),
        (lambda t: set_tensor(t, "extra", torch.zeros(1)), "but 1 key is unexpected ('extra')."),
        (
            lambda t: t | {f"extra{number}.weight": torch.zeros(1) for number in range(3)},
            "but 3 keys are unexpected ('extra0.weight', 'extra1.weight', …).",
        ),
        (lambda t: drop(t, "head.weight"), "holds no RepVGG"),
        (lambda t: set_tensor(t, "head.weight", torch.zeros(())), "holds no RepVGG"),
        (lambda t: set_tensor(t, "head.weight", torch.zeros(0, 128)), "holds no RepVGG"),
        (lambda t: {f"other.{name}": tensor for name, tensor in t.items()}, "holds no RepVGG"),
        (lambda t: {name: tensor.long() for name, tensor in t.items()}, "of type int64"),
    ],
)
def test_file_without_header_that_is_no_model(tmp_path, edit, text):
    assert text in rejection(without_header(tmp_path / "run.pt", edit(build().state_dict())))


def test_requested_model_name(tmp_path):
    path = saved(tmp_path / "a.safetensors", build(), "train")
    assert "is a checkpoint of repvgg_t0, not of repvgg_t1" in rejection(path, "repvgg_t1")
    assert "not of repvgg_t1" in rejection(without_header(tmp_path / "run.pt", build().state_dict()), "repvgg_t1")
    with pytest.raises(UnknownModelError, match="repvgg_t0"):
        load(tmp_path / "missing", "repvgg_t00")


def test_save_overwrites_only_on_request(tmp_path):
    path, model = saved(tmp_path / "a.safetensors", build(), "train"), build(classes=3)
    with pytest.raises(OutputExistsError):
        save(path, model, describe_model(model, "train"))
    assert load(path).metadata.num_classes == 10
    save(path, model, describe_model(model, "train"), overwrite=True)
    assert load(path).metadata.num_classes == 3
