"""What watches a run: the record of its epochs, the data's epoch, and the bar that a person looks at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, final

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from repvgg.data import TrainLoader
from repvgg.training.task import ClassificationTask

_REFRESH = 0.25  # seconds


@final
@dataclass(frozen=True)
class EpochRecord:
    """One epoch of a run.

    Attributes:
        epoch: counted from 1.
        loss: mean of the training loss over the steps, without weight decay.
        held_out_accuracy: after the epoch, in [0, 1].
        held_out_top5: share of images whose class is among the five likeliest, in [0, 1].
        lr: learning rate of the last step.
        seconds: wall time, the pass over the held-out images included.
        images_per_second: of training, over all devices, that pass left out.
    """

    epoch: int
    loss: float
    held_out_accuracy: float
    held_out_top5: float = float("nan")
    lr: float = float("nan")
    seconds: float = float("nan")
    images_per_second: float = float("nan")


@final
class History(L.Callback):
    """Collects one :class:`EpochRecord` an epoch in ``records``; part of the checkpoint.

    Raises:
        TrainingError: the loss is not finite; what was saved before is left as it is.
    """

    def __init__(self) -> None:
        self.records: list[EpochRecord] = []
        self._start = self._trained = 0.0
        self._images = 0

    def state_dict(self) -> dict[str, Any]:
        """The records as plain data."""
        return {"records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved records."""
        self.records = [EpochRecord(**record) for record in state_dict["records"]]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, for a run that goes on in the middle of an epoch."""
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch[1]) * trainer.world_size
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the numbers of the epoch."""
        assert isinstance(pl_module, ClassificationTask)
        loss = pl_module.mean_loss()
        top1, top5 = float(pl_module.top1.compute()), float(pl_module.top5.compute())
        for metric in (pl_module.train_loss, pl_module.top1, pl_module.top5):
            metric.reset()
        now = time.perf_counter()
        speed = self._images / max(self._trained - self._start, 1e-9)
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        epoch = trainer.current_epoch + 1
        self.records.append(EpochRecord(epoch, loss, top1, top5, lr, now - self._start, speed))
        if trainer.loggers:
            pl_module.log_dict(
                {"loss": loss, "held_out_accuracy": top1, "held_out_top5": top5, "img/s": speed, "lr": lr}
            )


@final
class Follow(L.Callback):
    """Tells the loader which epoch it is, and the world about each epoch that is done."""

    def __init__(self, loader: TrainLoader, on_epoch: Callable[[], None]) -> None:
        self._loader = loader
        self._on_epoch = on_epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the order of the images."""
        self._loader.set_epoch(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand on."""
        self._on_epoch()


@final
class Bar(L.Callback):
    """One line for the whole run: epoch, loss, held-out accuracy, images per second, time left.

    Use it as a context manager around the run, so that the line is closed whatever ends it.
    """

    def __init__(self, history: History, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            refresh_per_second=1 / _REFRESH,
        )
        self._history = history
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
        total = int(trainer.estimated_stepping_batches)
        self._progress.reset(self._line, total=total, completed=trainer.global_step, numbers="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance, a few times a second: reading the loss waits for the device."""
        if time.perf_counter() - self._shown < _REFRESH:
            return
        self._shown = time.perf_counter()
        self._loss = f"loss {float(outputs['loss']) * trainer.accumulate_grad_batches:.3f}"
        self._show(trainer, len(batch[1]) * trainer.accumulate_grad_batches * trainer.world_size)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the numbers of the whole epoch."""
        record = self._history.records[-1]
        self._loss = f"loss {record.loss:.3f}"
        self._accuracy = f"  held-out {record.held_out_accuracy:.1%}"
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
