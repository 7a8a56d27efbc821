"""Which task a data set is for: labels make a classification, masks a semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from repvgg.data import ImageData, SegmentationData
from repvgg.data.segmentation_metrics import SegmentationEvaluation
from repvgg.errors import UsageError
from repvgg.models import Model, PSPNet, RepVGG, TrainingOutput
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import BatchPlan
from repvgg.training.evaluation import Evaluation, evaluate
from repvgg.training.segmentation_evaluation import evaluate_segmentation
from repvgg.training.segmentation_task import SegmentationTask, segmentation_loss
from repvgg.training.task import ClassificationTask, TrainingTask, classification_loss

TrainingData: TypeAlias = ImageData | SegmentationData
ValidationResult: TypeAlias = Evaluation | SegmentationEvaluation
Loss: TypeAlias = Callable[[Tensor | TrainingOutput, Tensor], Tensor]

_VALIDATION_BATCH = 256
_MASK_BATCH = 1  # whole images: they may differ in size, and one of them fills a device


def validation_batch(data: TrainingData) -> int:
    """Return how many validation images are evaluated at a time."""
    return _MASK_BATCH if isinstance(data, SegmentationData) else _VALIDATION_BATCH


def build_task(
    model: nn.Module, data: TrainingData, config: TrainConfig, plan: BatchPlan | None = None
) -> TrainingTask:
    """Return the LightningModule that trains ``model`` on ``data``."""
    classes = len(data.classes)
    if isinstance(data, SegmentationData):
        return SegmentationTask(model, config, classes, data.prepare, plan, data.ignore_index)
    return ClassificationTask(model, config, classes, data.prepare, plan)


def loss_function(data: TrainingData, config: TrainConfig) -> Loss:
    """Return the training loss of a batch: from the output of the model and labels or masks to a scalar."""
    smoothing, weight = config.label_smoothing, config.auxiliary_weight
    if isinstance(data, SegmentationData):
        ignore = data.ignore_index
        return lambda output, masks: segmentation_loss(output, masks, ignore, smoothing, weight)
    return lambda output, labels: classification_loss(output, labels, smoothing, weight)


def evaluate_on(model: nn.Module, data: TrainingData) -> ValidationResult:
    """Evaluate ``model`` on all validation images, whole images in one pass for a segmentation."""
    batches = data.val_batches(validation_batch(data))
    if isinstance(data, SegmentationData):
        return evaluate_segmentation(
            model, batches, data.prepare, num_classes=len(data.classes), ignore_index=data.ignore_index
        )
    return evaluate(model, batches, data.prepare)


def palette_of(data: SegmentationData) -> tuple[tuple[int, int, int], ...]:
    """Return the colours of the classes as plain numbers."""
    return tuple((int(red), int(green), int(blue)) for red, green, blue in data.palette)


def check_task(model: Model, name: str, data: TrainingData) -> None:
    """Check that a model is for the task of the data.

    Raises:
        UsageError: a classifier for masks, or a segmentation network for labels.
    """
    if isinstance(data, SegmentationData) and isinstance(model, RepVGG):
        raise UsageError(
            f"{data.uri} has masks, but {name} is a classifier: take a segmentation network, such as pspnet_repvgg_a0."
        )
    if isinstance(data, ImageData) and isinstance(model, PSPNet):
        raise UsageError(
            f"{name} is a segmentation network, but {data.uri} has no masks: take data with masks, such as masks:PATH."
        )


def check_shapes(model: nn.Module, data: TrainingData, device: torch.device) -> str | None:
    """Return what is wrong with the output of ``model`` (in eval mode) for one blank image; None if nothing is."""
    shape = data.input_shape if isinstance(data, SegmentationData) else data.test_shape
    output = tuple(model(torch.zeros(1, *shape, device=device)).shape)
    classes = len(data.classes)
    expected = (1, classes, *shape[1:]) if isinstance(data, SegmentationData) else (1, classes)
    if output == expected:
        return None
    return (
        f"{data.uri} has {classes} classes, but the model returns {output} for one image: "
        f"build it with num_classes={classes}."
    )
