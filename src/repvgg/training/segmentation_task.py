"""The task of semantic segmentation: the loss and the metrics of images with masks."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from repvgg.data.label_sets import IGNORE_INDEX
from repvgg.data.segmentation_metrics import SegmentationEvaluation, confusion_matrix
from repvgg.models import TrainingOutput
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import BatchPlan
from repvgg.training.records import SegmentationRecord
from repvgg.training.task import TrainingTask


def segmentation_loss(
    output: Tensor | TrainingOutput,
    masks: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    auxiliary_weight: float = 0.4,
) -> Tensor:
    """Return the cross entropy of all pixels plus that of every auxiliary head: ``L(main) + w · Σ_k L(aux_k)``.

    L is the mean over the pixels that are not ignored; 0 where all are, with gradients of 0.

    Args:
        output: logits (N, K, H, W), or a :class:`~repvgg.models.TrainingOutput` of such.
        masks: (N, H, W), classes in 0 … K − 1 or ``ignore_index``.
        ignore_index: label of the pixels that do not count.
        label_smoothing: probability mass of the target that is spread evenly over all classes.
        auxiliary_weight: w.
    """
    masks = masks.long()
    count = (masks != ignore_index).sum().clamp_min(1)

    def mean(logits: Tensor) -> Tensor:
        # In float32: a sum over a million pixels overflows in half precision.
        total = F.cross_entropy(
            logits.float(), masks, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
        )
        return total / count

    if not isinstance(output, TrainingOutput):
        return mean(output)
    main = mean(output.logits)
    return main + auxiliary_weight * sum((mean(logits) for logits in output.auxiliary), torch.zeros_like(main))


@final
class SegmentationTask(TrainingTask):
    """Train ``model`` on images with masks.

    Args:
        model: from images (N, C, H, W) to logits (N, K, H, W) or a :class:`~repvgg.models.TrainingOutput` of such.
        config: the run.
        num_classes: K.
        prepare: see :class:`TrainingTask`.
        plan: see :class:`TrainingTask`.
        ignore_index: label of the pixels that do not count.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        num_classes: int,
        prepare: nn.Module | None = None,
        plan: BatchPlan | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(model, config, prepare, plan)
        self.ignore_index = ignore_index
        self.confusion = _Confusion(num_classes, ignore_index)

    def loss(self, output: Tensor | TrainingOutput, targets: Tensor) -> Tensor:
        config = self.config
        return segmentation_loss(output, targets, self.ignore_index, config.label_smoothing, config.auxiliary_weight)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        logits = self(self.to_memory_format(self.prepare(images))).float()
        # Weighted by pixels: images differ in size and in their share of ignored pixels.
        self.val_loss.update(segmentation_loss(logits, masks, self.ignore_index), (masks != self.ignore_index).sum())
        self.confusion.update(logits.argmax(1), masks)

    def finish_epoch(self, epoch: int, lr: float, seconds: float, images_per_second: float) -> SegmentationRecord:
        loss, val_loss = self.mean_loss(), float(self.val_loss.compute())
        result = SegmentationEvaluation(self.confusion.compute(), images=0)
        for metric in (self.train_loss, self.val_loss, self.confusion):
            metric.reset()
        return SegmentationRecord(
            epoch, loss, result.miou, result.pixel_accuracy, lr, seconds, images_per_second, val_loss
        )


class _Confusion(Metric):
    """One confusion matrix of pixels, summed over all processes."""

    full_state_update = False
    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        self._num_classes, self._ignore_index = num_classes, ignore_index
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        self.matrix += confusion_matrix(prediction, truth, self._num_classes, self._ignore_index)

    def compute(self) -> Tensor:
        return self.matrix
