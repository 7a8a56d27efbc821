"""The checkpoint of a run, ``last.ckpt``: atomic writes, when it is saved, and where a resumed run continues."""

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
from repvgg.training.task import TrainingTask

LAST_CHECKPOINT = "last.ckpt"
_POSITION_KEY = "repvgg_place"  # in last.ckpt; checkpoints in the field have it


class RunPosition(NamedTuple):
    """Where the data of a saved run continue."""

    epoch: int  # counted from 0
    batches: int  # batches of this epoch that are done, per device
    accumulation: int  # batches per optimizer step, per device


def read_position(path: str | os.PathLike[str]) -> RunPosition:
    """Read where a saved run continues. Only tensors and plain values are unpickled: a file cannot run code.

    Raises:
        CheckpointError: the file is damaged, or not the checkpoint of a run.
    """
    try:
        # mmap: the tensors of the model, perhaps gigabytes, are not read.
        position = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[_POSITION_KEY]
        return RunPosition(**{name: int(position[name]) for name in RunPosition._fields})
    except Exception as error:  # damaged files make torch.load raise errors of many types
        raise CheckpointError(
            f"{str(path)!r} is damaged or not the checkpoint of a run: "
            "remove it to start again, or choose another folder."
        ) from error


class Terminated(Exception):  # noqa: N818 - not an error
    """SIGTERM arrived, and the run has saved its checkpoint."""


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints under a temporary name, flush them to disk, then rename them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint``; a file at ``path`` is replaced only when the new one is complete.

        Raises:
            OutputError: it cannot be written, for example because the disk is full.
        """
        with atomic_write(path, overwrite=True) as part:
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:  # PyTorch's zip writer turns an OSError into this
                raise OutputError(
                    f"{str(path)!r} could not be written, perhaps for lack of space: the checkpoint saved before it "
                    "is intact, and the run continues from it when it is resumed."
                ) from error


@final
class CheckpointSaver(Checkpoint):
    """Keep ``last.ckpt`` in a folder, from which a run resumes bit for bit.

    It is saved after every epoch, every ``every_steps`` optimizer steps (0: never within an epoch), and when SIGTERM
    arrives.
    """

    def __init__(self, folder: Path, every_steps: int = 0) -> None:
        self.path = folder / LAST_CHECKPOINT
        self._every_steps = every_steps
        self._saved_step = -1
        self._sigterm_received = False
        self._position = RunPosition(0, 0, 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Replaces Lightning's handler, which exits without saving; Lightning restores the original one at the end.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._sigterm_received = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop = self._should_stop(trainer)  # before any return: it is a collective operation
        if trainer.is_last_batch:
            return  # on_train_epoch_end saves after the validation
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # accumulated gradients are not part of a checkpoint
        step = trainer.global_step
        due = self._every_steps and step % self._every_steps == 0 and step != self._saved_step
        if stop or due:
            assert isinstance(pl_module, TrainingTask)
            pl_module.mean_loss()  # raises if the loss is not finite: such weights must not replace the last good ones
            self._save(trainer, trainer.current_epoch, batch_idx + 1)
        if stop:
            raise Terminated

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning runs checkpoint callbacks last, so the epoch's validation and record are in the file.
        self._save(trainer, trainer.current_epoch + 1, 0)
        # After the last epoch only the collapse is left, which takes seconds: the run finishes.
        if self._should_stop(trainer) and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            raise Terminated

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_POSITION_KEY] = self._position._asdict()

    def _save(self, trainer: L.Trainer, epoch: int, batches: int) -> None:
        self._position = RunPosition(epoch, batches, trainer.accumulate_grad_batches)
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.path)

    def _should_stop(self, trainer: L.Trainer) -> bool:
        """Whether any process received SIGTERM: saving is collective, so all of them stop at the same step."""
        if trainer.world_size == 1:
            return self._sigterm_received
        return bool(trainer.strategy.reduce_boolean_decision(self._sigterm_received, all=False))
