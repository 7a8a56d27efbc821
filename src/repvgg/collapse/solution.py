"""The convolution that replaces a region, with its values, and what it replaces: both in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from repvgg import algebra
from repvgg.collapse.evaluator import Evaluator
from repvgg.collapse.insertion import Replacement
from repvgg.collapse.region import Region
from repvgg.symbolic import Source, SymbolicTensor, algebra_device, first_float, shadow_of
from repvgg.verify.float64 import Float64Mode


def solve(found: Replacement) -> SymbolicTensor:
    """Return the convolution that replaces a region, with the parts of norms that it absorbs."""
    symbol = solve_region(found.region)
    for more in found.absorbed:
        norm = solve_region(more.norm).map
        places, channels = more.places
        factor_O, offset_O = (symbol.map.bias_or_zeros().new_full((symbol.map.out_channels,), x) for x in (1.0, 0.0))
        factor_O[places] = norm.weight.flatten()[channels]
        if more.shifts:
            offset_O[places] = norm.bias_or_zeros()[channels]
        symbol = symbol.like(algebra.shift(algebra.scale(symbol.map, factor_O), offset_O), "batch_norm")
    return symbol


def solve_region(region: Region) -> SymbolicTensor:
    """Return the region's convolution with its values, in float64."""
    like = first_float(region.recording.module)
    device = algebra_device(like)
    evaluator = Evaluator(region.recording, _float64_on(device))
    planned = region.value.symbol
    new = Source(dtype=torch.float64 if like is None else like.dtype)
    source = SymbolicTensor.of(new, planned.map.in_channels, device=device, layout=planned.source.layout)
    # The report gives multiply-adds at these sizes.
    source.source.sizes = planned.source.sizes
    source.source.shape = planned.source.shape
    result: SymbolicTensor = region.run(evaluator, source)
    return result


def original_in_float64(found: Replacement) -> Callable[[Tensor], Tensor]:
    """Return what a region and the norms after it compute, run as the model runs them."""
    region = region_in_float64(found.region)
    axis = found.region.value.symbol.layout.axis
    norms = [(more, region_in_float64(more.norm)) for more in found.absorbed]

    def run(x: Tensor) -> Tensor:
        y = region(x).movedim(axis, 0).clone()
        for more, norm in norms:
            places, channels = more.places
            # The norm takes all of its channels; those of other convolutions are zero.
            given = y.new_zeros((more.norm.value.symbol.map.in_channels, *y.shape[1:]))
            given[channels] = y[places]
            result, zeros = (norm(part.movedim(0, axis)).movedim(axis, 0) for part in (given, torch.zeros_like(given)))
            y[places] = (result if more.shifts else result - zeros)[channels]
        return y.movedim(0, axis)

    return run if norms else region


def region_in_float64(region: Region) -> Callable[[Tensor], Tensor]:
    """Return what a region computes."""
    like = first_float(region.recording.module)
    device = algebra_device(like)
    # Kernels are converted by the mode, while they are used.
    has_float64 = like is not None and like.device == device
    evaluator = Evaluator(region.recording, _float64_on(device), keep_kernels=has_float64)

    def run(x: Tensor) -> Any:
        mode = nullcontext() if like is None or like.dtype is torch.float64 else Float64Mode(like.dtype)
        with mode:
            return region.run(evaluator, x.to(device))

    return run


def module_in_float64(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what a module computes."""
    shadow = shadow_of(module, _float64_on(device), training=False, compute_weights=True)
    return lambda x: shadow(x.to(device))


def _float64_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device=device, dtype=torch.float64)


class MergedChain(nn.Module):
    """A chain with the merged convolution in place, between the permutations, reshapes and means that stay."""

    def __init__(self, region: Region, conv: nn.Module) -> None:
        super().__init__()
        self.region, self.conv = region, conv

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedChain:
        return MergedChain(self.region, copy.deepcopy(self.conv, memo))  # the region refers to the whole model

    def forward(self, x: Tensor) -> Any:
        device = next(self.conv.parameters()).device
        evaluator = Evaluator(self.region.recording, _float64_on(device))
        return self.region.run_in_place(evaluator, self.conv, x.to(device))
