"""The settings of a quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.errors import UsageError
from repvgg.quantization.affine import Granularity
from repvgg.quantization.ranges import RangeMethod


@final
@dataclass(frozen=True)
class QuantizationSettings:
    """How a network is quantized.

    Attributes:
        granularity: one scale for each weight tensor, or for each output channel.
        weight_bits: 2 to 8.
        pair_bound: keep the sums of two adjacent weights so small that the sums of their products, of 16 bits on CPUs
            without VNNI instructions, cannot saturate with 8-bit weights.
        ranges: how the range of an activation is chosen.
        percentile: share in percent for ``ranges="percentile"``.
        equalize: rescale channels between layers first.
        correct_biases: correct the mean of every output channel, layer by layer.
        rounding_sweeps: passes of adaptive rounding over the weights; 0 rounds to the nearest.

    Raises:
        UsageError: a value is out of range.
    """

    granularity: Granularity = "per_channel"
    weight_bits: int = 8
    pair_bound: bool = True
    ranges: RangeMethod = "mse"
    percentile: float = 99.99
    equalize: bool = True
    correct_biases: bool = True
    rounding_sweeps: int = 2

    def __post_init__(self) -> None:
        if self.granularity not in ("per_tensor", "per_channel"):
            raise UsageError(f"The granularity is 'per_tensor' or 'per_channel', got {self.granularity!r}.")
        if self.weight_bits not in range(2, 9):
            raise UsageError(f"Weights have 2 to 8 bits, got {self.weight_bits}.")
        if self.ranges not in ("mse", "percentile", "minmax"):
            raise UsageError(f"Ranges are chosen by 'mse', 'percentile' or 'minmax', got {self.ranges!r}.")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"A percentile is in (50, 100], got {self.percentile}.")
        if self.rounding_sweeps < 0:
            raise UsageError(f"The number of rounding sweeps is at least 0, got {self.rounding_sweeps}.")

    @property
    def weights(self) -> str:
        """How weights are represented, in words."""
        bounded = " in bounded pairs" if self.pair_bound and self.weight_bits == 8 else ""
        return f"{self.weight_bits}-bit weights {self.granularity.replace('_', ' ')}{bounded}"

    def __str__(self) -> str:
        parts = [self.weights, f"ranges by {self.ranges}"]
        parts += ["equalized"] * self.equalize
        parts += ["adaptive rounding"] * bool(self.rounding_sweeps)
        parts += ["biases corrected"] * self.correct_biases
        return ", ".join(parts)
