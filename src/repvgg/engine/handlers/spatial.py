"""Functions of the pixels of a feature map: pools, reductions, padding and interpolation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from repvgg.engine import arguments
from repvgg.engine.graph import AdaptivePool, C, ChannelPool, ConvGeometry, H, Pad, Resize, W, WindowPool, pair
from repvgg.engine.graph_builder import GraphBuilder, by_name
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
    """Translate a mean or a maximum over some axes."""
    given = arguments.of(call)
    view, kind = b.view(given["input"]), "avg" if call.function == "mean" else "max"
    reduced = given.get("dim", given.get("axis"))
    rank = len(view.axes) + 1
    places = [one % rank for one in (reduced if isinstance(reduced, (tuple, list)) else [reduced]) if one is not None]
    if not places or 0 in places:
        b.refuse("mixes the images of a batch")
    known = view.whole_axes()
    if known is None or not _are_reducible(known, places):
        view = b.materialize(view)
        known = view.whole_axes()
    if known is None or not _are_reducible(known, places):
        b.refuse("reduces axes that the engine does not reduce together")
    axes = {axis for place in places for axis in known[place - 1]}
    value, op_kind = view.value, kind
    if axes & {H, W}:
        size = (1 if H in axes else None, 1 if W in axes else None)
        value = b.emit(AdaptivePool(op_kind, size), value)  # type: ignore[arg-type]
    if C in axes:
        value = b.emit(ChannelPool(op_kind), value)  # type: ignore[arg-type]
    kept = [() if place in places else axis for place, axis in enumerate(view.axes, 1)]
    if not given.get("keepdim", False):
        kept = [axis for place, axis in enumerate(kept, 1) if place not in places]
    return View(value, b.shapes[value], tuple(kept))


def _are_reducible(axes: Sequence[Sequence[int]], places: Iterable[int]) -> bool:
    return all(place <= len(axes) for place in places)


def _pad(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    mode = given.get("mode", "constant")
    if mode != "constant":
        b.refuse(f"has the padding mode {mode!r}, but the engine supports 'zeros' only")
    view = b.view(given["input"])
    sizes = [int(one) for one in given["pad"]]
    sizes += [0] * (6 - len(sizes))
    if len(view.axes) != 3 or len(sizes) > 6:
        b.refuse("pads other axes than those of feature maps")
    value = b.as_map(view)
    for axis, (before, after) in enumerate((sizes[4:6], sizes[2:4], sizes[0:2])):
        if min(before, after) < 0:  # a negative padding crops
            length = b.shapes[value].axes[axis] + min(before, 0) + min(after, 0)
            value = b.as_map(b.sliced(b.whole(value), axis, max(0, -before), length))
    left, right, above, below, first, last = (max(0, size) for size in sizes)
    op = Pad((above, below, left, right), (first, last), float(given.get("value") or 0))
    return b.whole(b.emit(op, value))


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
    (("mean", "amax"), _reduce),
    (("pad",), _pad),
    (("interpolate",), _interpolate),
)
