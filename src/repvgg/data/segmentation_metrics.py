"""Pixels by true and predicted class: one confusion matrix, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from repvgg.data.label_sets import IGNORE_INDEX
from repvgg.errors import DataError

#: How a class without pixels in truth and prediction counts in a mean: not at all, or as 0.
AbsentClasses = Literal["ignore", "zero"]


@final
@dataclass(frozen=True)
class SegmentationEvaluation:
    """The pixels of N images by true and predicted class; ignored pixels are in no number.

    A class that is in neither truth nor prediction has no IoU (0/0). ``absent="ignore"`` leaves it out of the mean (as
    mmsegmentation), ``"zero"`` counts it as 0 (as hszhao/semseg). A class that is predicted but never true has IoU 0
    under both rules.
    """

    confusion: Tensor  # (K, K) int64, rows are true classes and columns predicted ones
    images: int  # N
    absent: AbsentClasses = "ignore"

    @property
    def pixels(self) -> int:
        """Number of pixels that are not ignored."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def iou(self) -> Tensor:
        """(K,) float64, ``TP / (TP + FP + FN)`` of each class; NaN for an absent one."""
        intersection = self.confusion.diagonal().double()
        return intersection / (self.confusion.sum(0) + self.confusion.sum(1) - intersection)

    @property
    def per_class(self) -> Tensor:
        """(K,) float64, share of the pixels of each class that are right; NaN for a class without pixels."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def miou(self) -> float:
        """Mean IoU in [0, 1]."""
        return self._mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean of the accuracies per class, in [0, 1]; under ``"ignore"`` over the classes that the truth has."""
        return self._mean(self.per_class)

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels that are right, in [0, 1]; NaN where all pixels are ignored."""
        return self.correct / self.pixels if self.pixels else float("nan")

    accuracy = pixel_accuracy

    @property
    def rule(self) -> str:
        """The rule for absent classes, in words, with their number."""
        count = int(self.iou.isnan().sum())
        if not count:
            return "every class occurs"
        left_out = "left out of the means" if self.absent == "ignore" else "counted as 0"
        return f"{count} {'class' if count == 1 else 'classes'} in neither truth nor prediction, {left_out}"

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics for the header of a checkpoint, those that are numbers."""
        found = {"held_out_miou": self.miou, "held_out_pixel_accuracy": self.pixel_accuracy}
        return {name: value for name, value in found.items() if value == value}

    @property
    def summary(self) -> str:
        """The result in a line."""
        return (
            f"mIoU {self.miou:.2%}  mean accuracy {self.mean_accuracy:.2%}  pixel accuracy {self.pixel_accuracy:.2%}"
            f"  {self.images:,} images"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as plain data; NaN is None."""
        return {
            "miou": _number(self.miou),
            "mean_accuracy": _number(self.mean_accuracy),
            "pixel_accuracy": _number(self.pixel_accuracy),
            "iou": [_number(value) for value in self.iou.tolist()],
            "accuracy": [_number(value) for value in self.per_class.tolist()],
            "absent_classes": self.absent,
            "correct": self.correct,
            "pixels": self.pixels,
            "images": self.images,
            "confusion": self.confusion.tolist(),
        }

    def __repr__(self) -> str:
        return f"SegmentationEvaluation(mIoU {self.miou:.2%}, pixel accuracy {self.pixel_accuracy:.2%})"

    def _mean(self, values: Tensor) -> float:
        return float(values.nanmean() if self.absent == "ignore" else values.nan_to_num(0.0).mean())


def confusion_matrix(prediction: Tensor, truth: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count pixels by class: (K, K) int64, rows are true classes and columns predicted ones.

    Args:
        prediction: classes in 0 … K − 1, of any shape.
        truth: classes in 0 … K − 1, or ``ignore_index``; of the same shape.
        num_classes: K.
        ignore_index: label of the pixels that are not counted.

    Raises:
        DataError: the truth has another label.
    """
    truth = truth.long()
    counted = truth != ignore_index
    labels = truth[counted]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise DataError(
            f"A mask has the label {int(wrong)}, but there are {num_classes} classes and {ignore_index} is ignored: "
            "see 'repvgg data check'."
        )
    pairs = labels * num_classes + prediction[counted]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _number(value: float) -> float | None:
    return value if value == value else None  # JSON has no NaN
