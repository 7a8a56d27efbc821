"""The classification task: what one step, one validation and the optimizer are. Lightning does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from repvgg.errors import TrainingError
from repvgg.models import TrainingOutput
from repvgg.training.config import TrainConfig
from repvgg.training.optim import build_optimizer
from repvgg.training.plan import BatchPlan, plan_batches
from repvgg.training.regularizer import equivalent_l2
from repvgg.training.seeding import seeded

TOP = 5
_LOSSES = "repvgg_losses"


def classification_loss(
    output: Tensor | TrainingOutput, labels: Tensor, label_smoothing: float = 0.0, auxiliary_weight: float = 0.1
) -> Tensor:
    """Cross entropy of the logits, plus that of every auxiliary head: ``L(main) + w · Σ_k L(aux_k)``.

    Args:
        output: logits (N, K), or a :class:`~repvgg.models.TrainingOutput`.
        labels: (N,) int64, or probabilities (N, K).
        label_smoothing: the share of the target spread evenly over all classes.
        auxiliary_weight: w.
    """
    if not isinstance(output, TrainingOutput):
        return F.cross_entropy(output, labels, label_smoothing=label_smoothing)
    main, *auxiliary = (
        F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        for logits in (output.logits, *output.auxiliary)
    )
    return main + auxiliary_weight * sum(auxiliary, torch.zeros_like(main))


@final
class ClassificationTask(L.LightningModule):
    """Trains ``model`` on labelled images as ``config`` says; the weights of ``model`` itself are moved.

    Args:
        model: from images (N, C, H, W) to logits (N, K) or a :class:`~repvgg.models.TrainingOutput`.
        config: the run.
        num_classes: K.
        prepare: from the images of a batch, as the loader gives them, to what the model takes; run on the device.
        plan: the batches and the learning rate; None is one device.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        num_classes: int,
        prepare: nn.Module | None = None,
        plan: BatchPlan | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.prepare = nn.Identity() if prepare is None else prepare
        self.plan = plan_batches(config) if plan is None else plan
        self.mix = _mix(config, num_classes)
        self.train_loss = MeanMetric(nan_strategy="disable")  # the others leave out what should be seen
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(TOP, num_classes))
        self._compiled: Callable[[Tensor], Any] | None = None

    def on_fit_start(self) -> None:
        """Compile, if asked: after the moving average has taken its copy, and as no part of what is saved."""
        if self.config.compile:
            compiled = torch.compile(self.model)
            self._compiled = lambda x: compiled(x)  # a module would be one more part

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        """Return what the model returns."""
        out: Tensor | TrainingOutput = (self.model if self._compiled is None else self._compiled)(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        with seeded("step", self.config.seed, self.global_step, batch_idx, self.global_rank):
            images, targets = self.mix(self.prepare(images), labels)
            output = self(self._layout(images))
        loss = classification_loss(output, targets, self.config.label_smoothing, self.config.auxiliary_weight)
        self.train_loss.update(loss.detach())
        if self.trainer.loggers:
            self.log("step_loss", loss.detach(), on_step=True, on_epoch=False)
        if self.config.optim.custom_l2:
            loss = loss + self.config.optim.weight_decay / 2 * equivalent_l2(self.model)
        return loss

    def mean_loss(self) -> float:
        """The mean of the training loss over the steps of the epoch so far, and over all processes.

        Raises:
            TrainingError: it is no finite number.
        """
        loss = float(self.train_loss.compute())
        if not math.isfinite(loss):
            raise TrainingError(
                f"The loss of epoch {self.current_epoch + 1} is {loss}: take a lower learning rate, or clip gradients."
            )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Let all processes judge the same statistics, those of the first one."""
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right predictions of one batch."""
        images, labels = batch
        logits = self(self._layout(self.prepare(images)))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down the losses of the epoch so far, of all processes: it may go on from its middle."""
        with self.train_loss.sync_context():
            checkpoint[_LOSSES] = {"sum": self.train_loss.mean_value.clone(), "steps": self.train_loss.weight.clone()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from them, on one process."""
        if self.global_rank == 0:
            self.train_loss.mean_value = checkpoint[_LOSSES]["sum"].to(self.device)
            self.train_loss.weight = checkpoint[_LOSSES]["steps"].to(self.device)

    def configure_optimizers(self) -> Any:
        """SGD and its schedule, advanced after every step."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * self.config.optim.warmup_epochs / self.config.epochs)
        optimizer, schedule = build_optimizer(self.model, self.config.optim, total, warmup, self.plan.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _layout(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)


class _Unmixed(nn.Module):
    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels


def _mix(config: TrainConfig, num_classes: int) -> nn.Module:
    """Mixup, CutMix, or one of them drawn for each batch."""
    if not (config.mixup or config.cutmix):
        return _Unmixed()
    from torchvision.transforms import v2

    ways = [v2.MixUp(alpha=config.mixup, num_classes=num_classes)] if config.mixup else []
    ways += [v2.CutMix(alpha=config.cutmix, num_classes=num_classes)] if config.cutmix else []
    mix: nn.Module = ways[0] if len(ways) == 1 else v2.RandomChoice(ways)
    return mix
