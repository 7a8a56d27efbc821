"""Train a model on a data set, as a config says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import final

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn

from repvgg._contexts import eval_mode, num_threads
from repvgg.data import OpenedData
from repvgg.errors import UsageError, first_line
from repvgg.training.averaging import MovingAverage
from repvgg.training.callbacks import Bar, EpochRecord, Follow, History
from repvgg.training.config import TrainConfig
from repvgg.training.evaluation import Evaluation, device_of, evaluate
from repvgg.training.job import HELD_OUT_BATCH, Job, Lazily, on_cpu
from repvgg.training.plan import BatchPlan, Layout, layout_of
from repvgg.training.quiet import lightning_as_guest
from repvgg.training.saving import Saver
from repvgg.training.seeding import seeded
from repvgg.training.sync_bn import synchronized

OnEpoch = Callable[[tuple[EpochRecord, ...], Mapping[str, Tensor]], None]


@final
@dataclass(frozen=True)
class FitResult:
    """What a run was and what came out of it.

    Attributes:
        config: the run.
        plan: its batches and learning rate.
        history: one record an epoch.
        held_out: the model of the last epoch on the held-out images: predictions, confusion matrix, accuracy.
        seconds: wall time from the first to the last epoch of this process.
    """

    config: TrainConfig
    plan: BatchPlan
    history: tuple[EpochRecord, ...]
    held_out: Evaluation
    seconds: float

    @property
    def accuracy(self) -> float:
        """Held-out accuracy after the last epoch, in [0, 1]; no epoch is chosen by it."""
        return self.held_out.accuracy


def fit(
    model: nn.Module,
    data: OpenedData,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    console: Console | None = None,
    layout: Layout | None = None,
    on_epoch: OnEpoch | None = None,
) -> FitResult:
    """Train ``model`` in place and return what came out; it is left in eval mode, on the CPU.

    The weights of the last epoch count, or their moving average if the config asks for it. The same first weights,
    data, config and number of threads give the same weights bit for bit on a CPU, interrupted and resumed or not.
    Torch's random state, threads and switches are left as they were.

    Args:
        model: from images (N, C, H, W) to logits (N, K), in training mode perhaps to a ``TrainingOutput``.
        data: what to train on and what to judge by.
        config: the run.
        folder: where to keep ``last.ckpt`` and TensorBoard's files; None writes no file.
        resume: go on from ``last.ckpt`` in ``folder``, if it is there.
        progress: show one line with epoch, loss, held-out accuracy and speed.
        console: where to show it; standard output if None.
        layout: the processes of the run; None is what :func:`~repvgg.training.layout_of` finds.
        on_epoch: called on rank 0 after each epoch, before it is saved, with the records so far and the weights that
            were judged; of an epoch that is interrupted in between it hears twice.

    Raises:
        UsageError: the model does not fit the images or the classes, the training images fill no batch, or the
            devices do not do what the config asks for.
        TrainingError: the loss became infinite.
        OutputError: a checkpoint cannot be written; the one before it is whole.
        Terminated: SIGTERM came, and the run has saved where it stands.
        KeyboardInterrupt: Ctrl-C, at once; ``model`` then holds the weights of that moment.
    """
    job = Job(model, data, config, layout_of(config) if layout is None else layout, folder, resume)
    _check_shapes(model, data)
    start, history = time.perf_counter(), History()
    shown = Bar(history, console) if progress and job.layout.rank == 0 else nullcontext()
    with ExitStack() as stack:
        for guard in (num_threads(config.threads), _prepared(model, config.channels_last), seeded("fit", config.seed)):
            stack.enter_context(guard)
        stack.enter_context(lightning_as_guest())
        stack.enter_context(synchronized(model, config.sync_bn, on_cpu=on_cpu(config)))
        _train(job, history, stack.enter_context(shown), on_epoch)
        seconds = time.perf_counter() - start
    return FitResult(config, job.plan, tuple(history.records), judged(model, data, config), seconds)


def judged(model: nn.Module, data: OpenedData, config: TrainConfig) -> Evaluation:
    """``model`` on all held-out images, on the device of the run; it comes back to the CPU."""
    device = "cpu" if on_cpu(config) else torch.accelerator.current_accelerator()
    try:
        return evaluate(model.to(device), data.held_out_batches(HELD_OUT_BATCH), data.prepare)
    finally:
        model.cpu()


def _train(job: Job, history: History, bar: Bar | None, on_epoch: OnEpoch | None) -> None:
    """One run of Lightning's Trainer."""
    loader, task = job.train_batches(), job.task()
    average = MovingAverage(job.config.ema) if job.config.ema else None

    def tell() -> None:
        if on_epoch is not None and job.layout.rank == 0:
            on_epoch(tuple(history.records), job.model.state_dict() if average is None else average.weights("model."))

    callbacks: list[L.Callback | None] = [history, Follow(loader, tell), average, bar]
    callbacks += [Saver(job.folder, job.config.save_steps)] if job.folder is not None else []
    trainer = job.trainer([callback for callback in callbacks if callback is not None], len(loader))
    trainer.fit(task, Lazily(loader), Lazily(job.held_out_batches()), ckpt_path=job.saved, weights_only=True)
    if average is not None:
        average.hand_over(task)


@contextmanager
def _prepared(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Training mode inside, in the layout asked for; eval mode, on the CPU, in the standard layout after."""
    model.train()
    if channels_last:
        _to_layout(model, torch.channels_last)
    try:
        yield
    finally:
        model.eval().cpu()
        if channels_last:
            _to_layout(model, torch.contiguous_format)


def _to_layout(model: nn.Module, layout: torch.memory_format) -> None:
    model.to(memory_format=layout)


def _check_shapes(model: nn.Module, data: OpenedData) -> None:
    shape = _logits_shape(model, data)
    if shape != (1, len(data.classes)):
        raise UsageError(f"{data.uri} has {len(data.classes)} classes, but the model gives {shape} for one image.")


def _logits_shape(model: nn.Module, data: OpenedData) -> tuple[int, ...]:
    """Shape of what the model makes of one image."""
    try:
        with eval_mode(model), torch.no_grad():
            return tuple(model(torch.zeros(1, *data.test_shape, device=device_of(model))).shape)
    except RuntimeError as error:
        raise UsageError(f"The model does not take images of shape {data.test_shape}: {first_line(error)}.") from error
