"""Functions that select or reorder elements: most only change the view; joining tensors copies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repvgg.engine import arguments
from repvgg.engine.graph import C, Concat, H, W
from repvgg.engine.graph_builder import GraphBuilder, by_name
from repvgg.engine.recorder import Call
from repvgg.engine.views import View, grouping_of, view_of


def _reshape(b: GraphBuilder, call: Call) -> View:
    return b.reshaped(b.view(call.args[0] if call.args else call.kwargs["input"]), call.shape[1:])


def _no_op(b: GraphBuilder, call: Call) -> View:
    view = b.view(call.args[0] if call.args else call.kwargs["input"])
    if tuple(call.shape[1:]) != view.shape:
        b.refuse("is not supported by the engine")
    return view


def _permute(b: GraphBuilder, call: Call) -> View:
    view = b.view(call.args[0] if call.args else call.kwargs["input"])
    order = arguments.order_of(call, len(view.axes) + 1)
    if order is None or order[0] != 0:
        b.refuse("mixes the images of a batch")
    return view.permute([axis - 1 for axis in order[1:]])


def _index(b: GraphBuilder, call: Call) -> View:
    view = b.view(call.args[0])
    slices = arguments.slices_of(call.args[1], len(view.axes) + 1)
    if slices is None:
        b.refuse("is an index that the engine does not support: use slices and whole numbers")
    for axis, one in enumerate(slices):
        if one is None or one == slice(None):
            continue
        if axis == 0:
            if isinstance(one, int) or one.indices(b.batch) != (0, b.batch, 1):
                b.refuse("selects images of a batch")
            continue
        length = view.shape[axis - 1]
        begin, end, step = (one, one + 1, 1) if isinstance(one, int) else one.indices(length)
        if isinstance(one, int) and one < 0:
            begin, end = one + length, one + length + 1
        if step < 1:
            b.refuse("reverses an axis")
        view = b.sliced(view, axis - 1, begin, len(range(begin, end, step)), step)
    return b.reshaped(view, call.shape[1:])


def _narrow(b: GraphBuilder, call: Call) -> View:
    view = b.view(call.args[0])
    axis, start, length = call.args[1:4]
    return b.sliced(view, axis % (len(view.axes) + 1) - 1, int(start), int(length))


def _parts(b: GraphBuilder, call: Call) -> View:
    """Check the tensor that is split; its parts are handled by :meth:`_item`."""
    return b.view(call.args[0] if call.args else call.kwargs.get("input", call.kwargs.get("tensor")))


def _item(b: GraphBuilder, call: Call) -> View:
    whole, index = call.args
    view = b.view(whole)
    given = arguments.of(whole)
    if whole.function in ("max", "min"):
        b.refuse("is not supported by the engine")
    axis = int(given.get("dim", given.get("axis", 0))) % (len(view.axes) + 1) - 1
    if axis < 0:
        b.refuse("splits a batch")
    if whole.function == "unbind":
        return b.reshaped(b.sliced(view, axis, index, 1), call.shape[1:])
    total = view.shape[axis]
    if whole.function == "chunk":
        size = -(-total // int(given["chunks"]))
        start = size * index
    else:
        sizes: Any = given.get("split_size_or_sections", given.get("split_size"))
        start = sum(map(int, sizes[:index])) if isinstance(sizes, (tuple, list)) else int(sizes) * index
    return b.sliced(view, axis, start, call.shape[axis + 1])


def _concat(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    tensors = given.get("tensors", given.get("input"))
    if not isinstance(tensors, (tuple, list)):
        b.refuse("is not applied to a list of tensors")
    views = [b.view(each) for each in tensors]
    rank = len(views[0].axes) + 1
    axis = int(given.get("dim", given.get("axis", 0)))
    if call.function == "stack":
        axis %= rank + 1
        views = [b.reshaped(view, (*view.shape[: axis - 1], 1, *view.shape[axis - 1 :])) for view in views]
        rank += 1
    axis = axis % rank - 1
    if axis < 0:
        b.refuse("mixes the images of a batch")
    grouping: Sequence[Sequence[int]] = grouping_of(rank - 1)
    groups = {1: ((C,),), 2: ((W,), (C,)), 3: ((C,), (H,), (W,))}.get(rank - 1, ((H,), (W,), (C,)))
    if rank > 4:  # that axis alone, and those before and after it
        grouping = range(axis + 1, rank - 1), range(axis), (axis,)
    place = next(at for at, group in enumerate(grouping) if axis in group)
    parts = tuple(view.rearrangement(grouping) for view in views)
    value = b.emit(Concat(place, parts), *(view.value for view in views))
    return b.reshaped(view_of(value, b.shapes[value], groups), call.shape[1:])


def _pixel_shuffle(b: GraphBuilder, call: Call) -> View:
    view, factor = b.view(call.args[0]), int(arguments.of(call)["upscale_factor"])
    channels, height, width = view.shape
    split = b.reshaped(view, (channels // factor**2, factor, factor, height, width))
    return b.reshaped(split.permute((0, 3, 1, 4, 2)), call.shape[1:])


def _pixel_unshuffle(b: GraphBuilder, call: Call) -> View:
    view, factor = b.view(call.args[0]), int(arguments.of(call)["downscale_factor"])
    channels, height, width = view.shape
    split = b.reshaped(view, (channels, height // factor, factor, width // factor, factor))
    return b.reshaped(split.permute((0, 2, 4, 1, 3)), call.shape[1:])


def _channel_shuffle(b: GraphBuilder, call: Call) -> View:
    view, groups = b.view(call.args[0]), int(arguments.of(call)["groups"])
    channels, height, width = view.shape
    split = b.reshaped(view, (groups, channels // groups, height, width))
    return b.reshaped(split.permute((1, 0, 2, 3)), call.shape[1:])


def _expand(b: GraphBuilder, call: Call) -> View:
    return b.view(call.args[0]).expand(call.shape[1:])


# In the second row: functions that change neither values nor order, if dtype and shape stay.
HANDLERS = by_name(
    (("flatten", "view", "reshape", "squeeze", "unsqueeze", "view_as", "reshape_as", "unflatten"), _reshape),
    (("contiguous", "to", "cpu", "float", "type_as", "detach", "clone", "alias"), _no_op),
    (("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"), _permute),
    (("__getitem__",), _index),
    (("narrow",), _narrow),
    (("chunk", "split", "unbind"), _parts),
    (("item",), _item),
    (("cat", "concat", "concatenate", "stack"), _concat),
    (("pixel_shuffle",), _pixel_shuffle),
    (("pixel_unshuffle",), _pixel_unshuffle),
    (("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    (("expand", "expand_as", "broadcast_to"), _expand),
)
