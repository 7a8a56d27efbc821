"""Adaptive rounding: choose the integers of a layer by the error of its output instead of that of each weight.

The squared error of the outputs of one channel over calibration inputs x is ``(w' − w) H (w' − w)ᵀ``, where
``H = Σ x xᵀ`` over all positions of the kernel (the objective of AdaRound: Nagel et al., "Up or Down? Adaptive Rounding
for Post-Training Quantization", 2020, equation 13). It is minimized by coordinate descent over the integers: each
weight in turn takes the integer that is best given all others. The error never increases, and nothing has to be tuned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.errors import UsageError
from repvgg.quantization.affine import PAIR_BOUND, adjacent_weights, over_axis_0
from repvgg.quantization.layers import QuantizedConv2d, QuantizedLayer

_DAMPING = 0.01  # of the mean diagonal of H: directions that few calibration inputs have are left as they are
_BLOCK = 64  # weights of an output channel that are visited between updates of the whole gradient
_COLUMN_BYTES = 256 * 2**20  # of unfolded inputs at once
_EXACT_TERMS = 256  # products of integers of at most 255 whose sum is exact in float32: 255² · 256 < 2²⁴
_MOMENT_ELEMENTS = 2**22  # of the products of several blocks, which small layers multiply at once


def adapt_rounding(
    layer: QuantizedLayer,
    weight: Tensor,
    inputs: Iterable[Tensor],
    sweeps: int = 2,
    highest: int = 127,
    *,
    pair_bound: bool = False,
) -> float:
    """Replace the integers of ``layer`` by those of the smallest output error, in place.

    Args:
        layer: a quantized layer.
        weight: the float weight (O, I/groups, …) that it stands for.
        inputs: batches of inputs of the layer, as it receives them in the quantized network.
        sweeps: passes over the weights.
        highest: largest integer, ``2^(bits−1) − 1``.
        pair_bound: keep the sums of adjacent weights in their bound; see :func:`.affine.quantize_weight`.

    Returns:
        The squared output error after, divided by that before.
    """
    integers = layer.weight_integers
    groups = layer.groups if isinstance(layer, QuantizedConv2d) else 1
    scale = over_axis_0(layer.weight_scale.double(), 2).expand(len(integers), 1)
    partner = adjacent_weights(integers.shape) if pair_bound else None
    before = after = 0.0
    result = []
    with torch.no_grad():
        moments = _second_moments(layer, inputs, groups)
        rows = zip(
            weight.detach().double().flatten(1).chunk(groups),
            integers.double().flatten(1).chunk(groups),
            scale.chunk(groups),
            moments,
            strict=True,
        )
        for target, start, step, moment in rows:
            chosen = _descend(target, start, step, moment, sweeps, highest, partner)
            before += _error(start * step - target, moment)
            after += _error(chosen * step - target, moment)
            result.append(chosen)
        layer.weight_integers.copy_(torch.cat(result).reshape(integers.shape).to(torch.int8))
    return after / before if before else 1.0


def _descend(
    target: Tensor,
    start: Tensor,
    scale: Tensor,
    moment: Tensor,
    sweeps: int,
    highest: int,
    partner: Tensor | None,
) -> Tensor:
    """Return the integers (O, D) after coordinate descent from ``start``.

    Weights are visited in blocks: within one, its own part of the gradient is kept up to date, and after it the rest is
    by one matrix product, which takes a tenth of the time of as many outer products.
    """
    others = list(range(len(moment))) if partner is None else partner.tolist()
    step = scale[:, 0]
    integers = start.T.contiguous()  # (D, O): a weight of all output channels is contiguous
    gradient = moment @ (integers * step - target.T)
    curvature = moment.diagonal().tolist()
    for _ in range(sweeps):
        for first in range(0, len(moment), _BLOCK):
            block = slice(first, min(first + _BLOCK, len(moment)))
            local, within = gradient[block].clone(), moment[block, block]
            changes = torch.zeros_like(local)
            for row in range(len(local)):
                index = first + row
                best = (integers[index] - local[row] / (step * curvature[index])).round_().clamp_(-highest, highest)
                if others[index] != index:
                    other = integers[others[index]]
                    best = torch.minimum(torch.maximum(best, -PAIR_BOUND - other), PAIR_BOUND - other)
                torch.mul(best - integers[index], step, out=changes[row])
                integers[index] = best
                local.addr_(within[row], changes[row])
            gradient.addmm_(moment[:, block], changes)
    return integers.T


def _error(difference: Tensor, moment: Tensor) -> float:
    return float(((difference @ moment) * difference).sum())


def _unfold(x: Tensor, layer: QuantizedConv2d) -> Tensor:
    """Return what the kernel covers at each position: (N, I · kH · kW, positions)."""
    if isinstance(layer.padding, str):  # "same" and "valid"; the kernel is odd, so that both sides are padded alike
        sides = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = tuple(sides) if layer.padding == "same" else (0, 0)
    else:
        padding = layer.padding
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)


def _parts(layer: QuantizedLayer, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the inputs in parts whose unfolded form fits into memory."""
    for x in inputs:
        per_image = max(1, x[0].numel() * 8 * (layer.weight_integers[0, 0].numel() if x.ndim == 4 else 1))
        yield from torch.split(x, max(1, _COLUMN_BYTES // per_image))


def _second_moments(layer: QuantizedLayer, inputs: Iterable[Tensor], groups: int) -> list[Tensor]:
    """Return H of each group, (D, D) with D weights for each output channel, of the quantized inputs.

    The sums are those of integers and exact, so that H does not depend on how the inputs are divided.
    """
    total: Tensor | None = None
    for images in _parts(layer, inputs):
        columns = layer.centred_input(images).float()
        if isinstance(layer, QuantizedConv2d):
            columns = _unfold(columns, layer).movedim(1, 0).flatten(1)
        else:
            columns = columns.flatten(0, -2).T
        found = _exact_moments(columns.reshape(groups, -1, columns.shape[1]))
        total = found if total is None else total.add_(found)
    if total is None:
        raise UsageError("Adaptive rounding needs inputs: give at least one batch.")
    total *= layer.input_scale.double().square()
    for moment in total:
        diagonal = moment.diagonal()
        diagonal += _DAMPING * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return list(total)


def _exact_moments(columns: Tensor) -> Tensor:
    """Return ``Σ x xᵀ`` of each group, (G, D, D) in float64, for integers (G, D, positions) of at most ±255.

    Blocks of positions are multiplied in float32, in which their sums are exact, and added in float64.
    """
    groups, size, positions = columns.shape
    blocks = -(-positions // _EXACT_TERMS)
    columns = F.pad(columns, (0, blocks * _EXACT_TERMS - positions))
    columns = columns.reshape(groups, size, blocks, _EXACT_TERMS).movedim(2, 1)
    total = torch.zeros(groups, size, size, dtype=torch.float64, device=columns.device)
    for part in torch.split(columns, max(1, _MOMENT_ELEMENTS // total.numel()), dim=1):
        total += (part @ part.mT).double().sum(1)
    return total
