"""Element-wise functions, and arithmetic of tensors, numbers and constants."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from repvgg.engine import arguments
from repvgg.engine.graph import Binary, C, FeatureShape, Floats, H, Pointwise, W
from repvgg.engine.graph_builder import GraphBuilder, by_name, on_other_axes
from repvgg.engine.image_size import ImageSize
from repvgg.engine.recorder import Call
from repvgg.engine.views import View, grouping_of


def _elementwise(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    functions = arguments.pointwise(call.function, given)
    if functions is None:
        b.refuse("has arguments that the engine does not support")
    return b.elementwise(b.view(given["input"]), *functions)


def _arithmetic(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    kind = arguments.ARITHMETIC[call.function]
    left, right = given["input"], given["other"]
    if given.get("rounding_mode") is not None:
        b.refuse("rounds its quotient")
    if call.function in ("__rsub__", "rsub", "__rdiv__", "__rtruediv__"):
        left, right = right, left
    scale = given.get("alpha", 1)
    if scale != 1:
        right = b.elementwise(b.view(right), Pointwise("affine", float(scale)))
        return combine(b, kind, b.view(left), right)
    return _apply(b, kind, _operand(b, left), _operand(b, right))


def _addcmul(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    factors = [_operand(b, given[name]) for name in ("tensor1", "tensor2")]
    if not any(isinstance(one, View) for one in factors):
        b.refuse("has arguments that the engine does not support")
    product = _apply(b, "mul", *factors)
    if given.get("value", 1) != 1:
        product = b.elementwise(product, Pointwise("affine", float(given["value"])))
    return _apply(b, "add", _operand(b, given["input"]), product)


def _apply(b: GraphBuilder, kind: str, one: View | Floats | float, other: View | Floats | float) -> View:
    """Combine two operands, at least one of which is a tensor that depends on the images."""
    if isinstance(one, float) and isinstance(other, View):
        return _with_number(b, kind, other, one, number_first=True)
    if isinstance(other, float) and isinstance(one, View):
        return _with_number(b, kind, one, other, number_first=False)
    if isinstance(one, np.ndarray) and isinstance(other, View):
        if kind == "sub":
            other, kind = b.elementwise(other, Pointwise("affine", -1.0)), "add"
        elif kind == "div":
            other, kind = b.elementwise(other, Pointwise("reciprocal")), "mul"
        return with_constant(b, kind, other, one)
    if isinstance(other, np.ndarray) and isinstance(one, View):
        return with_constant(b, kind, one, other)
    assert isinstance(one, View)
    assert isinstance(other, View)
    return combine(b, kind, one, other)


def _operand(b: GraphBuilder, value: Any) -> View | Floats | float:
    if isinstance(value, ImageSize):
        b.refuse("computes with the number or the size of its images")
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor):
        constant = b.floats(value)
        return float(constant.item()) if constant.size == 1 and constant.ndim <= 1 else constant
    return b.view(value)


def _with_number(b: GraphBuilder, kind: str, view: View, number: float, *, number_first: bool) -> View:
    reciprocal = Pointwise("reciprocal")
    match kind:
        case "add":
            return b.elementwise(view, Pointwise("affine", 1.0, number))
        case "sub":
            scale, shift = (-1.0, number) if number_first else (1.0, -number)
            return b.elementwise(view, Pointwise("affine", scale, shift))
        case "mul":
            return b.elementwise(view, Pointwise("affine", number))
        case "div" if number_first:
            return b.elementwise(view, reciprocal, Pointwise("affine", number))
        case "div":
            return b.elementwise(view, Pointwise("affine", 1 / number))
        case "max":
            return b.elementwise(view, Pointwise("clamp", number, math.inf))
        case _:
            return b.elementwise(view, Pointwise("clamp", -math.inf, number))


def with_constant(b: GraphBuilder, kind: str, view: View, constant: Floats) -> View:
    """Combine a tensor with one that does not depend on the images."""
    if b.batch_axis and constant.ndim > len(view.axes) - b.batch_axis:
        b.refuse("combines images with a tensor that has a batch of its own")
    if constant.ndim > len(view.axes):
        if constant.ndim > len(view.axes) + 1 or constant.shape[0] != 1:
            b.refuse("combines images with a tensor that has a batch of its own")
        constant = constant[0]
    constant = constant.reshape(*[1] * (len(view.axes) - constant.ndim), *constant.shape)
    if any(length not in (1, axis) for length, axis in zip(constant.shape, view.shape, strict=True)):
        view = b.materialize(view.expand(np.broadcast_shapes(constant.shape, view.shape)))
    axes = view.whole_axes()
    if axes is None:
        view = view if b.is_canonical(view) else b.materialize(view)
        axes = view.whole_axes()
    arranged = None if axes is None else _constant_map(constant, axes, view.source)
    if arranged is None:  # constant along a part of an axis in memory: repeated there
        view = view if b.is_canonical(view) else b.materialize(view)
        groups = grouping_of(len(view.axes))
        whole = np.broadcast_to(constant, view.shape).transpose([axis for group in groups for axis in group])
        arranged = whole.reshape(view.source.axes)
    value = b.emit(Binary(kind, (), arranged), view.value)  # type: ignore[arg-type]
    return replace(view, value=value)


def combine(b: GraphBuilder, kind: str, one: View, other: View) -> View:
    """Combine two tensors, either of which may be broadcast."""
    rank = max(len(one.axes), len(other.axes))
    one, other = (
        view.expand((*[1] * (rank - len(view.axes)), *view.shape)) if len(view.axes) < rank else view
        for view in (one, other)
    )
    shape = np.broadcast_shapes(one.shape, other.shape)
    if one.shape != shape and other.shape == shape:
        if kind == "sub":
            return combine(b, "add", b.elementwise(other, Pointwise("affine", -1.0)), one)
        if kind == "div":
            return combine(b, "mul", b.elementwise(other, Pointwise("reciprocal")), one)
        return combine(b, kind, other, one)
    if one.shape != shape:
        one = b.materialize(one.expand(shape))
    if one.whole_axes() is None or not _fits(other, one):
        canonical = rank == 3 and one == b.whole(one.value)
        if not canonical:
            one = b.materialize(one)
        if one.whole_axes() is None:
            b.refuse("combines tensors whose axes do not fit the engine's memory")
        other = b.materialize(other if _keeps_axes(one) else other.expand(shape))
        if not _fits(other, one):
            b.refuse("combines tensors whose axes do not fit the engine's memory")
    return replace(one, value=b.emit(Binary(kind, ()), one.value, other.value))  # type: ignore[arg-type]


def _keeps_axes(view: View) -> bool:
    """Whether each axis of a tensor is at most one axis of its value."""
    return all(len(axis) <= 1 for axis in view.axes)


def _fits(other: View, view: View) -> bool:
    """Whether ``other`` is broadcast along whole axes of the value of ``view``, and is in the same order else."""
    if not other.is_whole:
        return False
    seen: set[int] = set()
    for axis, wanted in zip(other.axes, view.axes, strict=True):
        if axis and axis != wanted:
            return False
        seen |= {factor.axis for factor in axis}
    return all(other.source.axes[axis] == 1 for axis in (C, H, W) if axis not in seen)


def _constant_map(constant: Floats, axes: Sequence[Sequence[int]], source: FeatureShape) -> Floats | None:
    """Return a constant as (C, H, W), with ones where it is broadcast; ``axes`` are those of ``View.whole_axes``."""
    lengths: list[int] = []
    order: list[int] = []
    for length, group in zip(constant.shape, axes, strict=True):
        if length > 1 and length != math.prod(source.axes[axis] for axis in group):
            return None
        lengths += [source.axes[axis] if length > 1 else 1 for axis in group]
        order += group
    arranged = constant.reshape(lengths)
    missing = [axis for axis in (C, H, W) if axis not in order]
    arranged = arranged.reshape(*lengths, *[1] * len(missing))
    return arranged.transpose([[*order, *missing].index(axis) for axis in (C, H, W)])


HANDLERS = by_name(
    (arguments.ELEMENTWISE, on_other_axes(_elementwise)),
    (arguments.ARITHMETIC, on_other_axes(_arithmetic)),
    (("addcmul",), on_other_axes(_addcmul)),
)
