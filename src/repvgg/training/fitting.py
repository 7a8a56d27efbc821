"""Train a model on a data set, as a config says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repvgg.data import AffineJitter, ImageSplit, JitterEach
from repvgg.errors import UsageError
from repvgg.modes import eval_mode
from repvgg.training.callbacks import Bar, EpochRecord, History
from repvgg.training.config import TrainConfig
from repvgg.training.evaluation import Evaluation, device_of, evaluate
from repvgg.training.quiet import lightning_as_guest
from repvgg.training.seeding import EpochShuffle, seeded
from repvgg.training.task import ClassificationTask

_HELD_OUT_BATCH = 256


@final
@dataclass(frozen=True)
class FitResult:
    """What a run was and what came out of it.

    Attributes:
        config: the run.
        history: one record an epoch.
        held_out: the model of the last epoch on the held-out images: predictions, confusion matrix, accuracy.
        seconds: wall time from the first to the last epoch.
    """

    config: TrainConfig
    history: tuple[EpochRecord, ...]
    held_out: Evaluation
    seconds: float

    @property
    def accuracy(self) -> float:
        """Held-out accuracy after the last epoch, in [0, 1]; no epoch is chosen by it."""
        return self.held_out.accuracy


def fit(
    model: nn.Module,
    data: ImageSplit,
    config: TrainConfig,
    *,
    progress: bool = True,
    console: Console | None = None,
    accelerator: str = "cpu",
) -> FitResult:
    """Train ``model`` in place and return what came out; it is left in eval mode, on the CPU.

    The weights of the last epoch count. The same first weights, data, config and number of threads give the same
    weights bit for bit on a CPU. Writes no file; torch's random state, threads and switches are left as they were.

    Args:
        model: from images (N, C, H, W) to logits (N, K), in training mode perhaps to a ``TrainingOutput``.
        data: what to train on and what to judge by.
        config: the run.
        progress: show one line with epoch, loss, held-out accuracy and speed.
        console: where to show it; standard output if None.
        accelerator: Lightning's name of the device: "cpu", "cuda", "mps", "auto".

    Raises:
        UsageError: the model does not fit the images or the classes, or the training images fill no batch.
        KeyboardInterrupt: Ctrl-C, at once; ``model`` then holds the weights of that moment.
    """
    _check(model, data, config)
    history = History()
    task = ClassificationTask(model, config, len(data.classes), _augmentation(config.augment, data))
    with ExitStack() as stack:
        stack.enter_context(_threads(config.threads))
        stack.enter_context(_prepared(model, config.channels_last))
        stack.enter_context(seeded("fit", config.seed))
        stack.enter_context(lightning_as_guest())
        callbacks: list[L.Callback] = [history, *([stack.enter_context(Bar(console))] if progress else [])]
        trainer = _trainer(config, callbacks, accelerator)
        start = time.perf_counter()
        trainer.fit(task, _training_batches(data, config), DataLoader(data.held_out, _HELD_OUT_BATCH))
        seconds = time.perf_counter() - start
    return FitResult(config, tuple(history.records), evaluate(model, data.held_out), seconds)


def _trainer(config: TrainConfig, callbacks: list[L.Callback], accelerator: str) -> L.Trainer:
    return L.Trainer(
        max_epochs=config.epochs,
        accelerator=accelerator,
        devices=1,
        deterministic=True,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def _training_batches(data: ImageSplit, config: TrainConfig) -> DataLoader[tuple[Tensor, Tensor]]:
    order = EpochShuffle(data.train, config.seed)
    return DataLoader(data.train, config.batch_size, sampler=order, drop_last=True)


def _augmentation(jitter: AffineJitter, data: ImageSplit) -> nn.Module | None:
    return None if jitter == AffineJitter() else JitterEach(jitter, data.black)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _prepared(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Training mode inside, in the layout asked for; eval mode and, if that was changed, the standard layout after."""
    model.train()
    if channels_last:
        _to_layout(model, torch.channels_last)
    try:
        yield
    finally:
        model.eval()
        if channels_last:
            _to_layout(model, torch.contiguous_format)


def _to_layout(model: nn.Module, layout: torch.memory_format) -> None:
    model.to(memory_format=layout)


def _check(model: nn.Module, data: ImageSplit, config: TrainConfig) -> None:
    if len(data.train) < config.batch_size:
        raise UsageError(f"{len(data.train)} training images do not fill one batch of {config.batch_size}.")
    shape = _logits_shape(model, data)
    if shape != (1, len(data.classes)):
        raise UsageError(f"{data.name} has {len(data.classes)} classes, but the model gives {shape} for one image.")


def _logits_shape(model: nn.Module, data: ImageSplit) -> tuple[int, ...]:
    """Shape of what the model makes of one image."""
    image, _ = data.held_out[0]
    try:
        with eval_mode(model), torch.no_grad():
            return tuple(model(image.unsqueeze(0).to(device_of(model))).shape)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"The model does not take images of shape {data.input_shape}: {reason}") from error
