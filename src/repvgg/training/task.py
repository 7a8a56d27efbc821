"""The tasks as LightningModules: what every task does in a training step, and classification."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from repvgg._contexts import seeded
from repvgg.errors import TrainingError, require
from repvgg.models import TrainingOutput
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import BatchPlan, plan_batches
from repvgg.training.optim import build_optimizer, equivalent_l2
from repvgg.training.records import EpochRecord, Record

_LOSS_KEY = "repvgg_losses"  # in last.ckpt; checkpoints in the field have it


def classification_loss(
    output: Tensor | TrainingOutput, labels: Tensor, label_smoothing: float = 0.0, auxiliary_weight: float = 0.1
) -> Tensor:
    """Return the cross entropy of the logits plus that of every auxiliary head: ``L(main) + w · Σ_k L(aux_k)``.

    Args:
        output: logits (N, K), or a :class:`~repvgg.models.TrainingOutput`.
        labels: (N,) int64, or probabilities (N, K).
        label_smoothing: probability mass of the target that is spread evenly over all classes.
        auxiliary_weight: w.
    """
    if not isinstance(output, TrainingOutput):
        return F.cross_entropy(output, labels, label_smoothing=label_smoothing)
    main, *auxiliary = (
        F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        for logits in (output.logits, *output.auxiliary)
    )
    return main + auxiliary_weight * sum(auxiliary, torch.zeros_like(main))


class TrainingTask(L.LightningModule, ABC):
    """Train ``model``, whose weights are updated in place; a subclass adds the loss and the metrics.

    Args:
        model: from images (N, C, H, W) to the output of the task.
        config: the run.
        prepare: from a batch of the loader to the input of the model; runs on the device.
        plan: the batch split and the learning rate; None plans for a single device.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, prepare: nn.Module | None = None, plan: BatchPlan | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.prepare = nn.Identity() if prepare is None else prepare
        self.plan = plan_batches(config) if plan is None else plan
        # All strategies but "disable" skip or replace NaN, which would hide a diverged run.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.val_loss = MeanMetric(nan_strategy="disable")
        self._compiled: Callable[[Tensor], Any] | None = None

    @abstractmethod
    def loss(self, output: Tensor | TrainingOutput, targets: Tensor) -> Tensor:
        """Return the training loss of a batch, a scalar."""

    @abstractmethod
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Update the validation metrics with a batch of images and targets."""

    @abstractmethod
    def finish_epoch(self, epoch: int, lr: float, seconds: float, images_per_second: float) -> Record:
        """Return the metrics of an epoch over all processes, and reset them.

        Raises:
            TrainingError: the training loss is not finite.
        """

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Combine the images of a batch with each other; the default is none of that."""
        return images, targets

    def resize(self, images: Tensor) -> Tensor:
        """Bring training images (N, C, H, W) to the size of this step, see ``TrainConfig.progressive``."""
        if not self.config.progressive:
            return images
        # By the step, not the epoch: short runs have few epochs, and a resumed one goes on with the same sizes.
        scale = self.config.training_scale(self.global_step / self.trainer.estimated_stepping_batches)
        size = [max(1, round(scale * length)) for length in images.shape[2:]]
        return images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=True)

    def on_fit_start(self) -> None:
        # Compiled only now: the moving average deep-copies the task before this hook, and torch.compile's module must
        # not be in the copy. The lambda keeps it out of this module's state_dict.
        if self.config.compile:
            compiled = torch.compile(self.model)
            self._compiled = lambda x: compiled(x)

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        out: Tensor | TrainingOutput = (self.model if self._compiled is None else self._compiled)(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        # Seeded by position, not by history: a resumed run draws the same mixing weights and dropout masks.
        with seeded("step", self.config.seed, self.global_step, batch_idx, self.global_rank):
            images, targets = self.mix(self.resize(self.prepare(images)), targets)
            output = self(self.to_memory_format(images))
        loss = self.loss(output, targets)
        self.train_loss.update(loss.detach())  # before the penalty, so that recorded losses are comparable
        if self.trainer.loggers:
            self.log("step_loss", loss.detach(), on_step=True, on_epoch=False)
        if self.config.optim.custom_l2:
            loss = loss + self.config.optim.weight_decay / 2 * equivalent_l2(self.model)
        return loss

    def mean_loss(self) -> float:
        """Return the mean training loss of the epoch so far, over the steps of all processes.

        Raises:
            TrainingError: it is not finite.
        """
        loss = float(self.train_loss.compute())
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss of epoch {self.current_epoch + 1} is {loss}: take a lower learning rate, or clip gradients."
            )
        return loss

    def on_validation_epoch_start(self) -> None:
        # Each process has updated its running statistics on its own images: evaluate those of rank 0 everywhere.
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A run may resume in the middle of an epoch: the losses so far, summed over all processes, go with it.
        with self.train_loss.sync_context():
            checkpoint[_LOSS_KEY] = {"sum": self.train_loss.mean_value.clone(), "steps": self.train_loss.weight.clone()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_rank == 0:  # the saved sum is that of all processes: one of them continues it
            self.train_loss.mean_value = checkpoint[_LOSS_KEY]["sum"].to(self.device)
            self.train_loss.weight = checkpoint[_LOSS_KEY]["steps"].to(self.device)

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * self.config.optim.warmup_epochs / self.config.epochs)
        optimizer, schedule = build_optimizer(self.model, self.config.optim, total, warmup, self.plan.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def to_memory_format(self, images: Tensor) -> Tensor:
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=memory_format)


