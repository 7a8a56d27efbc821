"""The range of an activation tensor, from a histogram of its values over calibration images."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from repvgg.errors import UsageError
from repvgg.quantization.affine import ActivationQuantizer

#: How the range is chosen: the smallest mean squared error, a percentile of the values, or all of them.
RangeMethod = Literal["mse", "percentile", "minmax"]

_BINS = 2048
_CANDIDATES = 100  # ranges that are tried by "mse", from 1 % of the largest value up


@final
class Histogram:
    """Counts of the values of an activation tensor between its extremes.

    Values are added in two passes over the calibration images: the first finds the extremes (:meth:`observe_range`),
    the second counts (:meth:`count`).
    """

    def __init__(self) -> None:
        self.lowest, self.highest = 0.0, 0.0  # 0 is always represented: padding and ReLU produce it
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def observe_range(self, x: Tensor) -> None:
        """Widen the extremes to those of ``x``.

        Raises:
            UsageError: a value is NaN or infinite.
        """
        lowest, highest = (float(value) for value in x.detach().aminmax())
        if not (abs(lowest) < float("inf") and abs(highest) < float("inf")):
            raise UsageError("An activation is NaN or infinite on the calibration images: check the images.")
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)

    def count(self, x: Tensor) -> None:
        """Count the values of ``x``."""
        if self.highest > self.lowest:
            self.counts += torch.histc(x.detach().float(), _BINS, self.lowest, self.highest).double()

    @property
    def values(self) -> Tensor:
        """The centres of the bins."""
        width = (self.highest - self.lowest) / _BINS
        return self.lowest + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)

    def clipped_share(self, quantizer: ActivationQuantizer) -> float:
        """The share of the values outside the bounds of ``quantizer``."""
        lowest, highest = quantizer.bounds
        outside = (self.values < lowest) | (self.values > highest)
        return float(self.counts[outside].sum() / self.counts.sum().clamp_min(1))

    def squared_error(self, quantizer: ActivationQuantizer) -> float:
        """The sum of the squared errors of ``quantizer``, clipping included, with the values at the centres of bins."""
        values = self.values
        error = quantizer.dequantize(quantizer.quantize(values)) - values
        # Within a bin values are spread evenly, which rounding sees as an error of scale²/12.
        inside = quantizer.scale**2 / 12
        lowest, highest = quantizer.bounds
        clipped = (values < lowest) | (values > highest)
        return float((self.counts * torch.where(clipped, error.square(), torch.full_like(error, inside))).sum())


def choose_quantizer(
    histogram: Histogram, method: RangeMethod = "mse", percentile: float = 99.99
) -> ActivationQuantizer:
    """Return the quantizer of an activation tensor.

    Args:
        histogram: of the tensor over the calibration images.
        method: ``"mse"`` shrinks both ends of the range in proportion to where the mean squared error is smallest,
            ``"percentile"`` clips values beyond a percentile at each end, ``"minmax"`` none.
        percentile: share of the values in percent that ``"percentile"`` keeps below the upper end.

    Raises:
        UsageError: ``percentile`` is not in (50, 100].
    """
    if not 50 < percentile <= 100:
        raise UsageError(f"A percentile is in (50, 100], got {percentile}.")
    lowest, highest = histogram.lowest, histogram.highest
    full = ActivationQuantizer.of_range(lowest, highest)
    if method == "minmax" or not histogram.counts.sum():
        return full
    if method == "percentile":
        cumulated = histogram.counts.cumsum(0) / histogram.counts.sum()
        above = histogram.values[cumulated >= percentile / 100][0]
        below = histogram.values[cumulated >= 1 - percentile / 100][0]
        return ActivationQuantizer.of_range(max(lowest, min(0.0, float(below))), min(highest, float(above)))
    shrunk = (
        ActivationQuantizer.of_range(lowest * step / _CANDIDATES, highest * step / _CANDIDATES)
        for step in range(_CANDIDATES, 0, -1)
    )
    return min(shrunk, key=histogram.squared_error)
