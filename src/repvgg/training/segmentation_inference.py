"""Apply a segmentation network to whole images: in one piece, in sliding windows, mirrored, at several scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg._serde import check_finite
from repvgg.errors import CheckpointError, UsageError

Segmenter: TypeAlias = Callable[[Tensor], Any]  # images (N, C, H, W) to logits (N, K, H, W)

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the scales that PSPNet's multi-scale numbers are measured with
_STRIDE = 2 / 3  # of a window


@final
@dataclass(frozen=True)
class SegmentationInference:
    """How the class probabilities of an image are computed.

    The default is one pass over the whole image. Everything else averages softmax probabilities: of each pixel over all
    windows that cover it, then over the image and its mirror image, then over the scales.

    Attributes:
        window: side of square sliding windows in pixels, 8k + 1; None takes the whole image. A smaller image is padded
            with the mean pixel.
        stride: distance of windows in pixels; None: two thirds of the window, rounded up. The last window of a row ends
            at the border, so it may be closer to the one before it.
        flip: average with the prediction for the mirror image.
        scales: factors by which the image is resized (bilinear); probabilities are resized back.

    Raises:
        UsageError: a value is out of range.
    """

    window: int | None = None
    stride: int | None = None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_finite(self)
        if self.window is not None:
            require_grid_size("A window", self.window)
        if self.stride is not None and (self.window is None or not 1 <= self.stride <= self.window):
            raise UsageError(
                f"A stride is at least 1 and at most the window, got stride {self.stride} and window {self.window}."
            )
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            raise UsageError(f"Scales are one or more factors in (0, 8], got {self.scales}.")

    @property
    def is_single_pass(self) -> bool:
        """Whether the network runs once on each image, as it is."""
        return self.window is None and not self.flip and self.scales == (1.0,)

    def __str__(self) -> str:
        parts = ["whole images"]
        if self.window is not None:
            parts = [f"windows of {self.window} pixels at stride {self._stride}"]
        if self.flip:
            parts.append("averaged with their mirror images")
        if self.scales != (1.0,):
            parts.append(f"scales {', '.join(f'{scale:g}' for scale in self.scales)}")
        return ", ".join(parts)

    def scores(self, model: Segmenter, x_NCHW: Tensor) -> Tensor:
        """Return scores (N, K, H, W) whose largest one is the predicted class: logits of a single pass, else means.

        Args:
            model: in eval mode.
            x_NCHW: normalized images.

        Raises:
            CheckpointError: the network returns no map of the size of the image, or NaN or infinity.
        """
        return _logits(model, x_NCHW) if self.is_single_pass else self.probabilities(model, x_NCHW)

    def probabilities(self, model: Segmenter, x_NCHW: Tensor) -> Tensor:
        """Return the probabilities (N, K, H, W) of the classes; the arguments are those of :meth:`scores`."""
        total: Tensor | float = 0.0
        for scale in self.scales:
            found = self._at_scale(model, x_NCHW, scale)
            if self.flip:
                found = (found + self._at_scale(model, x_NCHW.flip(3), scale).flip(3)) / 2
            total = total + found
        assert isinstance(total, Tensor)
        return total / len(self.scales)

    def _at_scale(self, model: Segmenter, x_NCHW: Tensor, scale: float) -> Tensor:
        size = x_NCHW.shape[2:]
        if scale == 1:
            return self._in_windows(model, x_NCHW)
        scaled = [max(1, round(side * scale)) for side in size]
        resized = F.interpolate(x_NCHW, scaled, mode="bilinear", align_corners=False)
        return F.interpolate(self._in_windows(model, resized), list(size), mode="bilinear", align_corners=False)

    @property
    def _stride(self) -> int:
        assert self.window is not None
        return self.stride or math.ceil(_STRIDE * self.window)

    def _in_windows(self, model: Segmenter, x_NCHW: Tensor) -> Tensor:
        if self.window is None:
            return _logits(model, x_NCHW).softmax(1)
        height, width = x_NCHW.shape[2:]
        # 0 is the mean pixel of a normalized image.
        x_NCHW = F.pad(x_NCHW, (0, max(0, self.window - width), 0, max(0, self.window - height)))
        total: Tensor | None = None
        count = x_NCHW.new_zeros(x_NCHW.shape[2:])
        for top in window_starts(x_NCHW.shape[2], self.window, self._stride):
            for left in window_starts(x_NCHW.shape[3], self.window, self._stride):
                rows, columns = slice(top, top + self.window), slice(left, left + self.window)
                found = _logits(model, x_NCHW[:, :, rows, columns].contiguous()).softmax(1)
                if total is None:
                    total = found.new_zeros(*found.shape[:2], *x_NCHW.shape[2:])
                total[:, :, rows, columns] += found
                count[rows, columns] += 1
        assert total is not None  # there is at least one window
        return (total / count)[:, :, :height, :width]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows along an axis begin: multiples of ``stride``, the last one so that it ends at the border."""
    count = math.ceil((length - window) / stride) + 1
    return [min(index * stride, length - window) for index in range(count)]


def require_grid_size(what: str, size: int) -> None:
    """Check that a side is 8k + 1: then the first and the last pixel are on the grid of the feature map (stride 8).

    Raises:
        UsageError: it is not.
    """
    if size < 9 or size % 8 != 1:
        below = max(9, (size - 1) // 8 * 8 + 1)
        raise UsageError(f"{what} has a side of 8k + 1 pixels, not {size}: take {below} or {below + 8}.")


def _logits(model: Segmenter, x_NCHW: Tensor) -> Tensor:
    logits = model(x_NCHW)
    if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[2:] != x_NCHW.shape[2:]:
        shape = tuple(getattr(logits, "shape", ()))
        raise CheckpointError(
            f"The model returns {shape} for images {tuple(x_NCHW.shape)}, which is no class for each pixel: "
            "take a segmentation network."
        )
    logits = logits.float()
    if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):  # the sum is cheap
        raise CheckpointError("The model returns NaN or infinity: its weights are broken.")
    return logits
