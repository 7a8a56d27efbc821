"""Checkpoints of a run: written wholly or not at all, after every epoch, every so many steps, and before SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from repvgg.errors import CheckpointError, OutputError
from repvgg.files import whole_or_nothing

LAST = "last.ckpt"
_PLACE = "repvgg_place"


class Terminated(Exception):  # noqa: N818 - nothing went wrong
    """SIGTERM came, and the run has saved where it stands."""


@final
class WholeFiles(TorchCheckpointIO):
    """Lightning's files, written under another name first and renamed when they are whole and on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint``; what was at ``path`` stays until the new one is whole.

        Raises:
            OutputError: it cannot be written, a full disk for one.
        """
        with whole_or_nothing(path, overwrite=True) as part:
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:  # what torch makes of a failed write
                raise OutputError(
                    f"{str(path)!r} could not be written, the checkpoint before it is whole: {_first_line(error)}."
                ) from error


@final
class Saver(Checkpoint):
    """Keeps ``last.ckpt`` in a folder, from which a run goes on bit for bit.

    Args:
        folder: where it is kept.
        every: steps of the optimizer after which it is written too; 0 for none.
        on_saved: called after each epoch's file is written, on every process.
    """

    def __init__(self, folder: Path, every: int = 0, on_saved: Callable[[], None] | None = None) -> None:
        self.path = folder / LAST
        self._every = every
        self._on_saved = on_saved
        self._saved_step = -1
        self._stop = False
        self._place = {"epoch": 0, "batches": 0}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM over from Lightning, whose way out skips the save; it puts back what was there before it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._asked_to_stop)

    def _asked_to_stop(self, *_: Any) -> None:
        self._stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or if the run is asked to stop; the last step of an epoch leaves that to its end."""
        stop = self._agreed(trainer)
        if trainer.is_last_batch:
            return
        step = trainer.global_step
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = self._every and stepped and step % self._every == 0 and step != self._saved_step
        if stepped and (stop or due):
            self._save(trainer, trainer.current_epoch, batch_idx + 1)
        if stepped and stop:
            raise Terminated

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the epoch and its validation."""
        self._save(trainer, trainer.current_epoch + 1, 0)
        if self._on_saved is not None:
            self._on_saved()
        if self._agreed(trainer) and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise Terminated

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down where the data go on."""
        checkpoint[_PLACE] = dict(self._place)

    def _save(self, trainer: L.Trainer, epoch: int, batches: int) -> None:
        self._place = {"epoch": epoch, "batches": batches}
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)

    def _agreed(self, trainer: L.Trainer) -> bool:
        """If any process is asked to stop: all have to save together."""
        if trainer.world_size == 1:
            return self._stop
        return bool(trainer.strategy.reduce_boolean_decision(self._stop, all=False))


def place_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """The epoch that a saved run goes on with, and how many of its batches are done.

    Raises:
        CheckpointError: the file is damaged, or is no saved run.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        place = content[_PLACE]
        return int(place["epoch"]), int(place["batches"])
    except Exception as error:
        raise CheckpointError(f"{str(path)!r} is no saved run, or is damaged: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
