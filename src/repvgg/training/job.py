"""One process's part of a run: its batches, its task, and Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from torch import Tensor, nn

from repvgg.data import HeldOutLoader, OpenedData, TrainLoader
from repvgg.errors import UsageError
from repvgg.training.config import TrainConfig
from repvgg.training.plan import BatchPlan, Layout, plan_batches
from repvgg.training.saving import LAST, WholeFiles, place_of
from repvgg.training.task import ClassificationTask

HELD_OUT_BATCH = 256
TENSORBOARD = "tensorboard"  # its folder in that of the run
_PRECISION = {"float32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_LOGGED = 50  # steps between two points of TensorBoard's curves, at most


def on_cpu(config: TrainConfig) -> bool:
    """Whether a run computes on the CPU."""
    return config.accelerator == "cpu" or not torch.accelerator.is_available()


@final
class Lazily:
    """A loader whose passes begin with their first batch.

    Lightning calls ``iter`` more often than it reads: it would start loading processes in vain, and take for a pass
    what is none.
    """

    def __init__(self, loader: TrainLoader | HeldOutLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._loader


@final
@dataclass(frozen=True, eq=False)
class Job:
    """What one process of a run is to do.

    Attributes:
        model: what is trained.
        data: what to train on and what to judge by.
        config: the run.
        layout: the processes of the run, and which one this is.
        folder: where files go; None writes none.
        resume: go on from what is saved there.

    Raises:
        UsageError: the batch cannot be shared by the devices, or they do not do what the config asks for.
    """

    model: nn.Module
    data: OpenedData
    config: TrainConfig
    layout: Layout
    folder: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        plan, images = self.plan, self.data.num_train
        if self.config.precision == "fp16" and on_cpu(self.config):
            raise UsageError("A CPU does not train in fp16: take bf16 as the precision.")
        if plan.device_batch < 2:
            raise UsageError("Batch norm needs 2 images at a time on each device at least: take a larger batch.")
        if images is not None and images < plan.global_batch:
            raise UsageError(f"{images} training images do not fill one batch of {plan.global_batch}.")

    @property
    def plan(self) -> BatchPlan:
        """Its batches and its learning rate."""
        return plan_batches(self.config, self.layout.world_size)

    @property
    def saved(self) -> Path | None:
        """The file to go on from, where there is one."""
        path = self.folder / LAST if self.folder is not None and self.resume else None
        return path if path is not None and path.exists() else None

    def train_batches(self) -> TrainLoader:
        """The training batches of this process, from where it goes on.

        Raises:
            CheckpointError: what is saved cannot be read.
            UsageError: it stands in the middle of an epoch, and the batches were others.
        """
        layout = self.layout
        loader = self.data.train_batches(self.plan.device_batch, rank=layout.rank, world_size=layout.world_size)
        if self.saved is not None:
            place = place_of(self.saved)
            if place.batches and place.accumulation != self.plan.accumulation:
                raise UsageError(
                    f"The run was saved in the middle of an epoch with {place.accumulation} rounds a step, not "
                    f"{self.plan.accumulation}: go on with as many devices and the same device_batch."
                )
            loader.set_epoch(place.epoch)
            loader.skip(place.batches)
        return loader

    def held_out_batches(self) -> HeldOutLoader:
        """The share of this process of the images to judge by."""
        size, layout = min(HELD_OUT_BATCH, self.plan.device_batch), self.layout
        return self.data.held_out_batches(size, rank=layout.rank, world_size=layout.world_size)

    def task(self) -> ClassificationTask:
        """What Lightning runs."""
        return ClassificationTask(self.model, self.config, len(self.data.classes), self.data.prepare, self.plan)

    def trainer(self, callbacks: list[L.Callback], batches: int) -> L.Trainer:
        """Lightning's Trainer for epochs of ``batches`` batches on this process."""
        return L.Trainer(
            max_epochs=self.config.epochs,
            accelerator=self.config.accelerator,
            devices=self.layout.devices,
            num_nodes=self.layout.nodes,
            strategy=self._strategy(),
            precision=_PRECISION[self.config.precision],  # type: ignore[arg-type]
            accumulate_grad_batches=self.plan.accumulation,
            gradient_clip_val=self.config.optim.clip,
            limit_train_batches=batches - batches % self.plan.accumulation,
            deterministic=True if on_cpu(self.config) else "warn",
            callbacks=callbacks,
            logger=self._logger(),
            log_every_n_steps=max(1, min(_LOGGED, batches)),
            enable_checkpointing=self.folder is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            plugins=[WholeFiles()],
        )

    def _strategy(self) -> Any:
        if self.layout.world_size == 1:
            return "auto"
        from repvgg.training.several import Several

        return Several(process_group_backend="gloo" if on_cpu(self.config) else None)

    def _logger(self) -> Any:
        """TensorBoard's files in the run folder, where it is installed."""
        if self.folder is None or find_spec("tensorboard") is None:
            return False
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(self.folder, name="", version=TENSORBOARD)
