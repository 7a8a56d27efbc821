"""Checkpoints of a run: written wholly or not at all, after every epoch, every so many steps, and before SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple, final

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from repvgg._files import atomic_write
from repvgg.errors import CheckpointError, OutputError
from repvgg.training.task import ClassificationTask

LAST = "last.ckpt"
_PLACE = "repvgg_place"


class Place(NamedTuple):
    """Where the data of a saved run go on.

    Attributes:
        epoch: counted from 0.
        batches: of this epoch, that are done.
        accumulation: batches a step of the optimizer, on each device.
    """

    epoch: int
    batches: int
    accumulation: int


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
        with atomic_write(path, overwrite=True) as part:
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:  # what torch makes of a failed write
                raise OutputError(
                    f"{str(path)!r} could not be written, perhaps for lack of space: what was there before it is "
                    "whole, and the run goes on from it when it is resumed."
                ) from error


@final
class Saver(Checkpoint):
    """Keeps ``last.ckpt`` in a folder, from which a run goes on bit for bit.

    Args:
        folder: where it is kept.
        every: steps of the optimizer after which it is written too; 0 for none.
    """

    def __init__(self, folder: Path, every: int = 0) -> None:
        self.path = folder / LAST
        self._every = every
        self._saved_step = -1
        self._stop = False
        self._place = Place(0, 0, 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take SIGTERM over from Lightning, whose way out skips the save; it puts back what was there before it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._asked_to_stop)

    def _asked_to_stop(self, *_: Any) -> None:
        self._stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, or if the run is asked to stop; the last step of an epoch leaves that to its end.

        Raises:
            TrainingError: the loss is not finite; what was saved before is left as it is.
            Terminated: SIGTERM came.
        """
        stop = self._agreed(trainer)
        if trainer.is_last_batch:
            return
        step = trainer.global_step
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = self._every and stepped and step % self._every == 0 and step != self._saved_step
        if stepped and (stop or due):
            assert isinstance(pl_module, ClassificationTask)
            pl_module.mean_loss()  # weights behind a loss that is no number are not worth keeping
            self._save(trainer, trainer.current_epoch, batch_idx + 1)
        if stepped and stop:
            raise Terminated

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after the epoch, its validation, and all that other callbacks make of it."""
        self._save(trainer, trainer.current_epoch + 1, 0)
        if self._agreed(trainer) and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise Terminated

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down where the data go on."""
        checkpoint[_PLACE] = self._place._asdict()

    def _save(self, trainer: L.Trainer, epoch: int, batches: int) -> None:
        self._place = Place(epoch, batches, trainer.accumulate_grad_batches)
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)

    def _agreed(self, trainer: L.Trainer) -> bool:
        """If any process is asked to stop: all have to save together."""
        if trainer.world_size == 1:
            return self._stop
        return bool(trainer.strategy.reduce_boolean_decision(self._stop, all=False))


def place_of(path: str | os.PathLike[str]) -> Place:
    """Where a saved run goes on. Nothing but tensors and plain values is read: no file can run code.

    Raises:
        CheckpointError: the file is damaged, or is no saved run.
    """
    try:
        place = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[_PLACE]
        return Place(**{name: int(place[name]) for name in Place._fields})
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} is no saved run, or is damaged: remove it to begin anew, or take another folder."
        ) from error
