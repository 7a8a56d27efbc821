"""The operations of the algebra. Each is exact, or raises and says why it would not be.

Shapes: weights are OIHW with I the input channels of one group; per-channel vectors are (O,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from repvgg.algebra.axis import Axis, Placement, merge_axes, placement_in, symmetric_axis
from repvgg.algebra.convmap import Border, ConvMap
from repvgg.errors import BorderError, NotLinearError


def scale(conv: ConvMap, factor_O: Tensor) -> ConvMap:
    """``factor · conv(x)``, channel by channel: kernel and bias are multiplied, the geometry stays."""
    bias = None if conv.bias is None else conv.bias * factor_O
    return replace(conv, weight=conv.weight * factor_O.view(-1, 1, 1, 1), bias=bias, unit=False)


def shift(conv: ConvMap, offset_O: Tensor) -> ConvMap:
    """``conv(x) + offset``, channel by channel."""
    return replace(conv, bias=offset_O if conv.bias is None else conv.bias + offset_O)


def add(*terms: ConvMap) -> ConvMap:
    """``Σ_k term_k(x)``: kernels are laid over each other tap by tap, biases are summed.

    Groups stay as they are where all terms have the same, and are opened only as far as the terms differ.

    Raises:
        NotLinearError: channels or strides differ.
        BorderError: the outputs have different sizes, or the terms go on differently beyond the border.
    """
    if len(terms) == 1:
        return terms[0]
    _require_same_channels(terms)
    axes = _merged_axes(terms)
    groups = gcd(*(term.groups for term in terms))
    weight_OIHW = _sum_of_kernels(terms, axes, groups)
    biases = [term.bias for term in terms if term.bias is not None]
    bias = None
    for term_bias in biases:
        bias = term_bias if bias is None else bias + term_bias
    return ConvMap.from_axes(weight_OIHW, bias, axes, groups, common_border(terms))


def concatenate(parts: Sequence[ConvMap]) -> ConvMap:
    """The outputs of all ``parts`` on the same input, one after another along the channels.

    Raises:
        NotLinearError: input channels or strides differ.
        BorderError: the outputs have different sizes, or the parts go on differently beyond the border.
    """
    if len({part.in_channels for part in parts}) > 1:
        raise NotLinearError("maps of inputs with different channels cannot be concatenated into one convolution")
    axes = _merged_axes(parts)
    total = sum(part.out_channels for part in parts)
    weight_OIHW = parts[0].weight.new_zeros(total, parts[0].in_channels, axes[0].kernel, axes[1].kernel)
    start = 0
    for part in parts:
        rows = weight_OIHW[start : start + part.out_channels]
        _accumulate(rows, 1, part, _placements(part, axes))
        start += part.out_channels
    has_bias = any(part.bias is not None for part in parts)
    bias = torch.cat([part.bias_or_zeros() for part in parts]) if has_bias else None
    return ConvMap.from_axes(weight_OIHW, bias, axes, 1, common_border(parts))


def select_channels(conv: ConvMap, channels: slice) -> ConvMap:
    """The output channels ``channels`` of ``conv``; groups are opened unless all channels are kept."""
    if channels.indices(conv.out_channels) == (0, conv.out_channels, 1):
        return conv
    dense = open_groups(conv, 1)
    bias = None if dense.bias is None else dense.bias[channels]
    return replace(dense, weight=dense.weight[channels], bias=bias, unit=False)


def open_groups(conv: ConvMap, groups: int) -> ConvMap:
    """The same map written with fewer ``groups`` (a divisor), the kernels between groups being zero."""
    if groups == conv.groups:
        return conv
    if conv.groups % groups:
        raise NotLinearError(f"a map of {conv.groups} groups cannot be written with {groups}")
    weight_OIHW = conv.weight.new_zeros(conv.out_channels, conv.in_channels // groups, *conv.kernel_size)
    _accumulate(weight_OIHW, groups, conv, _placements(conv, conv.axes))
    return replace(conv, weight=weight_OIHW, groups=groups, unit=False)


def embed(conv: ConvMap, axes: tuple[Axis, Axis]) -> ConvMap:
    """The same map in a larger kernel: ``axes`` must hold its taps; new taps are zero."""
    if axes == conv.axes:
        return conv
    weight_OIHW = conv.weight.new_zeros(*conv.weight.shape[:2], axes[0].kernel, axes[1].kernel)
    _accumulate(weight_OIHW, conv.groups, conv, _placements(conv, axes))
    # A kernel that never read past the border may be given room there: its new taps are zero, so zeros do.
    return ConvMap.from_axes(weight_OIHW, conv.bias, axes, conv.groups, conv.border or "zeros")


def with_symmetric_padding(conv: ConvMap) -> ConvMap:
    """The same map with equal padding, at least 0, on opposite sides, as ``nn.Conv2d`` wants it."""
    y, x = conv.axes
    return embed(conv, (symmetric_axis(y), symmetric_axis(x)))


def common_border(parts: Sequence[ConvMap]) -> Border | None:
    """What all ``parts`` assume beyond the border.

    Raises:
        BorderError: they assume different things.
    """
    borders = sorted({part.border for part in parts if part.border is not None})
    if len(borders) > 1:
        raise BorderError(f"branches that continue the image by {' and by '.join(borders)} do not merge")
    return borders[0] if borders else None


def _require_same_channels(terms: Sequence[ConvMap]) -> None:
    shapes = {(term.in_channels, term.out_channels) for term in terms}
    if len(shapes) > 1:
        text = " and ".join(f"{i}→{o}" for i, o in sorted(shapes))
        raise NotLinearError(f"maps of different channels ({text}) cannot be added into one convolution")


def _merged_axes(parts: Sequence[ConvMap]) -> tuple[Axis, Axis]:
    height, width = ([part.axes[i] for part in parts] for i in (0, 1))
    return merge_axes(height), merge_axes(width)


def _placements(conv: ConvMap, axes: tuple[Axis, Axis]) -> tuple[Placement, Placement]:
    y, x = (placement_in(own, merged) for own, merged in zip(conv.axes, axes, strict=True))
    return y, x


def _sum_of_kernels(terms: Sequence[ConvMap], axes: tuple[Axis, Axis], groups: int) -> Tensor:
    """Start from a copy of a term that already has the shape of the sum, if there is one, and add the others."""
    base = next((term for term in terms if term.axes == axes and term.groups == groups), None)
    if base is None:
        some = terms[0]
        shape = (some.out_channels, some.in_channels // groups, axes[0].kernel, axes[1].kernel)
        weight_OIHW = some.weight.new_zeros(shape)
    else:
        weight_OIHW = base.weight.clone()
    for term in terms:
        if term is not base:
            _accumulate(weight_OIHW, groups, term, _placements(term, axes))
    return weight_OIHW


def _accumulate(into_OIHW: Tensor, groups: int, conv: ConvMap, places: tuple[Placement, Placement]) -> None:
    """Add the kernel of ``conv`` onto the right taps and channels of ``into``, which has ``groups`` groups."""
    taps = into_OIHW[:, :, places[0].slice, places[1].slice]
    if conv.groups == groups:
        taps += conv.weight
        return
    # (g, r, O/gr, r, I/gr, H, W): conv's own groups are the r diagonal blocks of each of the g groups.
    ratio = conv.groups // groups
    height, width = conv.kernel_size
    out_size, in_size = conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
    blocks = taps.view(groups, ratio, out_size, ratio, in_size, height, width)
    diagonal = blocks.diagonal(dim1=1, dim2=3)
    diagonal += conv.weight.view(groups, ratio, out_size, in_size, height, width).permute(0, 2, 3, 4, 5, 1)
