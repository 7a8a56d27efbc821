"""Sequential composition ``outer(inner(x))``, and when it is one convolution up to and over the border."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from repvgg.algebra.axis import Axis, compose_axes, inner_placement
from repvgg.algebra.convmap import Border, ConvMap
from repvgg.algebra.kernel import Kernel
from repvgg.algebra.operations import open_groups
from repvgg.errors import BorderError, NotLinearError


def compose(inner: ConvMap, outer: ConvMap) -> ConvMap:
    """The one convolution that equals ``outer(inner(x))``.

    ``W[o, i, s1·d2·k2 + d1·k1] = Σ_m W2[o, m, k2] · W1[m, i, k1]`` and ``b = b2 + Σ_{m,k2} W2[o, m, k2] · b1[m]``.

    Raises:
        NotLinearError: the channels do not fit.
        BorderError: the outer map pads, and what it pads is not what the inner map computes out there: a bias that
            leaks into zero padding, an inner kernel that still sees the image from beyond it, or paddings of
            different kinds.
    """
    if inner.out_channels != outer.in_channels:
        raise NotLinearError(f"{inner.out_channels} channels do not fit a map of {outer.in_channels}")
    border = _border(inner, outer)
    y, x = (compose_axes(first, second) for first, second in zip(inner.axes, outer.axes, strict=True))
    if outer.kernel.unit:
        return ConvMap.from_axes(inner.kernel, inner.bias, (y, x), border)
    if inner.kernel.unit:
        return ConvMap.from_axes(outer.kernel, outer.bias, (y, x), border)
    return ConvMap.from_axes(_kernel(inner, outer, (y, x)), _bias(inner, outer), (y, x), border)


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
    return conv.stride == (1, 1) and all(axis.growth == 0 for axis in conv.axes)


def _bias(inner: ConvMap, outer: ConvMap) -> Tensor | None:
    if inner.bias is None:
        return outer.bias
    sums = outer.weight.sum((2, 3)).view(outer.groups, -1, outer.kernel.shape[1])
    passed = torch.bmm(sums, inner.bias.view(outer.groups, -1, 1)).flatten()
    return passed if outer.bias is None else passed + outer.bias


def _kernel(inner: ConvMap, outer: ConvMap, axes: tuple[Axis, Axis]) -> Kernel:
    """The merged kernel, tap by tap of the outer one."""
    groups = gcd(inner.groups, outer.groups)
    if not inner.is_depthwise and not outer.is_depthwise:
        inner, outer = open_groups(inner, groups), open_groups(outer, groups)
    first, second = inner.weight, outer.weight
    if outer.kernel_size == (1, 1):
        return Kernel.of(_mix(inner, first, outer, second[:, :, 0, 0]), groups)
    shape = (outer.out_channels, inner.in_channels // groups, axes[0].kernel, axes[1].kernel)
    weight_OIHW = second.new_zeros(shape)
    for row in range(outer.kernel_size[0]):
        for column in range(outer.kernel_size[1]):
            y = inner_placement(inner.axes[0], outer.axes[0], axes[0], row)
            x = inner_placement(inner.axes[1], outer.axes[1], axes[1], column)
            weight_OIHW[:, :, y.slice, x.slice] += _mix(inner, first, outer, second[:, :, row, column])
    return Kernel.of(weight_OIHW, groups)


def _mix(inner: ConvMap, first_OIHW: Tensor, outer: ConvMap, tap_OI: Tensor) -> Tensor:
    """``Σ_m W2[o, m] · W1[m, i, :, :]`` for one tap of W2, over the channels m in between; shape (O, I, H1, W1)."""
    if outer.is_depthwise:
        return first_OIHW * tap_OI.view(-1, 1, 1, 1)
    groups, height, width = outer.groups, *inner.kernel_size
    tap = tap_OI.reshape(groups, -1, tap_OI.shape[1])  # (g, O/g, M/g)
    if inner.is_depthwise:
        kernel = tap[..., None, None] * first_OIHW.view(groups, 1, -1, height, width)
    else:
        kernel = torch.bmm(tap, first_OIHW.reshape(groups, tap.shape[2], -1))  # (g, O/g, I/g·H·W)
    return kernel.reshape(outer.out_channels, -1, height, width)


def resample(conv: ConvMap, axes: tuple[Axis, Axis], border: Border | None = None) -> ConvMap:
    """Pad, crop or skip pixels of the output of ``conv``: ``axes`` are of kernel size 1.

    Raises:
        BorderError: see :func:`compose`.
    """
    unit = ConvMap.identity(conv.out_channels, conv.dtype, conv.device)
    return compose(conv, ConvMap.from_axes(unit.kernel, None, axes, border))
