import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import is_plain, load, reparameterize
from repvgg.models import save


def same_function(path, model):
    """The checkpoint at ``path`` is plain and equal to ``model``."""
    loaded = load(path)
    assert loaded.metadata.form == "plain"
    assert is_plain(loaded.model)
    images = torch.randn(3, 1, 17, 19, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(loaded.model(images), model(images), rtol=1e-4, atol=1e-5)
    return loaded.metadata


def test_converts_and_says_what_it_did(repvgg, files, tmp_path):
    target = tmp_path / "plain.safetensors"
    outcome = repvgg("convert", files.train, target)
    assert (outcome.code, outcome.err) == (0, "")
    _, _, *regions, folded, equal, wrote = outcome.out.splitlines()
    assert len(regions) == 7
    assert regions[0].split("  ")[0] == "stem.conv"
    assert "3x3 Conv2d + 3 x BatchNorm2d + 1x1 PointwiseConv2d + 2 x add" in regions[2]
    assert "3x3 conv 32→32" in regions[2]
    assert folded == "7 regions folded; 203,050 → 181,546 parameters"
    assert equal.startswith("plain form is equal: relative error ")
    assert "; 6 of 6 predictions agree, on images of 16x16, " in equal
    assert wrote == f"wrote {target}: repvgg_t0, plain form, weights and header, read back bit for bit"
    about = same_function(target, files.model)
    assert about == replace(load(files.train).metadata, form="plain")


def test_paths_stay_whole_in_a_narrow_terminal(repvgg, files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    target = tmp_path / f"{'x' * 100}.safetensors"
    assert f"wrote {target}: " in repvgg("convert", files.train, target).out


def test_a_file_that_differs_from_the_model_is_not_kept(refused, files, tmp_path, monkeypatch):
    def damaged(path, model, metadata):
        with torch.no_grad():
            next(iter(model.parameters())).add_(1)
            save(path, model, metadata)
            next(iter(model.parameters())).sub_(1)

    monkeypatch.setattr("repvgg.models.save", damaged)
    text = refused("convert", files.train, tmp_path / "plain.safetensors")
    assert "The written file differs from the model" in text


def test_model_of_the_hub_has_to_be_the_named_one(refused, files, tmp_path, monkeypatch):
    monkeypatch.setattr("repvgg.models.from_pretrained", lambda name: load(files.train))
    text = refused("convert", "hub:owner/name", tmp_path / "plain.safetensors", "--model", "repvgg_a0")
    assert "'hub:owner/name' is a repvgg_t0, not a repvgg_a0" in text


def test_replaces_only_on_request(repvgg, refused, files, tmp_path):
    target = tmp_path / "plain.safetensors"
    target.write_text("precious")
    assert "exists" in refused("convert", files.train, target)
    assert repvgg("convert", files.train, target, "--overwrite").code == 0
    same_function(target, files.model)
    assert os.listdir(tmp_path) == ["plain.safetensors"]


def test_never_replaces_its_source(refused, files, tmp_path):
    source = tmp_path / "train.safetensors"
    source.write_bytes(files.train.read_bytes())
    assert "would replace the trained checkpoint" in refused("convert", source, source, "--overwrite")


WRAPPINGS = {
    "bare": lambda tensors: tensors,
    "module": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "model": lambda tensors: {f"model.{name}": tensor for name, tensor in tensors.items()},
    "compiled": lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "wrapped": lambda tensors: {"model": tensors, "epoch": 3},
    "lightning": lambda tensors: {
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "pytorch-lightning_version": "2.6",
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_torch_files(repvgg, files, tmp_path, wrapping):
    source, target = tmp_path / ("run.ckpt" if wrapping == "lightning" else "run.pt"), tmp_path / "plain.safetensors"
    torch.save(WRAPPINGS[wrapping](files.model.state_dict()), source)
    outcome = repvgg("convert", source, target, "--model", "repvgg_t0")
    assert (outcome.code, outcome.err) == (0, "")
    same_function(target, files.model)


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", ["torch", "legacy", "pickle"])
def test_runs_nothing_that_is_in_a_file(refused, files, tmp_path, write):
    source, effect = tmp_path / "run.pt", tmp_path / "effect"
    content = {**files.model.state_dict(), "payload": Payload(effect)}
    if write == "pickle":
        source.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=write == "torch")
    pickle.loads(pickle.dumps(Payload(effect)))
    assert effect.exists()  # so it would
    effect.unlink()
    assert str(source) in refused("convert", source, tmp_path / "plain.safetensors")
    assert not effect.exists()


def test_a_whole_model_in_a_torch_file_is_refused_with_advice(refused, files, tmp_path):
    torch.save(files.model, tmp_path / "model.pt")
    text = refused("convert", tmp_path / "model.pt", tmp_path / "plain.safetensors")
    assert "would run code when it is read; save its state_dict alone" in text


def write_bytes(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder, files: folder / "nothing.safetensors", "There is no file at"),
        (lambda folder, files: folder, "There is a folder at"),
        (lambda folder, files: folder / ("x" * 300), "x" * 300),
        (lambda folder, files: write_bytes(folder / "notes.txt", b"some words, no weights"), "not a checkpoint"),
        (lambda folder, files: write_bytes(folder / "empty.safetensors", b""), "not a checkpoint"),
        (lambda folder, files: write_bytes(folder / "a", files.train.read_bytes()[:-1000]), "is damaged"),
        (lambda folder, files: write_bytes(folder / "a", files.train.read_bytes()[:100]), "is damaged"),
        (lambda folder, files: files.plain, "is in the plain form already"),
    ],
)
def test_sources_that_are_no_trained_checkpoint(refused, files, tmp_path, make, text):
    assert text in refused("convert", make(tmp_path, files), tmp_path / "plain.safetensors")


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, [1, 2], {"stem.weight": torch.zeros(2)}])
def test_torch_files_without_a_model(refused, tmp_path, content):
    torch.save(content, tmp_path / "run.pt")
    assert "run.pt' holds no" in refused("convert", tmp_path / "run.pt", tmp_path / "plain.safetensors")


