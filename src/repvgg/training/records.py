"""The metrics of an epoch. The field names are also the keys in ``log.csv``, ``report.json`` and ``last.ckpt``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, final


@final
@dataclass(frozen=True)
class EpochRecord:
    """The metrics of one epoch of a classification."""

    score_name: ClassVar[str] = "accuracy"

    epoch: int  # counted from 1
    loss: float  # mean training loss over the steps, without weight decay
    held_out_accuracy: float  # top-1 accuracy on the validation images after the epoch, in [0, 1]
    held_out_top5: float = float("nan")  # top-5 accuracy on them
    lr: float = float("nan")  # learning rate of the last step
    seconds: float = float("nan")  # wall time, including validation
    images_per_second: float = float("nan")  # training throughput over all devices, without validation
    held_out_loss: float = float("nan")  # mean cross entropy of the validation images, without label smoothing

    @property
    def score(self) -> float:
        """The metric that selects the best epoch, in [0, 1]."""
        return self.held_out_accuracy


@final
@dataclass(frozen=True)
class SegmentationRecord:
    """The metrics of one epoch of a semantic segmentation."""

    score_name: ClassVar[str] = "mIoU"

    epoch: int  # counted from 1
    loss: float  # mean training loss over the steps, without weight decay, with the auxiliary loss
    held_out_miou: float  # mean intersection over union on the validation images after the epoch, in [0, 1]
    held_out_pixel_accuracy: float = float("nan")  # share of their pixels that are right, ignored ones left out
    lr: float = float("nan")  # learning rate of the last step, of the first parameter group
    seconds: float = float("nan")  # wall time, including validation
    images_per_second: float = float("nan")  # training throughput over all devices, without validation
    held_out_loss: float = float("nan")  # mean cross entropy of the pixels of validation images, without the auxiliary

    @property
    def score(self) -> float:
        """The metric that selects the best epoch, in [0, 1]."""
        return self.held_out_miou


Record: TypeAlias = EpochRecord | SegmentationRecord


def record_from(data: dict[str, Any]) -> Record:
    """Return the record with these fields."""
    return SegmentationRecord(**data) if "held_out_miou" in data else EpochRecord(**data)
