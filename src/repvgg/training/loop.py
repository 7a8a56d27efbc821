"""``fit``: train a model on a data set with Lightning's Trainer, without its side effects on the process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from torch import Tensor, nn

from repvgg._contexts import eval_mode, num_threads, seeded
from repvgg.data import SegmentationData, TrainLoader, ValLoader
from repvgg.errors import UsageError, first_line
from repvgg.quantization import QatNetwork
from repvgg.training.callbacks import History, MovingAverage, ProgressBar
from repvgg.training.checkpoint import LAST_CHECKPOINT, AtomicCheckpointIO, CheckpointSaver, read_position
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import (
    BatchPlan,
    ProcessLayout,
    ddp_strategy,
    plan_batches,
    process_layout,
    synchronized_batch_norm,
)
from repvgg.training.evaluation import device_of
from repvgg.training.precision import runs_on_cpu, settle_precision
from repvgg.training.qat import QatSchedule
from repvgg.training.records import Record
from repvgg.training.segmentation_inference import require_grid_size
from repvgg.training.task import TrainingTask
from repvgg.training.tasks import (
    TrainingData,
    ValidationResult,
    build_task,
    check_shapes,
    evaluate_on,
    validation_batch,
)

TENSORBOARD_FOLDER = "tensorboard"  # inside the folder of the run
_LIGHTNING_PRECISION = {"float32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_STEPS_PER_LOG_POINT = 50

OnEpoch = Callable[[tuple[Record, ...], Mapping[str, Tensor]], None]


@final
@dataclass(frozen=True)
class FitResult:
    """The outcome of :func:`fit`."""

    config: TrainConfig  # the run
    plan: BatchPlan  # its batch split and learning rate
    history: tuple[Record, ...]  # one record per epoch
    validation: ValidationResult  # the model of the last epoch on the validation images
    seconds: float  # wall time of the epochs in this process

    @property
    def accuracy(self) -> float:
        """Top-1 or pixel accuracy after the last epoch, in [0, 1]; no epoch is selected by it."""
        return self.validation.accuracy


def fit(
    model: nn.Module,
    data: TrainingData,
    config: TrainConfig,
    *,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    console: Console | None = None,
    layout: ProcessLayout | None = None,
    on_epoch: OnEpoch | None = None,
) -> FitResult:
    """Train ``model`` in place; afterwards it is in eval mode, on the CPU.

    The result has the weights of the last epoch, or their moving average if ``config.ema`` is set. On a CPU the same
    initial weights, data, config and number of threads give the same weights bit for bit, even if the run was
    interrupted and resumed. Torch's random state, number of threads and global switches are restored.

    Args:
        model: from images (N, C, H, W) to logits (N, K), or (N, K, H, W) for data with masks; in training mode
            optionally to a ``TrainingOutput``.
        data: the training and validation images, with labels or masks.
        config: the run.
        folder: where ``last.ckpt`` and TensorBoard's files are written; None writes no file.
        resume: continue from ``last.ckpt`` in ``folder``, if it exists.
        progress: show one line with epoch, loss, validation accuracy and speed.
        console: where to show it; standard output if None.
        layout: the processes of the run; detected by :func:`~repvgg.training.process_layout` if None.
        on_epoch: called on rank 0 after each epoch, before the checkpoint is saved, with the records so far and the
            weights that were validated, of a ``QatNetwork`` those of its train form. Called again for an
            epoch that is interrupted before its checkpoint is saved.

    Raises:
        UsageError: the model does not match the images or classes, the training images do not fill a batch, or the
            devices do not support the config.
        TrainingError: the loss became infinite or NaN.
        OutputError: a checkpoint cannot be written; the one before it is intact.
        Terminated: SIGTERM arrived, and the checkpoint is saved.
        KeyboardInterrupt: Ctrl-C, immediately; ``model`` has the weights of that moment.
    """
    config, notes = settle_precision(config)
    job = TrainingJob(model, data, config, process_layout(config) if layout is None else layout, folder, resume)
    _check_shapes(model, data)
    start, history = time.perf_counter(), History()
    visible, several = progress and job.layout.rank == 0, job.layout.world_size > 1
    for note in notes if visible else ():
        (console or Console()).print(note, highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        # Left in reverse order: the synchronized norms are gone before the model moves back to the CPU.
        for context in (
            num_threads(config.threads),
            _training_mode(model, config.channels_last),
            seeded("fit", config.seed),
            isolate_lightning(),
            synchronized_batch_norm(model, config.sync_bn and several, on_cpu=runs_on_cpu(config)),
        ):
            stack.enter_context(context)
        bar = stack.enter_context(ProgressBar(history, console) if visible else nullcontext())
        _run_trainer(job, history, bar, on_epoch)
        seconds = time.perf_counter() - start
    return FitResult(config, job.plan, tuple(history.records), evaluate_validation(model, data, config), seconds)


def evaluate_validation(model: nn.Module, data: TrainingData, config: TrainConfig) -> ValidationResult:
    """Evaluate ``model`` on all validation images on the device of the run; it returns to the CPU."""
    with on_device_of(config, model):
        return evaluate_on(model, data)


@contextmanager
def on_device_of(config: TrainConfig, *models: nn.Module) -> Iterator[None]:
    """Move ``models`` to the device of the run inside the context, and to the CPU afterwards."""
    device = "cpu" if runs_on_cpu(config) else torch.accelerator.current_accelerator()
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model in models:
            model.cpu()  # frees the memory of the accelerator


@final
@dataclass(frozen=True, eq=False)
class TrainingJob:
    """The part of a run that one process does: its batches, its task and its Trainer.

    Raises:
        UsageError: the batch does not split over the devices, the images do not fill it, or the precision is not
            supported.
    """

    model: nn.Module  # the model to train
    data: TrainingData  # the training and validation images
    config: TrainConfig  # the run
    layout: ProcessLayout  # the processes of the run, and the rank of this one
    folder: Path | None = None  # where files are written; None writes none
    resume: bool = False  # continue from the checkpoint in folder

    def __post_init__(self) -> None:
        plan, images = self.plan, self.data.num_train
        if self.config.precision == "fp16" and runs_on_cpu(self.config):
            raise UsageError("Training in fp16 is not supported on a CPU: take auto, bf16 or float32 as the precision.")
        if isinstance(self.data, SegmentationData):
            require_grid_size("A training crop", self.data.input_shape[1])
        elif plan.device_batch < 2:
            # A 1x1 feature map of a single image has one value per channel, which has no variance.
            raise UsageError("Batch norm needs at least 2 images at a time on each device: take a larger batch.")
        if images is not None and images < plan.global_batch:  # the incomplete batch would be dropped: no step at all
            raise UsageError(
                f"{images} training images do not fill one batch of {plan.global_batch}: take a smaller batch_size."
            )

    @property
    def plan(self) -> BatchPlan:
        return plan_batches(self.config, self.layout.world_size)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to resume from; None starts from the beginning."""
        path = self.folder / LAST_CHECKPOINT if self.folder is not None and self.resume else None
        return path if path is not None and path.exists() else None

    def train_loader(self) -> TrainLoader:
        """Return the training batches of this process, starting where the checkpoint was saved.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            UsageError: it was saved in the middle of an epoch with another gradient accumulation.
        """
        layout = self.layout
        loader = self.data.train_batches(self.plan.device_batch, rank=layout.rank, world_size=layout.world_size)
        if self.checkpoint is not None:
            position = read_position(self.checkpoint)
            if position.batches and position.accumulation != self.plan.accumulation:
                raise UsageError(
                    "The run was saved in the middle of an epoch with a gradient accumulation of "
                    f"{position.accumulation}, not {self.plan.accumulation}: resume it with the same number of devices "
                    "and the same device_batch."
                )
            # Lightning counts the batches of a resumed epoch from where it stopped, but does not skip their data.
            loader.set_epoch(position.epoch)
            loader.skip(position.batches)
        return loader

    def validation_loader(self) -> ValLoader:
        size, layout = min(validation_batch(self.data), self.plan.device_batch), self.layout
        return self.data.val_batches(size, rank=layout.rank, world_size=layout.world_size)

    def task(self) -> TrainingTask:
        return build_task(self.model, self.data, self.config, self.plan)

    def trainer(self, callbacks: list[L.Callback], batches: int) -> L.Trainer:
        """Return a Trainer for epochs of ``batches`` batches on this process."""
        on_cpu = runs_on_cpu(self.config)
        logger: Any = False
        if self.folder is not None and find_spec("tensorboard") is not None:
            from lightning.pytorch.loggers import TensorBoardLogger

            logger = TensorBoardLogger(self.folder, name="", version=TENSORBOARD_FOLDER)
        return L.Trainer(
            max_epochs=self.config.epochs,
            accelerator=self.config.accelerator,
            devices=self.layout.devices,
            num_nodes=self.layout.nodes,
            strategy="auto" if self.layout.world_size == 1 else ddp_strategy(on_cpu=on_cpu),
            precision=_LIGHTNING_PRECISION[self.config.precision],  # type: ignore[arg-type]
            accumulate_grad_batches=self.plan.accumulation,
            gradient_clip_val=self.config.optim.clip,
            # Lightning would step on an incomplete accumulation at the end of an epoch: leave those batches out.
            limit_train_batches=batches - batches % self.plan.accumulation,
            deterministic=True if on_cpu else "warn",  # some CUDA kernels have no deterministic version
            callbacks=callbacks,
            logger=logger,
            log_every_n_steps=max(1, min(_STEPS_PER_LOG_POINT, batches)),
            enable_checkpointing=self.folder is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,  # _check_shapes has run the model already
            use_distributed_sampler=False,  # the loaders split the images over the ranks themselves
            plugins=[AtomicCheckpointIO()],
        )


