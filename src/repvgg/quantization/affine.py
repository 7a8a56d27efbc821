"""Affine quantization of tensors to integers of 8 bits or fewer: the formulas, and the choice of the scale.

    q = clamp(round(x / scale) + zero_point, lowest, highest)        x' = scale · (q − zero_point)

Rounding is half to even, as in ONNX's ``QuantizeLinear``. Weights are symmetric (zero point 0) and signed, activations
asymmetric and unsigned (uint8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from repvgg.errors import UsageError

#: Of the sum of two adjacent weights: 255 · 128 is the largest multiple of 255 that 16 bits hold.
PAIR_BOUND = 128

#: One scale for a whole weight tensor, or one for each output channel.
Granularity = Literal["per_tensor", "per_channel"]

# Of a tensor of zeros: any positive number represents it. The product of two such scales must not underflow in float32.
_SMALLEST_SCALE = 2.0**-60
_WEIGHT_CANDIDATES = 40  # scales that are tried for weights between zero and the full range


@final
@dataclass(frozen=True)
class ActivationQuantizer:
    """The uint8 quantization of an activation tensor.

    Attributes:
        scale: step of the integers, a float32 number.
        zero_point: the integer that represents 0, in [0, 255].
    """

    scale: float
    zero_point: int

    LOWEST = 0
    HIGHEST = 255

    @classmethod
    def of_range(cls, lowest: float, highest: float) -> ActivationQuantizer:
        """Return the quantizer whose integers span ``[lowest, highest]``, widened to contain 0 exactly."""
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
        scale = _float32(max((highest - lowest) / 255, _SMALLEST_SCALE))
        return cls(scale, min(max(round(-lowest / scale), 0), 255))

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest number that is represented; others are clipped to them."""
        return self.scale * (self.LOWEST - self.zero_point), self.scale * (self.HIGHEST - self.zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the integers of ``x`` as a tensor of its own dtype."""
        return torch.clamp(self.unclipped(x), self.LOWEST, self.HIGHEST)

    def unclipped(self, x: Tensor) -> Tensor:
        """Return ``round(x / scale) + zero_point``: those outside [0, 255] are clipped to it."""
        return torch.round(x / self.scale) + self.zero_point

    def dequantize(self, q: Tensor) -> Tensor:
        """Return the numbers that the integers ``q`` represent."""
        return self.scale * (q - self.zero_point)


@final
@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight tensor in integers: ``weight ≈ scale · integers``, axis 0 being output channels.

    Attributes:
        integers: int8, in ``[−2^(bits−1) + 1, 2^(bits−1) − 1]``.
        scale: float32; of shape () per tensor, (O,) per channel.
    """

    integers: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights that are represented."""
        return self.integers.to(dtype) * over_axis_0(self.scale.to(dtype), self.integers.ndim)


def largest_integer(bits: int) -> int:
    """Return the largest integer of a symmetric weight, ``2^(bits−1) − 1``; the smallest is its negative."""
    return (1 << (bits - 1)) - 1


def over_axis_0(values: Tensor, ndim: int) -> Tensor:
    """Return ``values`` of shape () or (O,) so that they broadcast over the axes after axis 0 of ``ndim`` axes."""
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (ndim - 1))


def adjacent_weights(shape: Sequence[int]) -> Tensor:
    """Return, for each weight of an output channel, the one that integer kernels add its product to first.

    Kernels of CPUs without VNNI instructions (``vpmaddubsw``) multiply unsigned inputs by signed weights and add the
    products of two adjacent weights in 16 bits, where sums beyond ±32767 saturate. Weights are adjacent in the order
    (kernel position, input channel), as in kernels for NHWC inputs.

    Args:
        shape: of the weight, (O, I, kH, kW) or (O, I).

    Returns:
        (D,) indices into the D weights of an output channel; the last one of an odd number is its own.
    """
    order = torch.arange(math.prod(shape[1:])).reshape(shape[1], -1).T.flatten()
    pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
    partner = torch.arange(len(order))
    partner[pairs[:, 0]], partner[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return partner


def quantize_weight(
    weight: Tensor,
    granularity: Granularity,
    bits: int = 8,
    *,
    clip: bool = True,
    smallest_scale: Tensor | float = 0.0,
    pair_bound: bool = False,
) -> QuantizedWeight:
    """Round weights to integers, with the scale of the smallest mean squared error.

    Args:
        weight: (O, …), of a convolution (O, I, kH, kW) or a linear layer (O, I).
        granularity: one scale for all, or one per output channel.
        bits: 2 to 8; 7 keeps the 16-bit sums of pairs of products in CPUs without VNNI instructions from saturating.
        clip: search for a scale that clips the largest weights where this lowers the error; otherwise the largest
            weight is represented.
        smallest_scale: lower bound of the scales, a number or (O,).
        pair_bound: keep the sum of :func:`adjacent_weights` within ±:data:`PAIR_BOUND`, by moving both of them.

    Raises:
        UsageError: ``bits`` is out of range, or a weight is not finite.
    """
    if not 2 <= bits <= 8:
        raise UsageError(f"Weights have 2 to 8 bits, got {bits}.")
    weight = weight.detach().double()
    if not weight.isfinite().all():
        raise UsageError("A weight is NaN or infinite: a network with such weights cannot be quantized.")
    highest = largest_integer(bits)
    partner = _partners(weight.shape, per_tensor=granularity == "per_tensor") if pair_bound else None
    rows = weight.reshape(1, -1) if granularity == "per_tensor" else weight.flatten(1)
    largest = rows.abs().amax(1).clamp_min(_SMALLEST_SCALE * highest)
    best = largest / highest
    if clip:
        errors = torch.full_like(best, torch.inf)
        # Of bounded pairs, twice the scale is the largest that can be best: then no pair exceeds its bound.
        larger = range(1, _WEIGHT_CANDIDATES + 1) if pair_bound else ()
        for step in (0, *range(-1, -_WEIGHT_CANDIDATES // 2 - 1, -1), *larger):  # the full range first: it wins ties
            scale = largest * (1 + step / _WEIGHT_CANDIDATES) / highest
            error = (_integers(rows, scale, highest, partner) * scale[:, None] - rows).square().sum(1)
            best = torch.where(error < errors, scale, best)
            errors = torch.minimum(error, errors)
    scale = best.reshape(() if granularity == "per_tensor" else (-1,))
    return round_weight(weight, scale, bits, smallest_scale, pair_bound=pair_bound)


def full_range_scale(weight: Tensor, granularity: Granularity, bits: int) -> Tensor:
    """Return the scales, in float64, that represent the largest weight: () per tensor, (O,) per channel."""
    magnitudes = weight.detach().double().abs()
    largest = magnitudes.amax() if granularity == "per_tensor" else magnitudes.flatten(1).amax(1)
    highest = largest_integer(bits)
    return largest.clamp_min(_SMALLEST_SCALE * highest) / highest


def round_weight(
    weight: Tensor, scale: Tensor, bits: int, smallest_scale: Tensor | float = 0.0, *, pair_bound: bool = False
) -> QuantizedWeight:
    """Round weights to integers with given scales.

    Args:
        weight: (O, …).
        scale: float64, () or (O,); rounded to float32 before it is used.
        bits: 2 to 8.
        smallest_scale: lower bound of the scales, a number or (O,).
        pair_bound: see :func:`quantize_weight`.
    """
    bound = torch.as_tensor(smallest_scale, dtype=torch.float64, device=weight.device)
    chosen = torch.maximum(scale, bound if scale.ndim else bound.amax()).float()
    rows = weight.detach().double()
    rows = rows.flatten(1) if scale.ndim else rows.reshape(1, -1)
    partner = _partners(weight.shape, per_tensor=scale.ndim == 0) if pair_bound else None
    integers = _integers(rows, chosen.double().reshape(-1), largest_integer(bits), partner)
    return QuantizedWeight(integers.reshape(weight.shape).to(torch.int8), chosen)


def _partners(shape: Sequence[int], *, per_tensor: bool) -> Tensor:
    """Return the indices of :func:`adjacent_weights` within the weights that share a scale."""
    partner = adjacent_weights(shape)
    if per_tensor:
        return torch.cat([partner + len(partner) * channel for channel in range(shape[0])])
    return partner


def _integers(rows: Tensor, scale: Tensor, highest: int, partner: Tensor | None) -> Tensor:
    integers = (rows / scale[:, None]).round().clamp(-highest, highest)
    if partner is None:
        return integers
    sums = integers + integers[:, partner]
    sums[:, partner == torch.arange(len(partner))] = 0  # of a weight without a partner
    excess = (sums.abs() - PAIR_BOUND).clamp_min(0)
    return integers - (excess / 2).ceil() * sums.sign()


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
