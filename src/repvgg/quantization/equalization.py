"""Cross-layer equalization: rescale the channels between layers so that the channels of each weight have equal ranges.

With one scale per weight tensor, a channel a hundred times smaller than the largest one keeps 1 or 2 of its 8 bits. For
each channel between a layer that writes it with weights of range ``r_out`` and one that reads it with weights of range
``r_in``, dividing by ``s = sqrt(r_out / r_in)`` makes both ranges ``sqrt(r_out · r_in)`` (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1). The network computes the same
function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from repvgg.quantization.channel_graph import FIXED, ChannelGraph, Layer, trace_channels

_MAX_SWEEPS = 20
_CONVERGED = 0.01  # largest change of the logarithm of a scale in a sweep
_LARGEST_SCALE = 1e12  # of a channel with hardly any weights: larger factors would leave float32


@final
@dataclass(frozen=True)
class LayerSpread:
    """The ranges of the output channels of a layer: ``max / median`` of ``max |w|`` over those that are not 0."""

    name: str
    before: float
    after: float
    free_channels: int  # how many of them could be rescaled
    channels: int
    reason: str | None  # why none could


@final
@dataclass(frozen=True, eq=False)
class LayerFactors:
    """What equalization did to a layer, in float64: weights (O, I/groups, …) times ``weight``, biases over ``output``.

    Attributes:
        weight: (O, I/groups).
        output: (O,).
    """

    weight: Tensor
    output: Tensor


@final
@dataclass(frozen=True)
class EqualizationReport:
    """What :func:`equalize` did, layer by layer; ``factors`` by the name of the layer."""

    layers: tuple[LayerSpread, ...]
    sweeps: int
    factors: Mapping[str, LayerFactors] = field(default_factory=dict, repr=False, compare=False)

    @property
    def skipped(self) -> Mapping[str, str]:
        """The reason for each layer none of whose output channels could be rescaled."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason is not None}

    def __str__(self) -> str:
        free = sum(layer.free_channels > 0 for layer in self.layers)
        lines = [f"equalized the output channels of {free} of {len(self.layers)} layers"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  not rescaled: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def equalize(model: nn.Module, images: Tensor) -> tuple[nn.Module, EqualizationReport]:
    """Return a copy of ``model`` whose weights have channels of equal ranges, and which computes the same function.

    The result does not depend on how the channels of ``model`` were scaled, as far as they can be rescaled.

    Args:
        model: a plain network, without batch norms between layers, in any dtype; it is not changed.
        images: (N, C, H, W), to follow the channels through the network; their values do not matter.

    Raises:
        ExportError: ``torch.export`` cannot capture the model.
    """
    graph = trace_channels(model, images)
    result = copy.deepcopy(model).eval()
    state = result.state_dict(keep_vars=True)
    weights = {layer.weight: _magnitudes(state[layer.weight], layer) for layer in graph.layers}
    scales, sweeps = _solve(graph, weights)
    factors = _rescale(state, graph, scales)
    spreads = []
    for layer in graph.layers:
        after = _magnitudes(state[layer.weight], layer)
        free = int((layer.outputs != FIXED).sum())
        before = weights[layer.weight]
        reason = None if free else graph.reasons.get(layer.weight)
        spreads.append(LayerSpread(layer.name, _spread(before), _spread(after), free, len(layer.outputs), reason))
    return result, EqualizationReport(tuple(spreads), sweeps, factors)


def rescale_randomly(model: nn.Module, images: Tensor, *, largest: float = 1000.0, seed: int = 0) -> nn.Module:
    """Return a copy of ``model`` that computes the same function, with weights that are hard to quantize.

    Each channel that :func:`equalize` may rescale gets a factor between ``1 / largest`` and ``largest``, uniform on a
    logarithmic scale. The arguments are those of :func:`equalize`.
    """
    graph = trace_channels(model, images)
    result = copy.deepcopy(model).eval()
    draw = torch.Generator().manual_seed(seed)
    bound = math.log(largest)
    scales = torch.empty(graph.num_variables, dtype=torch.float64).uniform_(-bound, bound, generator=draw).exp()
    scales[FIXED] = 1.0
    _rescale(result.state_dict(keep_vars=True), graph, scales)
    return result


def _rescale(state: Mapping[str, Tensor], graph: ChannelGraph, scales: Tensor) -> dict[str, LayerFactors]:
    """Divide channels by ``scales`` where they are written and multiply by them where they are read, in place."""
    factors: dict[str, LayerFactors] = {}
    with torch.no_grad():
        for layer in graph.layers:
            weight = state[layer.weight]
            out, into = scales[layer.outputs], scales[layer.inputs]
            factor = _per_weight(into, layer, weight.shape[0]) / out[:, None]
            weight.copy_(weight.double() * factor.reshape(*factor.shape, *[1] * (weight.ndim - 2)))
            if layer.bias is not None:
                state[layer.bias].copy_(state[layer.bias].double() / out)
            factors[layer.name] = LayerFactors(factor, out)
    return factors


def channel_spread(weight: Tensor) -> float:
    """Return ``max / median`` of ``max |w|`` over the output channels (axis 0) of a weight that are not 0."""
    return _spread(weight.detach().double().abs().flatten(1))


def _spread(magnitudes: Tensor) -> float:
    ranges = magnitudes.amax(1)
    ranges = ranges[ranges > 0]
    return float(ranges.max() / ranges.median()) if len(ranges) else 1.0


def _magnitudes(weight: Tensor, layer: Layer) -> Tensor:
    """Return the largest |w| for each pair of output channel and input channel of its group: (O, I/groups)."""
    weight = weight.detach().double().abs()
    return weight if layer.kind == "linear" else weight.flatten(2).amax(2)


def _per_weight(values: Tensor, layer: Layer, out_channels: int) -> Tensor:
    """Return values of the input channels (I,) for each weight: (O, I/groups)."""
    return values.reshape(layer.groups, -1).repeat_interleave(out_channels // layer.groups, dim=0)


class _Group(NamedTuple):
    """Variables that are solved for together: those of the output channels of a layer."""

    variables: Tensor
    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]


def _groups(graph: ChannelGraph) -> list[_Group]:
    groups = []
    for layer in graph.layers:
        variables = torch.tensor(sorted(set(layer.outputs.tolist()) - {FIXED}), dtype=torch.long)
        if len(variables):
            producers = tuple(other for other in graph.layers if torch.isin(other.outputs, variables).any())
            consumers = tuple(other for other in graph.layers if torch.isin(other.inputs, variables).any())
            groups.append(_Group(variables, producers, consumers))
    return groups


def _solve(graph: ChannelGraph, weights: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the factor s of every variable, and the number of sweeps over the layers."""
    scales = torch.ones(graph.num_variables, dtype=torch.float64)
    groups = _groups(graph)
    # The starting point does not depend on how channels are scaled: every producer gets weights of range 1.
    for group in groups:
        producers = [layer for layer in group.producers if not torch.isin(layer.inputs, group.variables).any()]
        _set(scales, group, _ranges(producers, weights, scales, group.variables, written=True))
    sweeps = 0
    while sweeps < _MAX_SWEEPS:
        sweeps += 1
        before = scales.clone()
        for group in groups:
            written = _ranges(group.producers, weights, scales, group.variables, written=True)
            read = _ranges(group.consumers, weights, scales, group.variables, written=False)
            _set(scales, group, (written / read).sqrt())
        if float((scales / before).log().abs().max()) < _CONVERGED:
            break
    return scales, sweeps


def _set(scales: Tensor, group: _Group, found: Tensor) -> None:
    usable = found.isfinite() & (found > 0)  # a channel that nothing writes, or nothing reads, keeps its scale
    bounded = found.clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE)
    scales[group.variables] = torch.where(usable, bounded, torch.ones_like(found))


def _ranges(
    layers: Sequence[Layer], weights: Mapping[str, Tensor], scales: Tensor, variables: Tensor, *, written: bool
) -> Tensor:
    """Return the range of the weights that write (or read) the channels of ``variables``, with s = 1 for those."""
    unscaled = scales.index_fill(0, variables, 1.0)
    # A layer of a residual branch reads and writes the same variables: only one side of it is set to 1.
    into, out = (scales, unscaled) if written else (unscaled, scales)
    ranges = torch.zeros_like(scales)
    for layer in layers:
        scaled = weights[layer.weight] * _per_weight(into[layer.inputs], layer, len(layer.outputs))
        scaled = scaled / out[layer.outputs][:, None]
        if written:
            ranges.scatter_reduce_(0, layer.outputs, scaled.amax(1), "amax")
        else:
            ranges.scatter_reduce_(0, layer.inputs, _per_input(scaled, layer), "amax")
    return ranges[variables]


def _per_input(magnitudes: Tensor, layer: Layer) -> Tensor:
    """Return the largest magnitude over the weights that read each input channel: (I,)."""
    per_group = magnitudes.reshape(layer.groups, -1, magnitudes.shape[1])
    return per_group.amax(1).flatten()
