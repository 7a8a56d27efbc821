"""The classification task: what one step, one validation and the optimizer are. Lightning does the rest."""

from __future__ import annotations

from typing import Any, final

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from repvgg.models import TrainingOutput
from repvgg.training.config import TrainConfig
from repvgg.training.optim import build_optimizer
from repvgg.training.seeding import seeded

LOSS = "loss"
HELD_OUT_ACCURACY = "held_out_accuracy"


def classification_loss(
    output: Tensor | TrainingOutput, labels: Tensor, label_smoothing: float = 0.0, auxiliary_weight: float = 0.1
) -> Tensor:
    """Cross entropy of the logits, plus that of every auxiliary head: ``L(main) + w · Σ_k L(aux_k)``.

    Args:
        output: logits (N, K), or a :class:`~repvgg.models.TrainingOutput`.
        labels: (N,) int64.
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

    Logs ``loss`` (mean over the steps of an epoch) and ``held_out_accuracy``.

    Args:
        model: from images (N, C, H, W) to logits (N, K) or a :class:`~repvgg.models.TrainingOutput`.
        config: the run.
        num_classes: K.
        augment: applied to every training batch on the device, under a seed of its own a step.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, num_classes: int, augment: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.augment = augment if augment is not None else nn.Identity()
        self.held_out_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        """Return what the model returns."""
        out: Tensor | TrainingOutput = self.model(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one augmented batch."""
        images, labels = batch
        with seeded("step", self.config.seed, self.global_step):
            output = self(self._layout(self.augment(images)))
        loss = classification_loss(output, labels, self.config.label_smoothing, self.config.auxiliary_weight)
        self.log(LOSS, loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count the right predictions of one batch."""
        images, labels = batch
        self.held_out_accuracy(self(self._layout(images)), labels)
        self.log(HELD_OUT_ACCURACY, self.held_out_accuracy, on_step=False, on_epoch=True, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """SGD and its schedule, advanced after every step."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(total * self.config.optim.warmup_epochs / self.config.epochs)
        optimizer, schedule = build_optimizer(self.model, self.config.optim, total, warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _layout(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)
