"""The operations of the algebra. Each one is exact, or raises an error that says why it would not be.

Shapes: weights are (O, I, *K) with I the input channels of one group and K the sizes along the axes of the map, whose
number all maps of one operation share; per-channel vectors are (O,). M are the channels between two composed maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from math import gcd
from typing import Any

import torch
from torch import Tensor

from repvgg.algebra.axis import Axis, compose_axes, inner_placement, merge_axes, placement_in, symmetric_axis
from repvgg.algebra.convmap import Border, ConvMap
from repvgg.algebra.kernel import Kernel
from repvgg.errors import BorderError, NotLinearError


def scale(conv: ConvMap, factor_O: Tensor) -> ConvMap:
    """Return ``factor · conv(x)``, channel by channel: kernel and bias are multiplied, the geometry stays."""
    bias = conv.bias if conv.bias is None or conv.bias.is_meta else conv.bias * factor_O
    return replace(conv, kernel=conv.kernel.scaled(factor_O), bias=bias)


def shift(conv: ConvMap, offset_O: Tensor) -> ConvMap:
    """Return ``conv(x) + offset``, channel by channel."""
    return replace(conv, bias=offset_O if conv.bias is None else _sum(conv.bias, offset_O))


def add(*terms: ConvMap) -> ConvMap:
    """Return ``Σ_k term_k(x)``: kernels are aligned and added tap by tap, biases are added.

    Groups are kept if all terms have the same, and are otherwise opened only as far as the terms differ.

    Raises:
        NotLinearError: channels, strides or the number of axes differ.
        BorderError: the outputs have different sizes, or the terms continue the input differently beyond the border.
    """
    if len(terms) == 1:
        return terms[0]
    shapes = {(term.in_channels, term.out_channels) for term in terms}
    if len(shapes) > 1:
        text = " and ".join(f"{i}→{o}" for i, o in sorted(shapes))
        raise NotLinearError(f"maps of different channels ({text}) cannot be added into one convolution")
    axes = _merged_axes(terms)
    groups = gcd(*(term.groups for term in terms))
    kernel, *others = (_embedded(term, axes, groups) for term in terms)
    for other in others:
        kernel = kernel.plus(other)
    biases = [term.bias for term in terms if term.bias is not None]
    return ConvMap.from_axes(kernel, reduce(_sum, biases) if biases else None, axes, common_border(terms))


def concatenate(parts: Sequence[ConvMap]) -> ConvMap:
    """Concatenate the outputs of all ``parts`` on the same input along the channels.

    Raises:
        NotLinearError: input channels, strides or the number of axes differ.
        BorderError: the outputs have different sizes, or the parts continue the input differently beyond the border.
    """
    if len({part.in_channels for part in parts}) > 1:
        raise NotLinearError("maps of inputs with different channels cannot be concatenated into one convolution")
    axes = _merged_axes(parts)
    # Parts have different outputs, so no number of groups fits all of them in general.
    weight_OIK = torch.cat([_embedded(part, axes, 1).dense() for part in parts])
    has_bias = any(part.bias is not None for part in parts)
    bias = torch.cat([part.bias_or_zeros() for part in parts]) if has_bias else None
    return ConvMap.from_axes(Kernel.of(weight_OIK, 1), bias, axes, common_border(parts))


def select_channels(conv: ConvMap, channels: slice) -> ConvMap:
    """Return the output channels ``channels`` of ``conv``; groups are opened unless all channels are kept."""
    if channels.indices(conv.out_channels) == (0, conv.out_channels, 1):
        return conv
    weight_OIK = open_groups(conv, 1).weight[channels]
    bias = None if conv.bias is None else conv.bias[channels]
    return replace(conv, kernel=Kernel.of(weight_OIK, 1), bias=bias)


def constant(conv: ConvMap, value_O: Tensor) -> ConvMap:
    """Return the map whose output is ``value`` wherever ``conv`` has an output: a kernel of zeros, and a bias."""
    zeros = torch.zeros(conv.kernel.shape, dtype=conv.dtype, device=conv.device)
    return replace(conv, kernel=Kernel.of(zeros, conv.groups), bias=value_O)


def replace_channels(conv: ConvMap, channels: slice, part: ConvMap) -> ConvMap:
    """Return ``conv`` with the output channels ``channels``, a slice of step 1, replaced by those of ``part``.

    Raises:
        NotLinearError: ``part`` has another number of channels; else see :func:`concatenate`.
    """
    start, stop, step = channels.indices(conv.out_channels)
    if step != 1 or stop - start != part.out_channels:
        raise NotLinearError(f"{part.out_channels} channels do not fit the channels {start}:{stop}:{step}")
    ends = [select_channels(conv, rest) for rest in (slice(start), slice(stop, None))]
    parts = [piece for piece in (ends[0], part, ends[1]) if piece.out_channels]
    return part if len(parts) == 1 else concatenate(parts)


def over_axes(conv: ConvMap, spatial: int) -> ConvMap:
    """Return the same map of channels over another number of axes, as nn.Linear and a 1x1 convolution are the same.

    Raises:
        NotLinearError: the map is not pointwise, so its axes matter.
    """
    if conv.spatial == spatial:
        return conv
    if not conv.is_pointwise:
        raise NotLinearError(f"a map over {conv.spatial} axes that is not pointwise does not apply to {spatial} axes")
    return ConvMap(conv.kernel.over_axes(spatial), conv.bias)


def open_groups(conv: ConvMap, groups: int) -> ConvMap:
    """Return the same map written with fewer ``groups`` (a divisor); the kernels between groups are zero."""
    if conv.groups % groups:
        raise NotLinearError(f"a map of {conv.groups} groups cannot be written with {groups}")
    return replace(conv, kernel=_embedded(conv, conv.axes, groups))


def embed(conv: ConvMap, axes: tuple[Axis, ...]) -> ConvMap:
    """Return the same map in a larger kernel: ``axes`` must contain its taps; new taps are zero."""
    if axes == conv.axes:
        return conv
    # A kernel that never read past the border may be padded with anything: its new taps are zero.
    return ConvMap.from_axes(_embedded(conv, axes, conv.groups), conv.bias, axes, conv.border or "zeros")


def with_symmetric_padding(conv: ConvMap) -> ConvMap:
    """Return the same map with equal padding, at least 0, on opposite sides, as ``nn.Conv2d`` requires."""
    return embed(conv, tuple(map(symmetric_axis, conv.axes)))


def common_border(parts: Sequence[ConvMap]) -> Border | None:
    """Return what all ``parts`` assume beyond the border; raise BorderError if they differ."""
    borders = sorted({part.border for part in parts if part.border is not None})
    if len(borders) > 1:
        raise BorderError(f"branches that continue the image by {' and by '.join(borders)} do not merge")
    return borders[0] if borders else None


def compose(inner: ConvMap, outer: ConvMap) -> ConvMap:
    """Return the one convolution that equals ``outer(inner(x))``, borders included.

    ``W[o, i, s1·d2·k2 + d1·k1] = Σ_m W2[o, m, k2] · W1[m, i, k1]`` and ``b = b2 + Σ_{m,k2} W2[o, m, k2] · b1[m]``.

    Raises:
        NotLinearError: the channels or the number of axes do not fit.
        BorderError: the outer map pads, and what it pads with is not what the inner map would compute there: a bias
            that leaks into zero padding, an inner kernel that still sees the image from beyond its border, or paddings
            of different kinds.
    """
    _require_same_axes((inner, outer))
    if inner.out_channels != outer.in_channels:
        raise NotLinearError(f"{inner.out_channels} channels do not fit a map of {outer.in_channels}")
    border = _composed_border(inner, outer)
    axes = tuple(map(compose_axes, inner.axes, outer.axes))
    # Identities are common (they start every symbolic trace) and must not cost a product.
    if outer.kernel.unit and outer.bias is None:
        return ConvMap.from_axes(inner.kernel, inner.bias, axes, border)
    bias = _composed_bias(inner, outer)  # a shift is an identity with a bias
    if outer.kernel.unit:
        return ConvMap.from_axes(inner.kernel, bias, axes, border)
    if inner.kernel.unit:
        return ConvMap.from_axes(outer.kernel, bias, axes, border)
    return ConvMap.from_axes(_composed_kernel(inner, outer, axes), bias, axes, border)


def resample(conv: ConvMap, axes: tuple[Axis, ...], border: Border | None = None) -> ConvMap:
    """Pad, crop or subsample the output of ``conv``: ``axes`` have kernel size 1, one for each axis of the map.

    Raises:
        BorderError: see :func:`compose`.
    """
    unit = ConvMap.identity(conv.out_channels, conv.dtype, conv.device, conv.spatial)
    return compose(conv, ConvMap.from_axes(unit.kernel, None, axes, border))


def pad_with_bias(conv: ConvMap, axes: tuple[Axis, ...]) -> ConvMap:
    """Pad the output of ``conv`` with its bias, the value that it has where the input is zero.

    ``axes`` have kernel size 1 and padding of at least 0. The result is ``conv`` with more zero padding, so that a
    convolution without padding may follow: padding with the bias is how DBB and ECB keep their branches exact.

    Raises:
        BorderError: next to the border, ``conv`` would not give its bias: its kernel still reads the image there, or it
            continues the image by anything but zeros.
    """
    padded = resample(replace(conv, bias=None), axes, "zeros")
    return replace(padded, bias=conv.bias)


def _require_same_axes(parts: Sequence[ConvMap]) -> None:
    first = parts[0].spatial
    for part in parts:
        if part.spatial != first:
            raise NotLinearError(f"a map over {first} axes and one over {part.spatial} do not merge")


def _sum(left_O: Tensor, right_O: Tensor) -> Tensor:
    # Meta tensors have no values, and adding them is slow.
    return left_O if left_O.is_meta and right_O.is_meta else left_O + right_O


def _merged_axes(parts: Sequence[ConvMap]) -> tuple[Axis, ...]:
    _require_same_axes(parts)
    return tuple(map(merge_axes, zip(*(part.axes for part in parts), strict=True)))


def _embedded(conv: ConvMap, axes: tuple[Axis, ...], groups: int) -> Kernel:
    """The kernel of ``conv`` at its taps in a map with ``axes``, written with ``groups`` groups."""
    places = tuple(map(placement_in, conv.axes, axes))
    return conv.kernel.embedded(tuple([axis.kernel for axis in axes]), groups, places)


def _composed_border(inner: ConvMap, outer: ConvMap) -> Border | None:
    """What the composition assumes beyond the border; raises BorderError if no assumption makes it exact."""
    if outer.border is None:
        return inner.border
    if outer.border == "zeros":
        _require_zeros_outside(inner, outer)
        return "zeros"
    if inner.is_pointwise:
        return outer.border
    keeps_size = all(axis.stride == 1 and axis.growth == 0 for axis in inner.axes)
    if outer.border == inner.border == "circular" and keeps_size:
        return "circular"  # on a torus, convolution and padding commute
    raise BorderError(f"a {outer.border} padding after a map that is not pointwise continues its output, not its input")


def _require_zeros_outside(inner: ConvMap, outer: ConvMap) -> None:
    """Check that the inner map, evaluated beyond the border, gives the zeros that the outer one pads with."""
    if inner.border not in (None, "zeros"):
        raise BorderError(f"a zero padding after a {inner.border} padding continues the image in two ways")
    for first, second in zip(inner.axes, outer.axes, strict=True):
        if not first.stays_zero_outside(second.before > 0, second.after > 0):
            raise BorderError(
                "a padded convolution after one with a kernel larger than 1 pads with zeros where the inner "
                "convolution would still see the image; move all padding to the first one"
            )
    # A meta bias has no values; assume the worst, so that a plan never relies on a zero.
    if inner.bias is not None and (inner.bias.is_meta or bool(inner.bias.any())):
        raise BorderError(
            "a bias in front of a zero-padded convolution leaks into the padding: pad with the bias, or drop it"
        )


def _composed_bias(inner: ConvMap, outer: ConvMap) -> Tensor | None:
    if inner.bias is None or (outer.bias is not None and outer.bias.is_meta):
        return outer.bias
    if inner.bias.is_meta:
        return inner.bias.new_empty(outer.out_channels)
    over_taps = outer.weight.sum(tuple(range(2, 2 + outer.spatial))) if outer.spatial else outer.weight
    sums = over_taps.view(outer.groups, -1, outer.kernel.shape[1])
    passed = torch.bmm(sums, inner.bias.view(outer.groups, -1, 1)).flatten()
    return passed if outer.bias is None else passed + outer.bias


def _composed_kernel(inner: ConvMap, outer: ConvMap, axes: tuple[Axis, ...]) -> Kernel:
    """The merged kernel, accumulated over the taps of the outer one."""
    groups = gcd(inner.groups, outer.groups)
    shape = (outer.out_channels, inner.in_channels // groups, *(axis.kernel for axis in axes))
    if outer.device.type == "meta":  # only the shape is known, and arithmetic on meta tensors is slow
        return Kernel.of(torch.empty(shape, dtype=outer.dtype, device="meta"), groups)
    # A depthwise map only scales channels, and needs no common number of groups.
    if not inner.is_depthwise and not outer.is_depthwise:
        inner, outer = open_groups(inner, groups), open_groups(outer, groups)
    first, second = inner.weight, outer.weight
    if max(outer.kernel_size, default=1) == 1:
        return Kernel.of(_mix(inner, first, outer, second.flatten(1)), groups)
    weight_OIK = second.new_zeros(shape)
    for taps in product(*map(range, outer.kernel_size)):
        places = map(inner_placement, inner.axes, outer.axes, axes, taps)
        read: tuple[Any, ...] = (..., *taps)
        write: tuple[Any, ...] = (..., *(place.slice for place in places))
        weight_OIK[write] += _mix(inner, first, outer, second[read])
    return Kernel.of(weight_OIK, groups)


def _mix(inner: ConvMap, first_MIK: Tensor, outer: ConvMap, tap_OM: Tensor) -> Tensor:
    """``Σ_m W2[o, m] · W1[m, i, ...]`` for one tap of W2; shape (O, I, *K1)."""
    ones = (1,) * inner.spatial
    if outer.is_depthwise:
        return first_MIK * tap_OM.view(-1, 1, *ones)
    groups, size = outer.groups, inner.kernel_size
    tap = tap_OM.reshape(groups, -1, tap_OM.shape[1])  # (g, O/g, M/g)
    if inner.is_depthwise:
        kernel = tap.view(*tap.shape, *ones) * first_MIK.view(groups, 1, -1, *size)
    else:
        kernel = torch.bmm(tap, first_MIK.reshape(groups, tap.shape[2], -1))  # (g, O/g, I/g · Π K1)
    return kernel.reshape(outer.out_channels, -1, *size)
