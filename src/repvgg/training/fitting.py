"""Train a model on a data set, as a config says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from rich.console import Console
from torch import Tensor, nn

from repvgg.data import OpenedData
from repvgg.errors import UsageError
from repvgg.modes import eval_mode
from repvgg.training.averaging import MovingAverage
from repvgg.training.callbacks import Bar, EpochRecord, Follow, History
from repvgg.training.config import TrainConfig
from repvgg.training.evaluation import Evaluation, device_of, evaluate
from repvgg.training.plan import BatchPlan, Layout, plan_batches
from repvgg.training.quiet import lightning_as_guest
from repvgg.training.saving import Saver, WholeFiles, place_of
from repvgg.training.seeding import seeded
from repvgg.training.sync_bn import synchronized
from repvgg.training.task import ClassificationTask

HELD_OUT_BATCH = 256
_PRECISION = {"float32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

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
        layout: the processes of the run; None is this one alone.
        on_epoch: called on rank 0 after each epoch is saved, with the records so far and the weights that were judged.

    Raises:
        UsageError: the model does not fit the images or the classes, or the training images fill no batch.
        TrainingError: the loss became infinite.
        OutputError: a checkpoint cannot be written; the one before it is whole.
        Terminated: SIGTERM came, and the run has saved where it stands.
        KeyboardInterrupt: Ctrl-C, at once; ``model`` then holds the weights of that moment.
    """
    layout = layout or Layout(devices=config.devices or 1, nodes=config.nodes or 1)
    plan = plan_batches(config, layout.world_size)
    _check(model, data, plan)
    start = time.perf_counter()
    with ExitStack() as stack:
        for guard in (_threads(config.threads), _prepared(model, config.channels_last), seeded("fit", config.seed)):
            stack.enter_context(guard)
        stack.enter_context(lightning_as_guest())
        stack.enter_context(synchronized(model, config.sync_bn))
        history = _train(model, data, config, plan, layout, folder, resume, progress, console, on_epoch)
        seconds = time.perf_counter() - start
    return FitResult(config, plan, tuple(history.records), judged(model, data, config), seconds)


def judged(model: nn.Module, data: OpenedData, config: TrainConfig) -> Evaluation:
    """``model`` on all held-out images, on the device of the run; it comes back to the CPU."""
    device = "cpu" if _on_cpu(config) else torch.accelerator.current_accelerator()
    try:
        return evaluate(model.to(device), data.held_out_batches(HELD_OUT_BATCH), data.prepare)
    finally:
        model.cpu()


def _on_cpu(config: TrainConfig) -> bool:
    return config.accelerator == "cpu" or not torch.accelerator.is_available()


def _train(
    model: nn.Module,
    data: OpenedData,
    config: TrainConfig,
    plan: BatchPlan,
    layout: Layout,
    folder: Path | None,
    resume: bool,
    progress: bool,
    console: Console | None,
    on_epoch: OnEpoch | None,
) -> History:
    """One run of Lightning's Trainer."""
    loader = data.train_batches(plan.device_batch, rank=layout.rank, world_size=layout.world_size)
    held_out = data.held_out_batches(
        min(HELD_OUT_BATCH, max(plan.device_batch, 2)), rank=layout.rank, world_size=layout.world_size
    )
    task = ClassificationTask(model, config, len(data.classes), data.prepare, plan)
    history, average = History(), MovingAverage(config.ema) if config.ema else None
    saved = folder / "last.ckpt" if folder is not None and resume and (folder / "last.ckpt").exists() else None
    if saved is not None:
        epoch, batches = place_of(saved)
        loader.set_epoch(epoch)
        loader.skip(batches)

    def tell() -> None:
        if on_epoch is not None and layout.rank == 0:
            weights = model.state_dict() if average is None else average.weights("model.")
            on_epoch(tuple(history.records), weights)

    callbacks: list[L.Callback] = [history, Follow(loader)]
    callbacks += [average] if average else []
    callbacks += [Saver(folder, config.save_steps, tell)] if folder else [Follow(loader, lambda _: tell())]
    with Bar(history, console) if progress and layout.rank == 0 else nullcontext() as bar:
        callbacks += [bar] if bar else []
        trainer = _trainer(config, plan, layout, callbacks, folder, len(loader))
        trainer.fit(task, loader, held_out, ckpt_path=saved, weights_only=True)
    return history


def _trainer(
    config: TrainConfig,
    plan: BatchPlan,
    layout: Layout,
    callbacks: list[L.Callback],
    folder: Path | None,
    batches: int,
) -> L.Trainer:
    several = layout.world_size > 1
    on_cpu = _on_cpu(config)
    return L.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=layout.devices,
        num_nodes=layout.nodes,
        strategy=_strategy(on_cpu) if several else "auto",
        precision=_PRECISION[config.precision],  # type: ignore[arg-type]
        accumulate_grad_batches=plan.accumulation,
        gradient_clip_val=config.optim.clip,
        limit_train_batches=batches - batches % plan.accumulation,
        deterministic=True if on_cpu else "warn",
        callbacks=callbacks,
        logger=_logger(folder),
        log_every_n_steps=max(1, min(50, batches)),
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        plugins=[WholeFiles()],
    )


def _strategy(on_cpu: bool) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    return DDPStrategy(process_group_backend="gloo" if on_cpu else None, broadcast_buffers=True)


def _logger(folder: Path | None) -> Any:
    """TensorBoard's files in the run folder, where it is installed."""
    if folder is None or find_spec("tensorboard") is None:
        return False
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="", version="tensorboard")


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


def _check(model: nn.Module, data: OpenedData, plan: BatchPlan) -> None:
    if data.num_train is not None and data.num_train < plan.global_batch:
        raise UsageError(f"{data.num_train} training images do not fill one batch of {plan.global_batch}.")
    if plan.device_batch < 2:
        raise UsageError("Batch norm needs 2 images at a time on each device at least: take a larger batch.")
    shape = _logits_shape(model, data)
    if shape != (1, len(data.classes)):
        raise UsageError(f"{data.uri} has {len(data.classes)} classes, but the model gives {shape} for one image.")


def _logits_shape(model: nn.Module, data: OpenedData) -> tuple[int, ...]:
    """Shape of what the model makes of one image."""
    try:
        with eval_mode(model), torch.no_grad():
            return tuple(model(torch.zeros(1, *data.test_shape, device=device_of(model))).shape)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"The model does not take images of shape {data.test_shape}: {reason}") from error
