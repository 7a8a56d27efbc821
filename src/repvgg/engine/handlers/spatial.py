"""Functions of the pixels of a feature map: pools, reductions, padding and interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from repvgg.engine import arguments
from repvgg.engine.graph import (
    AdaptivePool,
    C,
    ChannelPool,
    ConvGeometry,
    H,
    Pad,
    Pointwise,
    Resize,
    W,
    WindowPool,
    WrapPad,
    pair,
)
from repvgg.engine.graph_builder import GraphBuilder, by_name
from repvgg.engine.handlers.arithmetic import combine
from repvgg.engine.image_size import ImageSize
from repvgg.engine.recorder import Call
from repvgg.engine.views import View


def _window_pool(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    if given.get("divisor_override") is not None or given.get("return_indices"):
        b.refuse("has arguments that the engine does not support")
    if pair(given.get("dilation", 1)) != (1, 1):
        b.refuse("is a dilated pool, which the engine does not support")
    value = b.as_map(b.view(given["input"]))
    size = b.shapes[value].size
    kernel = given["kernel_size"]
    kind: Any = "avg" if call.function == "avg_pool2d" else "max"
    padding = pair(given.get("padding", 0))
    varies = isinstance(kernel, (tuple, list)) and [*map(type, kernel)] == [ImageSize] * 2
    if varies and tuple(map(int, kernel)) == size and padding == (0, 0):  # avg_pool2d(x, x.shape[2:])
        return b.whole(b.emit(AdaptivePool(kind, (1, 1)), value))
    kernel = pair(kernel)
    stride = given.get("stride")
    stride = kernel if stride is None or stride == [] else pair(stride)
    window = ConvGeometry(kernel, stride, padding)
    op = WindowPool(kind, window, bool(given.get("ceil_mode")), bool(given.get("count_include_pad", True)))
    return b.whole(b.emit(op, value))


def _adaptive_pool(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    value = b.as_map(b.view(given["input"]))
    size = given["output_size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    kind: Any = "avg" if call.function == "adaptive_avg_pool2d" else "max"
    if given.get("return_indices"):
        b.refuse("has arguments that the engine does not support")
    cells = [None if one is None else int(one) for one in (height, width)]
    return b.whole(b.emit(AdaptivePool(kind, (cells[0], cells[1])), value))


def _reduce(b: GraphBuilder, call: Call) -> View:
    """Translate a mean, a sum, a maximum or a minimum over some axes."""
    given = arguments.of(call)
    view, kind = b.view(given["input"]), call.function
    reduced, keeps = given.get("dim", given.get("axis")), bool(given.get("keepdim", False))
    if isinstance(reduced, Call):  # max(x, y)
        return combine(b, kind, view, b.view(reduced))
    places = [] if reduced is None else list(reduced) if isinstance(reduced, (tuple, list)) else [reduced]
    if not places:
        b.refuse("mixes the images of a batch")
    axes = [b.axis(place, view) for place in places]
    match kind:
        case "mean":
            return reduce(b, "avg", view, axes, keeps=keeps)
        case "sum":
            return total(b, view, axes, keeps=keeps)
        case "amin" | "min":
            negative = Pointwise("affine", -1.0)
            return b.elementwise(reduce(b, "max", b.elementwise(view, negative), axes, keeps=keeps), negative)
    return reduce(b, "max", view, axes, keeps=keeps)


def total(b: GraphBuilder, view: View, axes: Sequence[int], *, keeps: bool) -> View:
    """Sum over some axes of a view: their mean, times the number of elements."""
    count = math.prod(view.shape[axis] for axis in axes)
    return b.elementwise(reduce(b, "avg", view, axes, keeps=keeps), Pointwise("affine", float(count)))


def reduce(b: GraphBuilder, kind: Literal["avg", "max"], view: View, axes: Sequence[int], *, keeps: bool) -> View:
    """Return the mean or the maximum over some axes of a view, which are kept with one element or dropped."""
    known = view.whole_axes()
    if known is None:
        view = b.materialize(view)
        known = view.whole_axes()
    if known is None:
        b.refuse("reduces axes that the engine does not reduce together")
    reduced = {axis for place in axes for axis in known[place]}
    value = view.value
    if reduced & {H, W}:
        value = b.emit(AdaptivePool(kind, (1 if H in reduced else None, 1 if W in reduced else None)), value)
    if C in reduced:
        value = b.emit(ChannelPool(kind), value)
    kept = [() if place in axes else axis for place, axis in enumerate(view.axes)]
    if not keeps:
        kept = [axis for place, axis in enumerate(kept) if place not in axes]
    return View(value, b.shapes[value], tuple(kept))


def _norm(b: GraphBuilder, call: Call) -> View:
    """Translate the Euclidean norm over some axes, and the division by it."""
    given = arguments.of(call)
    divides = call.function == "normalize"
    order = given.get("p", given.get("ord", 2))
    reduced = given.get("dim", 1 if divides else None)
    if order not in (2, 2.0, "fro", None) or reduced is None or given.get("dtype") or given.get("out") is not None:
        b.refuse("is a norm that the engine does not support")
    view = b.view(given["input"])
    places = list(reduced) if isinstance(reduced, (tuple, list)) else [reduced]
    axes = [b.axis(place, view) for place in places]
    squares = total(
        b, b.elementwise(view, Pointwise("square")), axes, keeps=divides or bool(given.get("keepdim", False))
    )
    root = b.elementwise(squares, Pointwise("sqrt"))
    if not divides:
        return root
    return combine(b, "div", view, b.elementwise(root, Pointwise("clamp", float(given.get("eps", 1e-12)), math.inf)))


def _pad(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    mode, view = given.get("mode", "constant"), b.view(given["input"])
    sizes = [int(one) for one in given["pad"]]
    sizes += [0] * (6 - len(sizes))
    if len(view.axes) != 3 or len(sizes) > 6 or (mode != "constant" and sizes[4:] != [0, 0]):
        b.refuse("pads other axes than those of feature maps")
    value = b.as_map(view)
    for axis, (before, after) in enumerate((sizes[4:6], sizes[2:4], sizes[0:2])):
        if min(before, after) < 0:  # a negative padding crops
            length = b.shapes[value].axes[axis] + min(before, 0) + min(after, 0)
            value = b.as_map(b.sliced(b.whole(value), axis, max(0, -before), length))
    left, right, above, below, first, last = (max(0, size) for size in sizes)
    pixels = above, below, left, right
    if mode != "constant":
        return b.whole(b.emit(WrapPad(mode, pixels), value))
    return b.whole(b.emit(Pad(pixels, (first, last), float(given.get("value") or 0)), value))


def _interpolate(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    mode, align = given.get("mode", "nearest"), bool(given.get("align_corners"))
    if mode not in ("nearest", "bilinear") or given.get("antialias"):
        b.refuse(f"interpolates by {mode!r}, but the engine does so by 'nearest' and 'bilinear' only")
    value = b.as_map(b.view(given["input"]))
    size, scale = given.get("size"), given.get("scale_factor")
    if scale is not None and not given.get("recompute_scale_factor"):
        first, second = scale if isinstance(scale, (tuple, list)) else (scale, scale)
        op = Resize(mode, None, (float(first), float(second)), align)
    else:
        op = Resize(mode, pair(call.shape[2:]) if size is None else pair(size), None, align)
    return b.whole(b.emit(op, value))


HANDLERS = by_name(
    (("max_pool2d", "avg_pool2d"), _window_pool),
    (("adaptive_avg_pool2d", "adaptive_max_pool2d"), _adaptive_pool),
    (("mean", "sum", "amax", "amin", "max", "min"), _reduce),
    (("norm", "linalg_vector_norm", "normalize"), _norm),
    (("pad",), _pad),
    (("interpolate",), _interpolate),
)