def _run_trainer(job: TrainingJob, history: History, bar: ProgressBar | None, on_epoch: OnEpoch | None) -> None:
    loader, task = job.train_loader(), job.task()
    average = MovingAverage(job.config.ema) if job.config.ema else None

    def report_epoch(*_: Any) -> None:
        # The average is one of the whole task, in which the names of the model start with "model.".
        if on_epoch is not None and job.layout.rank == 0:
            weights = job.model.state_dict() if average is None else average.weights("model.")
            if isinstance(job.model, QatNetwork):
                weights = job.model.train_form_state(weights)
            on_epoch(tuple(history.records), weights)

    # The epoch decides the order of the images.
    set_epoch = LambdaCallback(on_train_epoch_start=lambda trainer, _: loader.set_epoch(trainer.current_epoch))
    report = LambdaCallback(on_train_epoch_end=report_epoch)
    # In this order: the record of an epoch exists before it is reported, and both before it is saved.
    callbacks: list[L.Callback | None] = [history, set_epoch, report, average, bar]
    if isinstance(job.model, QatNetwork):
        callbacks.append(QatSchedule(job.model, job.config))
    if job.folder is not None:
        callbacks.append(CheckpointSaver(job.folder, job.config.save_steps))
    trainer = job.trainer([callback for callback in callbacks if callback is not None], len(loader))
    trainer.fit(
        task,
        DeferredLoader(loader),
        DeferredLoader(job.validation_loader()),
        ckpt_path=job.checkpoint,
        weights_only=True,  # unpickles tensors and plain data only
    )
    if average is not None:
        average.copy_into(task)


