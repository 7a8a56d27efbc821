import errno
import os
import stat
import zipfile
from dataclasses import replace

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from repvgg.checkpoints import Metadata, read_checkpoint, save_checkpoint
from repvgg.errors import CheckpointError, OutputError, OutputExistsError, UsageError

ABOUT = Metadata("repvgg_t0", "train", num_classes=2, in_channels=3, input_size=32)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "kernel": torch.randn(4, 3, 2, 2, generator=generator).to(dtype),
        "scalar": torch.randn((), generator=generator).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "count": torch.tensor(7),
    }


def read_back(path, **given):
    save_checkpoint(path, given, ABOUT)
    return read_checkpoint(path).tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    about = replace(
        ABOUT,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 2, 3.5),
        classes=("cat", "Katze 猫"),
        recipe={"name": "x", "optim": {"lr": 0.1}, "steps": [1, 2]},
        metrics={"top1": 0.75, "epochs": 3},
        version="0.1.0",
    )
    assert save_checkpoint(path, tensors(dtype), about) == path
    checkpoint = read_checkpoint(path)
    assert (checkpoint.path, checkpoint.metadata) == (path, about)
    assert_close(checkpoint.tensors, tensors(dtype), rtol=0, atol=0)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(8)]  # a hash map would give different orders
    for file in files:
        save_checkpoint(file, tensors(), ABOUT)
    assert len({file.read_bytes() for file in files}) == 1


def test_strided_and_shared_tensors(tmp_path):
    base = torch.randn(4, 3, 5, 5)
    given = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 1),
        "strided": base[:, :, ::2],
        "slice": base[1:3],
        "same": base,
        "again": base,
        "expanded": torch.ones(1).expand(3),
        "with_gradient": torch.ones(2, requires_grad=True),
    }
    before = {name: tensor.stride() for name, tensor in given.items()}
    found = read_back(tmp_path / "model.safetensors", **given)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in found.values())
    assert_close(found, {name: tensor.detach().contiguous() for name, tensor in given.items()}, rtol=0, atol=0)
    assert {name: tensor.stride() for name, tensor in given.items()} == before


def test_files_get_the_usual_permissions(tmp_path):
    """safetensors itself writes files that only their owner may read."""
    path, new = tmp_path / "model.safetensors", tmp_path / "new"
    new.touch()
    save_checkpoint(path, tensors(), ABOUT)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(new.stat().st_mode)


def test_safetensors_can_read_it(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", tensors(), ABOUT)
    assert_close(load_file(tmp_path / "model.safetensors"), tensors())


def test_a_foreign_file_has_no_metadata(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", {"format": "pt", "author": "someone"})
    assert read_checkpoint(tmp_path / "model.safetensors").metadata is None


FULL = OSError(errno.ENOSPC, "No space left on device")
RUST_FULL = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "failure"),
    [
        *(("safetensors.torch.save_file", failure) for failure in (FULL, RUST_FULL, KeyboardInterrupt())),
        *(("os.fsync", failure) for failure in (FULL, KeyboardInterrupt())),
        *(("pathlib.Path.replace", failure) for failure in (FULL, KeyboardInterrupt())),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_the_folder_unchanged(tmp_path, monkeypatch, place, failure, old):
    def fail(*arguments, **keywords):
        raise failure

    path = tmp_path / "model.safetensors"
    if old:
        path.write_text("precious")
    monkeypatch.setattr(place, fail)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OutputError
    with pytest.raises(expected, match="No space left" if expected is OutputError else None):
        save_checkpoint(path, tensors(), ABOUT, overwrite=True)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({path.name: "precious"} if old else {})


def test_a_write_refused_by_the_kernel(tmp_path):
    """A limit on the size of files has the effect of a full disk, without patching anything."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tensors(), ABOUT)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OutputError, match=r"could not be written: .*File too large"):
            save_checkpoint(path, {"large": torch.zeros(100_000)}, ABOUT, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_overwrites_only_on_request(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tensors(), ABOUT)
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        save_checkpoint(path, {"other": torch.zeros(1)}, ABOUT)
    assert path.read_bytes() == before
    save_checkpoint(path, {"other": torch.zeros(1)}, ABOUT, overwrite=True)
    assert list(read_checkpoint(path).tensors) == ["other"]


@pytest.mark.parametrize(
    "invalid", [{"classes": ("only one",)}, {"mean": (0.5,)}, {"input_size": 0}, {"form": "deploy"}, {"metrics": [1]}]
)
def test_invalid_fields_are_not_written(tmp_path, invalid):
    with pytest.raises(UsageError, match=next(iter(invalid))):
        save_checkpoint(tmp_path / "model.safetensors", tensors(), replace(ABOUT, **invalid))
    assert list(tmp_path.iterdir()) == []


def test_sparse_and_meta_tensors_are_refused(tmp_path):
    sparse = torch.sparse_coo_tensor([[0]], [1.0], (2,), check_invariants=True)
    for odd in (sparse, torch.zeros(2, device="meta")):
        torch.save({"weight": odd}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match="not plain numbers, in 'weight' first"):
            read_checkpoint(tmp_path / "odd.pt")


def test_nested_wrappers(tmp_path):
    endless = {"epoch": 3}
    endless["state_dict"] = endless
    torch.save(endless, tmp_path / "endless.pt")
    with pytest.raises(CheckpointError, match="holds no named weights"):
        read_checkpoint(tmp_path / "endless.pt")
    torch.save({"state_dict": {"model": {"module.model.a": torch.ones(1)}}}, tmp_path / "deep.pt")
    assert_close(read_checkpoint(tmp_path / "deep.pt").tensors, {"a": torch.ones(1)})


def test_a_prefix_of_some_names_only_stays(tmp_path):
    given = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(given, tmp_path / "run.pt")
    assert_close(read_checkpoint(tmp_path / "run.pt").tensors, given)


def test_torchscript_archives_are_refused_quietly(tmp_path, recwarn):
    archive = tmp_path / "script.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("script/constants.pkl", b"")
        file.writestr("script/data.pkl", b"")
        file.writestr("script/version", b"3")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(archive)
    assert len(recwarn) == 0


def test_what_is_no_path():
    with pytest.raises(UsageError, match="read from a path, not from a value of type dict"):
        read_checkpoint({"weight": torch.ones(1)})
