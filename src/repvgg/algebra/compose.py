"""Sequential composition ``outer(inner(x))``, and when it is one convolution up to and over the border.

Letters: O output, M middle and I input channels (of one group), K the sizes of a kernel along the axes, g groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from math import gcd
from typing import Any

import torch
from torch import Tensor

from repvgg.algebra.axis import Axis, compose_axes, inner_placement
from repvgg.algebra.convmap import Border, ConvMap
from repvgg.algebra.kernel import Kernel
from repvgg.algebra.operations import open_groups, require_same_axes
from repvgg.errors import BorderError, NotLinearError


def compose(inner: ConvMap, outer: ConvMap) -> ConvMap:
    """The one convolution that equals ``outer(inner(x))``.

    ``W[o, i, s1·d2·k2 + d1·k1] = Σ_m W2[o, m, k2] · W1[m, i, k1]`` and ``b = b2 + Σ_{m,k2} W2[o, m, k2] · b1[m]``.

    Raises:
        NotLinearError: the channels or the number of axes do not fit.
        BorderError: the outer map pads, and what it pads is not what the inner map computes out there: a bias that
            leaks into zero padding, an inner kernel that still sees the image from beyond it, or paddings of
            different kinds.
    """
    require_same_axes((inner, outer))
    if inner.out_channels != outer.in_channels:
        raise NotLinearError(f"{inner.out_channels} channels do not fit a map of {outer.in_channels}")
    border = _border(inner, outer)
    axes = tuple(map(compose_axes, inner.axes, outer.axes))
    if outer.kernel.unit:
        return ConvMap.from_axes(inner.kernel, inner.bias, axes, border)
    if inner.kernel.unit:
        return ConvMap.from_axes(outer.kernel, outer.bias, axes, border)
    return ConvMap.from_axes(_kernel(inner, outer, axes), _bias(inner, outer), axes, border)


def _border(inner: ConvMap, outer: ConvMap) -> Border | None:
    """What the composition assumes beyond the border, or a BorderError where no assumption makes it exact."""
    if outer.border is None:
        return inner.border
    if outer.border == "zeros":
        _require_zeros_outside(inner, outer)
        return "zeros"
    if inner.is_pointwise:
        return outer.border
    if outer.border == inner.border == "circular" and _keeps_size(inner):
        return "circular"  # on a torus every convolution commutes with the continuation
    raise BorderError(f"a {outer.border} padding after a map that is not pointwise continues its output, not its input")


def _require_zeros_outside(inner: ConvMap, outer: ConvMap) -> None:
    if inner.border not in (None, "zeros"):
        raise BorderError(f"a zero padding after a {inner.border} padding continues the image in two ways")
    for first, second in zip(inner.axes, outer.axes, strict=True):
        if not first.stays_zero_outside(second.before > 0, second.after > 0):
            raise BorderError(
                "a padded convolution after one with a kernel larger than 1 pads with zeros where the inner "
                "convolution would still see the image; move all padding to the first one"
            )
    if inner.bias is not None and _may_be_nonzero(inner.bias):
        raise BorderError(
            "a bias in front of a zero-padded convolution leaks into the padding: pad with the bias, or drop it"
        )


def _may_be_nonzero(bias_O: Tensor) -> bool:
    return bias_O.is_meta or bool(bias_O.any())


def _keeps_size(conv: ConvMap) -> bool:
    return all(axis.stride == 1 and axis.growth == 0 for axis in conv.axes)


def _bias(inner: ConvMap, outer: ConvMap) -> Tensor | None:
    if inner.bias is None:
        return outer.bias
    over_taps = outer.weight.sum(tuple(range(2, 2 + outer.spatial))) if outer.spatial else outer.weight
    sums = over_taps.view(outer.groups, -1, outer.kernel.shape[1])
    passed = torch.bmm(sums, inner.bias.view(outer.groups, -1, 1)).flatten()
    return passed if outer.bias is None else passed + outer.bias


def _kernel(inner: ConvMap, outer: ConvMap, axes: tuple[Axis, ...]) -> Kernel:
    """The merged kernel, tap by tap of the outer one."""
    groups = gcd(inner.groups, outer.groups)
    if not inner.is_depthwise and not outer.is_depthwise:
        inner, outer = open_groups(inner, groups), open_groups(outer, groups)
    first, second = inner.weight, outer.weight
    if max(outer.kernel_size, default=1) == 1:
        return Kernel.of(_mix(inner, first, outer, second[_at((0,) * outer.spatial)]), groups)
    shape = (outer.out_channels, inner.in_channels // groups, *(axis.kernel for axis in axes))
    weight_OIK = second.new_zeros(shape)
    for taps in product(*map(range, outer.kernel_size)):
        places = map(inner_placement, inner.axes, outer.axes, axes, taps)
        weight_OIK[_at(place.slice for place in places)] += _mix(inner, first, outer, second[_at(taps)])
    return Kernel.of(weight_OIK, groups)


def _at(taps: Iterable[Any]) -> tuple[Any, ...]:
    """The index of some taps of a kernel, for all its channels."""
    return (slice(None), slice(None), *taps)


def _mix(inner: ConvMap, first_MIK: Tensor, outer: ConvMap, tap_OM: Tensor) -> Tensor:
    """``Σ_m W2[o, m] · W1[m, i, ...]`` for one tap of W2, over the channels m in between; shape (O, I, *K1)."""
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


def resample(conv: ConvMap, axes: tuple[Axis, ...], border: Border | None = None) -> ConvMap:
    """Pad, crop or skip pixels of the output of ``conv``: ``axes`` are of kernel size 1, one for each axis of it.

    Raises:
        BorderError: see :func:`compose`.
    """
    unit = ConvMap.identity(conv.out_channels, conv.dtype, conv.device, conv.spatial)
    return compose(conv, ConvMap.from_axes(unit.kernel, None, axes, border))