@contextmanager
def _training_mode(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Training mode in the given memory format inside; eval mode, contiguous, on the CPU afterwards."""
    model.train()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.eval().cpu()
        if channels_last:
            model.to(memory_format=torch.contiguous_format)


def _check_shapes(model: nn.Module, data: TrainingData) -> None:
    """Run the model on one blank image, before hours of data loading show that it does not fit."""
    try:
        with eval_mode(model), torch.no_grad():
            problem = check_shapes(model, data, device_of(model))
    except RuntimeError as error:
        raise UsageError(f"The model does not take images of shape {data.test_shape}: {first_line(error)}.") from error
    if problem is not None:
        raise UsageError(problem)


_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def isolate_lightning() -> Iterator[None]:
    """Run a Trainer inside without its log output, and restore global state; Ctrl-C raises ``KeyboardInterrupt``."""
    # By level rather than by handler: handlers of the root logger would still print.
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    # Trainer(deterministic=True) sets torch's global switches and cuBLAS's environment variable.
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, cublas = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    handler = signal.getsignal(signal.SIGINT)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # Its warnings are about settings that are deliberate here.
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    except SystemExit as end:
        # On Ctrl-C Lightning 2.6 ignores SIGINT from then on and raises SystemExit in place of KeyboardInterrupt.
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        os.environ.pop(_CUBLAS, None)
        if cublas is not None:
            os.environ[_CUBLAS] = cublas
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


@final
class DeferredLoader:
    """A loader whose iterators do no work before their first batch is read.

    Lightning calls ``iter`` more often than it reads: each call would start worker processes and count as a pass over
    the data.
    """

    def __init__(self, loader: TrainLoader | ValLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._loader  # a generator: the inner iter() runs at the first next()
