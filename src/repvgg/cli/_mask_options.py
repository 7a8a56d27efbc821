"""Options for segmentation networks that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from repvgg.cli._options import Number
from repvgg.errors import UsageError

if TYPE_CHECKING:
    from repvgg.training import SegmentationInference


@dataclass(frozen=True)
class InferenceOptions:
    """How a segmentation network is applied to an image.

    Attributes:
        window: masks: predict in sliding windows of so many pixels, 8k + 1, and average them (default: whole images).
        stride: masks: pixels between windows (default: two thirds of the window).
        flip: masks: average with the prediction for the mirror image.
        scales: masks: average over the image resized by these factors.
        tta: masks: flip, and the scales 0.5, 0.75, 1, 1.25, 1.5, 1.75.
    """

    window: Number = None
    stride: Number = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tta: bool = False

    @property
    def inference(self) -> SegmentationInference:
        """The same, checked.

        Raises:
            UsageError: an option is out of range, or --tta is given with --scales.
        """
        from repvgg.training import MULTI_SCALE, SegmentationInference

        if self.tta and self.scales != (1.0,):
            raise UsageError("--tta sets the scales: leave out --scales, or use --flip with --scales.")
        scales = MULTI_SCALE if self.tta else self.scales
        return SegmentationInference(self.window, self.stride, self.flip or self.tta, scales)
