"""Checkpoints of a run are written atomically, and no code in them runs."""

import json
import pickle
import re
import subprocess
from dataclasses import replace

import pytest
import torch

import repvgg.training.task as tasks
from repvgg.errors import CheckpointError, OutputError, TrainingError, UsageError
from repvgg.training import fit
from repvgg.training.checkpoint import RunPosition, read_position
from tests.training.helpers import CONFIG, fingerprint, opened, tiny

STEPWISE = replace(CONFIG, save_steps=1)
STEPS = 6  # per epoch


def saved_run(folder, config=STEPWISE, model=None, **more):
    model = tiny() if model is None else model
    fit(model, opened(config), config, folder=folder, progress=False, **more)
    return fingerprint(model)


def failing(at, monkeypatch, error):
    """Let the ``at``-th save fail in the middle of its file, as on a full disk."""
    left, original = at, torch.save

    def save(content, path):
        nonlocal left
        left -= 1
        if left:
            return original(content, path)
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)


@pytest.fixture(scope="module")
def uninterrupted():
    """The fingerprint of a run without checkpoints."""
    return saved_run(None, CONFIG)


FULL = [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:595] . file write")]


@pytest.mark.parametrize("error", FULL, ids=["written", "streamed"])
@pytest.mark.parametrize("at", [4, STEPS, STEPS + 3])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, uninterrupted, error, at):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        failing(at, patch, error)
        with pytest.raises(OutputError, match=r"last\.ckpt' could not be written") as caught:
            saved_run(folder)
    assert "\n" not in str(caught.value)
    assert "enforce fail" not in str(caught.value)
    done = divmod(at - 1, STEPS)
    assert read_position(folder / "last.ckpt") == (*done, 1)
    assert [path.name for path in folder.iterdir() if path.name != "tensorboard"] == ["last.ckpt"]
    assert saved_run(folder, resume=True) == uninterrupted


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 260 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=260k", "none", disk]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting needs privileges: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_file_system_that_is_full(small_disk, uninterrupted):
    config = replace(STEPWISE, epochs=2)
    left = iter(range(3))

    def fill(history, weights):
        """After the first epoch, leave less space than a checkpoint needs."""
        if next(left) == 0:
            taken = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file())
            (small_disk / "other").write_bytes(bytes(260 * 1024 - taken - 40_000))

    with pytest.raises(OutputError, match="could not be written, perhaps for lack of space"):
        saved_run(small_disk, config, on_epoch=fill)
    assert read_position(small_disk / "last.ckpt") == (0, STEPS - 1, 1)
    (small_disk / "other").unlink()
    assert saved_run(small_disk, config, resume=True) == uninterrupted


class Trap:
    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_code_in_a_checkpoint_runs(tmp_path):
    trap = Trap()
    trap.path = tmp_path / "sprung"
    saved_run(tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save(content | {"trap": trap}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError) as caught:
        saved_run(tmp_path, resume=True)
    assert re.fullmatch(r"'\S+last\.ckpt' is damaged or not the checkpoint of a run: [^\n]+\.", str(caught.value))
    assert not trap.path.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"half a file", pickle.dumps({"repvgg_place": 1}), json.dumps({"repvgg_place": {}}).encode()],
)
def test_damaged_files_are_rejected(tmp_path, content):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="remove it to start again"):
        saved_run(tmp_path, resume=True)


def test_checkpoints_of_other_programs_are_rejected(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="is damaged or not the checkpoint of a run"):
        read_position(tmp_path / "last.ckpt")


def stopped(folder, at):
    """Run until the ``at``-th batch."""
    left, original = at, tasks.ClassificationTask.training_step

    def step(self, batch, index):
        nonlocal left
        left -= 1
        if left == 0:
            raise InterruptedError
        return original(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.ClassificationTask, "training_step", step)
        with pytest.raises(InterruptedError):
            saved_run(folder)


def test_another_accumulation_in_the_middle_of_an_epoch_is_rejected(tmp_path):
    stopped(tmp_path, 5)
    assert read_position(tmp_path / "last.ckpt") == RunPosition(0, 4, 1)
    with pytest.raises(
        UsageError, match=r"with a gradient accumulation of 1, not 2: resume it with the same number of devices"
    ):
        saved_run(tmp_path, replace(STEPWISE, device_batch=8), resume=True)


def test_another_accumulation_after_an_epoch_is_fine(tmp_path):
    stopped(tmp_path, STEPS + 1)
    assert read_position(tmp_path / "last.ckpt") == RunPosition(1, 0, 1)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = tasks.ClassificationTask.training_step
        patch.setattr(
            tasks.ClassificationTask,
            "training_step",
            lambda self, batch, index: (seen.append((index, len(batch[1]))), original(self, batch, index))[1],
        )
        saved_run(tmp_path, replace(STEPWISE, device_batch=8), resume=True)
    assert seen == [(index, 8) for index in range(2 * STEPS)]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2 * STEPS


def test_weights_with_a_non_finite_loss_are_not_saved(tmp_path, monkeypatch):
    original, left = tasks.classification_loss, iter(range(100))

    def loss(*arguments):
        return original(*arguments) * (float("nan") if next(left) == 3 else 1.0)

    monkeypatch.setattr(tasks, "classification_loss", loss)
    with pytest.raises(TrainingError, match="The loss of epoch 1 is nan: take a lower learning rate"):
        saved_run(tmp_path)
    assert read_position(tmp_path / "last.ckpt") == (0, 3, 1)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
