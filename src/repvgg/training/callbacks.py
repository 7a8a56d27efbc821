"""Lightning callbacks of a run: epoch records, the moving average of the weights, a progress bar."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from repvgg._progress import periodic_lines
from repvgg.training.records import Record, record_from
from repvgg.training.task import TrainingTask

_REFRESH_SECONDS = 0.25
_TAGS, _NOT_LOGGED = {"images_per_second": "img/s"}, ("epoch", "seconds")  # of TensorBoard


@final
class History(L.Callback):
    """Append a record per epoch to ``records``, which are part of the checkpoint.

    Raises:
        TrainingError: the loss of an epoch is not finite; earlier checkpoints are unchanged.
    """

    # The class name is Lightning's key of this state in last.ckpt: a renamed class could not resume older runs.

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._epoch_start = self._last_step_end = 0.0
        self._images = 0

    def state_dict(self) -> dict[str, Any]:
        return {"records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [record_from(record) for record in state_dict["records"]]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on_train_epoch_start is not called for the epoch in whose middle a run resumes.
        self._epoch_start = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_start, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size
        self._last_step_end = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingTask)
        now = time.perf_counter()
        speed = self._images / max(self._last_step_end - self._epoch_start, 1e-9)
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        record = pl_module.finish_epoch(trainer.current_epoch + 1, lr, now - self._epoch_start, speed)
        self.records.append(record)
        if trainer.loggers:
            # The tags of version 0.1.0, so that TensorBoard overlays older and newer runs.
            named = {_TAGS.get(name, name): value for name, value in asdict(record).items()}
            pl_module.log_dict({name: value for name, value in named.items() if name not in _NOT_LOGGED})


@final
class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and batch norm statistics: ``ā ← d_n · ā + (1 − d_n) · w`` after step n.

    ``d_n = min(decay, (1 + n) / (10 + n))``: the warm-up of the decay forgets the first steps, which are far from the
    final weights, faster than a constant decay (Lightning's ``EMAWeightAveraging``) would. Lightning validates the
    average and copies it into the model when training ends. The decay is in (0, 1).
    """

    # The class name is Lightning's key of this state in last.ckpt: a renamed class could not resume older runs.

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._update)
        self.decay = decay

    @torch.no_grad()
    def _update(self, averages: list[Tensor], weights: list[Tensor], steps: Tensor | int) -> None:
        n = int(steps)
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point():  # PyTorch groups the tensors by dtype, so one stands for all
            torch._foreach_lerp_(averages, weights, weight)  # one kernel for all tensors, as torch's optimizers do
        else:
            torch._foreach_copy_(averages, weights)  # batch counters

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> Any:
        return step_idx is not None

    def copy_into(self, task: L.LightningModule) -> None:
        # Lightning does so at the end of training, but not where a resumed run had finished its last epoch.
        self._copy_average_to_current(task)

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the current averages whose names start with ``prefix``, with the prefix removed."""
        assert self._average_model is not None
        state = self._average_model.module.state_dict()
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@final
class ProgressBar(L.Callback):
    """One line for the whole run: epoch, loss, validation accuracy, images per second, remaining time.

    Use it as a context manager around the run, so that the line is closed when an exception ends it.
    """

    def __init__(self, history: History, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            refresh_per_second=1 / _REFRESH_SECONDS,
        )
        self._history = history
        self._line = self._progress.add_task("training", total=None, numbers="")
        self._loss = self._accuracy = ""
        self._last_update = 0.0
        self._exit = ExitStack()

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        console = self._progress.console
        if not console.is_terminal:  # rich draws nothing there before the end
            self._exit.enter_context(periodic_lines(console, self._text))
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()
        self._progress.stop()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self._progress.reset(self._line, total=total, completed=trainer.global_step, numbers="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Reading the loss synchronizes with the device, so it is not done at every step.
        if time.perf_counter() - self._last_update < _REFRESH_SECONDS:
            return
        self._last_update = time.perf_counter()
        # Lightning has divided the loss by the number of accumulated batches.
        self._loss = f"loss {float(outputs['loss']) * trainer.accumulate_grad_batches:.3f}"
        self._show(trainer, len(batch[1]) * trainer.accumulate_grad_batches * trainer.world_size)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        record = self._history.records[-1]
        self._loss = f"loss {record.loss:.3f}"
        what = "" if record.score_name == "accuracy" else f" {record.score_name}"
        self._accuracy = f"  validation{what} {record.score:.1%}"
        self._show(trainer, 0)

    def _text(self) -> str:
        task = self._progress.tasks[0]
        total = "" if task.total is None else f" of {task.total:,.0f}"
        numbers, _, _ = task.fields["numbers"].rpartition("  ")  # without "left", which precedes the remaining time
        return f"{task.description}, step {task.completed:,.0f}{total}" + (f"  {numbers}" if numbers else "")

    def _show(self, trainer: L.Trainer, images_per_step: int) -> None:
        steps_per_second = self._progress.tasks[0].speed
        rate = f"  {steps_per_second * images_per_step:.0f} img/s" if steps_per_second and images_per_step else ""
        finished = trainer.global_step == self._progress.tasks[0].total
        self._progress.update(
            self._line,
            completed=trainer.global_step,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            numbers=f"{self._loss}{self._accuracy}{rate}  {'took' if finished else 'left'}",
        )