def test_checkpoint_of_another_model(refused, files, tmp_path):
    target = tmp_path / "plain.safetensors"
    text = refused("convert", files.train, target, "--model", "repvgg_a0")
    assert "is a checkpoint of repvgg_t0, not of repvgg_a0" in text
    assert "did you mean repvgg_t1" in refused("convert", files.train, target, "--model", "repvgg_t11")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused, files, tmp_path, value):
    source = tmp_path / "run.pt"
    tensors = {name: tensor.clone() for name, tensor in files.model.state_dict().items()}
    tensors["stages.0.0.conv.dense.bn.weight"][3] = value
    torch.save(tensors, source)
    text = refused("convert", source, tmp_path / "plain.safetensors")
    assert "not finite, in 'stages.0.0.conv.dense.bn.weight' first" in text


def test_targets_that_cannot_be(refused, files, tmp_path):
    assert ".safetensors" in refused("convert", files.train, tmp_path / "plain.pt")
    assert "There is no folder" in refused("convert", files.train, tmp_path / "missing" / "plain.safetensors")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "is a folder" in refused("convert", files.train, folder, "--overwrite")
    name = "x" * 300 + ".safetensors"
    assert name in refused("convert", files.train, tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_that_is_read_only(refused, files, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "could not be written: Permission denied" in refused("convert", files.train, folder / "plain.safetensors")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
def test_a_file_system_that_takes_no_files(refused, files):
    assert "could not be written" in refused("convert", files.train, "/proc/plain.safetensors")


def test_what_is_not_equal_is_not_written(refused, files, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        plain, report = reparameterize(*args, **kwargs)
        with torch.no_grad():
            next(m for m in plain.modules() if isinstance(m, nn.Conv2d)).bias[0] += 0.01
        return plain, report

    monkeypatch.setattr("repvgg.collapse.reparameterize", wrong)
    text = refused("convert", files.train, tmp_path / "plain.safetensors")
    assert "is not equal to the reference" in text
    assert "stem.conv" in text


def test_weights_of_several_types(refused, files, tmp_path):
    tensors = dict(files.model.state_dict())
    tensors["head.bias"] = tensors["head.bias"].half()
    torch.save(tensors, tmp_path / "run.pt")
    text = refused("convert", tmp_path / "run.pt", tmp_path / "plain.safetensors")
    assert "of several types, float16 and float32" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(repvgg, files, tmp_path, dtype):
    source, target = tmp_path / "train.safetensors", tmp_path / "plain.safetensors"
    loaded = load(files.train)
    save(source, loaded.model.to(dtype), loaded.metadata)
    assert repvgg("convert", source, target).code == 0
    assert {tensor.dtype for tensor in load(target).model.state_dict().values()} == {dtype}