@final
class ClassificationTask(TrainingTask):
    """Train ``model`` on labelled images.

    Args:
        model: from images (N, C, H, W) to logits (N, K) or a :class:`~repvgg.models.TrainingOutput`.
        config: the run.
        num_classes: K.
        prepare: see :class:`TrainingTask`.
        plan: see :class:`TrainingTask`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        num_classes: int,
        prepare: nn.Module | None = None,
        plan: BatchPlan | None = None,
    ) -> None:
        super().__init__(model, config, prepare, plan)
        self.mixing = _mixing(config, num_classes)
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.mixing is None:
            return images, targets
        mixed: tuple[Tensor, Tensor] = self.mixing(images, targets)
        return mixed

    def loss(self, output: Tensor | TrainingOutput, targets: Tensor) -> Tensor:
        return classification_loss(output, targets, self.config.label_smoothing, self.config.auxiliary_weight)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(self.to_memory_format(self.prepare(images)))
        # In float32 and summed by image: the last batch is smaller.
        self.val_loss.update(F.cross_entropy(logits.float(), labels), len(labels))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def finish_epoch(self, epoch: int, lr: float, seconds: float, images_per_second: float) -> EpochRecord:
        loss = self.mean_loss()
        top1, top5 = float(self.top1.compute()), float(self.top5.compute())
        val_loss = float(self.val_loss.compute())
        # Lightning resets only metrics that are logged as objects.
        for metric in (self.train_loss, self.top1, self.top5, self.val_loss):
            metric.reset()
        return EpochRecord(epoch, loss, top1, top5, lr, seconds, images_per_second, val_loss)


def _mixing(config: TrainConfig, num_classes: int) -> nn.Module | None:
    """Mixup or CutMix, if wanted; with both, one of them is drawn for each batch."""
    if not (config.mixup or config.cutmix):
        return None
    v2 = require("torchvision.transforms.v2", "train")
    choices = [v2.MixUp(alpha=config.mixup, num_classes=num_classes)] if config.mixup else []
    choices += [v2.CutMix(alpha=config.cutmix, num_classes=num_classes)] if config.cutmix else []
    mix: nn.Module = choices[0] if len(choices) == 1 else v2.RandomChoice(choices)
    return mix
