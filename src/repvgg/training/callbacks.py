"""What watches a run: the record of its epochs, and the bar that a person looks at."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, final

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from repvgg.training.task import HELD_OUT_ACCURACY, LOSS

_REFRESH = 0.25  # seconds


@final
@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a run.

    Attributes:
        epoch: counted from 1.
        loss: mean of the training loss over the steps.
        held_out_accuracy: after the epoch, in [0, 1].
        seconds: wall time, the pass over the held-out images included.
    """

    epoch: int
    loss: float
    held_out_accuracy: float
    seconds: float


@final
class History(L.Callback):
    """Collects one :class:`EpochRecord` an epoch in ``records``."""

    def __init__(self) -> None:
        self.records: list[EpochRecord] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop it and keep the numbers of the epoch."""
        metrics = trainer.callback_metrics
        seconds = time.perf_counter() - self._start
        self.records.append(
            EpochRecord(trainer.current_epoch + 1, float(metrics[LOSS]), float(metrics[HELD_OUT_ACCURACY]), seconds)
        )


@final
class Bar(L.Callback):
    """One line for the whole run: epoch, loss, held-out accuracy, images per second, time left.

    Use it as a context manager around the run, so that the line is closed whatever ends it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            refresh_per_second=1 / _REFRESH,
        )
        self._line = self._progress.add_task("training", total=None, numbers="")
        self._loss = self._accuracy = ""
        self._shown = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how long the run is."""
        self._progress.reset(self._line, total=int(trainer.estimated_stepping_batches), numbers="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance, a few times a second: reading the loss waits for the device."""
        if time.perf_counter() - self._shown < _REFRESH:
            return
        self._shown = time.perf_counter()
        self._loss = f"loss {float(outputs['loss']):.3f}"
        self._show(trainer, len(batch[1]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the numbers of the whole epoch."""
        self._loss = f"loss {float(trainer.callback_metrics[LOSS]):.3f}"
        self._accuracy = f"  held-out {float(trainer.callback_metrics[HELD_OUT_ACCURACY]):.1%}"
        self._show(trainer, 0)

    def _show(self, trainer: L.Trainer, images: int) -> None:
        speed = self._progress.tasks[0].speed
        rate = f"  {speed * images:.0f} img/s" if speed and images else ""
        done = trainer.global_step == self._progress.tasks[0].total
        self._progress.update(
            self._line,
            completed=trainer.global_step,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            numbers=f"{self._loss}{self._accuracy}{rate}  {'took' if done else 'left'}",
        )
