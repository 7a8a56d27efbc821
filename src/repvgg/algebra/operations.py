"""The operations of the algebra. Each is exact, or raises and says why it would not be.

Shapes: weights are (O, I, *K) with I the input channels of one group and K the sizes along the axes of the map, as many
for all maps in one operation; per-channel vectors are (O,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import gcd

import torch
from torch import Tensor

from repvgg.algebra.axis import Axis, merge_axes, placement_in, symmetric_axis
from repvgg.algebra.convmap import Border, ConvMap
from repvgg.algebra.kernel import Kernel
from repvgg.errors import BorderError, NotLinearError


def scale(conv: ConvMap, factor_O: Tensor) -> ConvMap:
    """``factor · conv(x)``, channel by channel: kernel and bias are multiplied, the geometry stays."""
    bias = None if conv.bias is None else conv.bias * factor_O
    return replace(conv, kernel=conv.kernel.scaled(factor_O), bias=bias)


def shift(conv: ConvMap, offset_O: Tensor) -> ConvMap:
    """``conv(x) + offset``, channel by channel."""
    return replace(conv, bias=offset_O if conv.bias is None else _sum(conv.bias, offset_O))


def add(*terms: ConvMap) -> ConvMap:
    """``Σ_k term_k(x)``: kernels are laid over each other tap by tap, biases are summed.

    Groups stay as they are where all terms have the same, and are opened only as far as the terms differ.

    Raises:
        NotLinearError: channels, strides or the number of axes differ.
        BorderError: the outputs have different sizes, or the terms go on differently beyond the border.
    """
    if len(terms) == 1:
        return terms[0]
    _require_same_channels(terms)
    axes = _merged_axes(terms)
    groups = gcd(*(term.groups for term in terms))
    kernel, *others = (_placed(term, axes, groups) for term in terms)
    for other in others:
        kernel = kernel.plus(other)
    biases = [term.bias for term in terms if term.bias is not None]
    return ConvMap.from_axes(kernel, reduce(_sum, biases) if biases else None, axes, common_border(terms))


def concatenate(parts: Sequence[ConvMap]) -> ConvMap:
    """The outputs of all ``parts`` on the same input, one after another along the channels.

    Raises:
        NotLinearError: input channels, strides or the number of axes differ.
        BorderError: the outputs have different sizes, or the parts go on differently beyond the border.
    """
    if len({part.in_channels for part in parts}) > 1:
        raise NotLinearError("maps of inputs with different channels cannot be concatenated into one convolution")
    axes = _merged_axes(parts)
    weight_OIK = torch.cat([_placed(part, axes, 1).dense() for part in parts])
    has_bias = any(part.bias is not None for part in parts)
    bias = torch.cat([part.bias_or_zeros() for part in parts]) if has_bias else None
    return ConvMap.from_axes(Kernel.of(weight_OIK, 1), bias, axes, common_border(parts))


def select_channels(conv: ConvMap, channels: slice) -> ConvMap:
    """The output channels ``channels`` of ``conv``; groups are opened unless all channels are kept."""
    if channels.indices(conv.out_channels) == (0, conv.out_channels, 1):
        return conv
    weight_OIK = open_groups(conv, 1).weight[channels]
    bias = None if conv.bias is None else conv.bias[channels]
    return replace(conv, kernel=Kernel.of(weight_OIK, 1), bias=bias)


def open_groups(conv: ConvMap, groups: int) -> ConvMap:
    """The same map written with fewer ``groups`` (a divisor), the kernels between groups being zero."""
    if conv.groups % groups:
        raise NotLinearError(f"a map of {conv.groups} groups cannot be written with {groups}")
    return replace(conv, kernel=_placed(conv, conv.axes, groups))


def embed(conv: ConvMap, axes: tuple[Axis, ...]) -> ConvMap:
    """The same map in a larger kernel: ``axes`` must hold its taps; new taps are zero."""
    if axes == conv.axes:
        return conv
    # A kernel that never read past the border may be given room there: its new taps are zero, so zeros do.
    return ConvMap.from_axes(_placed(conv, axes, conv.groups), conv.bias, axes, conv.border or "zeros")


def with_symmetric_padding(conv: ConvMap) -> ConvMap:
    """The same map with equal padding, at least 0, on opposite sides, as ``nn.Conv2d`` wants it."""
    return embed(conv, tuple(map(symmetric_axis, conv.axes)))


def common_border(parts: Sequence[ConvMap]) -> Border | None:
    """What all ``parts`` assume beyond the border.

    Raises:
        BorderError: they assume different things.
    """
    borders = sorted({part.border for part in parts if part.border is not None})
    if len(borders) > 1:
        raise BorderError(f"branches that continue the image by {' and by '.join(borders)} do not merge")
    return borders[0] if borders else None


def _sum(left_O: Tensor, right_O: Tensor) -> Tensor:
    """The sum of two vectors; on the meta device, where there are no values and adding is slow, either of them."""
    return left_O if left_O.is_meta and right_O.is_meta else left_O + right_O


def require_same_axes(parts: Sequence[ConvMap]) -> None:
    """Check that all ``parts`` are maps over the same number of axes.

    Raises:
        NotLinearError: they are not.
    """
    first = parts[0].spatial
    for part in parts:
        if part.spatial != first:
            raise NotLinearError(f"a map over {first} axes and one over {part.spatial} do not merge")


def _require_same_channels(terms: Sequence[ConvMap]) -> None:
    shapes = {(term.in_channels, term.out_channels) for term in terms}
    if len(shapes) > 1:
        text = " and ".join(f"{i}→{o}" for i, o in sorted(shapes))
        raise NotLinearError(f"maps of different channels ({text}) cannot be added into one convolution")


def _merged_axes(parts: Sequence[ConvMap]) -> tuple[Axis, ...]:
    require_same_axes(parts)
    return tuple(map(merge_axes, zip(*(part.axes for part in parts), strict=True)))


def _placed(conv: ConvMap, axes: tuple[Axis, ...], groups: int) -> Kernel:
    """The kernel of ``conv`` at its taps in a map with ``axes``, written with ``groups`` groups."""
    places = tuple(map(placement_in, conv.axes, axes))
    return conv.kernel.placed(tuple([axis.kernel for axis in axes]), groups, places)
