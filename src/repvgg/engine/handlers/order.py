"""Functions that select or reorder elements: most only change the view; joining tensors copies them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from repvgg.engine import arguments
from repvgg.engine.graph import C, Concat, Factor, Floats, H, Pad, W
from repvgg.engine.graph_builder import GraphBuilder, axis_of, by_name
from repvgg.engine.handlers.arithmetic import with_constant
from repvgg.engine.recorder import Call
from repvgg.engine.views import BROADCAST, View, grouping_of, view_of


def _reshape(b: GraphBuilder, call: Call) -> View:
    view = b.any_view(call.args[0] if call.args else call.kwargs["input"])
    place = _batch_axis(view, call.shape, b.batch)
    if place is None:
        b.refuse("mixes the images of a batch")
    images = call.shape[place] // b.batch if b.batch else 1  # elements that are one axis with the images
    shape = (*call.shape[:place], *([images] if images > 1 else []), *call.shape[place + 1 :])
    return replace(b.reshaped(view.plain(), shape), batch_axis=place, folded=int(images > 1))


def _batch_axis(view: View, shape: Sequence[int], batch: int) -> int | None:
    """Return which axis of a reshaped tensor has the images; None if they are not in one axis."""
    before = math.prod(view.shape[: view.batch_axis])
    fitting = [
        at
        for at, length in enumerate(shape)
        if math.prod(shape[:at]) == before and (length % batch == 0 < length if batch else length == 0)
    ]
    # With axes of one element, several fit. The axis that it was before is the same for all numbers of images.
    return view.batch_axis if view.batch_axis in fitting else min(fitting, default=None)


def _no_op(b: GraphBuilder, call: Call) -> View:
    view = b.any_view(call.args[0] if call.args else call.kwargs["input"])
    if tuple(call.shape) != view.tensor_shape(b.batch):
        b.refuse("is not supported by the engine")
    return view


def _permute(b: GraphBuilder, call: Call) -> View:
    view = b.any_view(call.args[0] if call.args else call.kwargs["input"])
    order = arguments.order_of(call, len(view.axes) - view.folded + 1)
    if order is None:
        b.refuse("is not supported by the engine")
    axes: list[int] = []
    batch_axis = 0
    for number in order:
        at = axis_of(view, number, view.batch_axis, view.folded)
        if at is None:
            batch_axis = len(axes)
            axes += range(view.batch_axis, view.batch_axis + view.folded)
        else:
            axes.append(at)
    return replace(view.permute(axes), batch_axis=batch_axis)


def _index(b: GraphBuilder, call: Call) -> View:
    view = b.any_view(call.args[0])
    given = arguments.slices_of(call.args[1], len(view.axes) - view.folded + 1)
    if given is None:
        b.refuse("is an index that the engine does not support: use slices and whole numbers")
    kept: list[int | None] = []  # axes of the view, None for new ones
    batch_axis, at = 0, 0
    for one in given:
        if one is None:
            kept.append(None)
            continue
        if at == view.batch_axis:
            folded = range(at, at + view.folded)
            images = view.tensor_shape(b.batch)[at]
            if isinstance(one, int) or one.indices(images) != (0, images, 1):
                b.refuse("selects images of a batch")
            batch_axis, kept = len(kept), [*kept, *folded]
            at += 1
            continue
        axis = at if at < view.batch_axis else at - 1 + view.folded
        length = view.shape[axis]
        begin, end, step = (one, one + 1, 1) if isinstance(one, int) else one.indices(length)
        if isinstance(one, int) and one < 0:
            begin, end = one + length, one + length + 1
        if step < 1:
            b.refuse("reverses an axis")
        if one != slice(None):
            view = b.sliced(view, axis, begin, len(range(begin, end, step)), step)
        if not isinstance(one, int):
            kept.append(axis)
        at += 1
    axes = tuple(() if axis is None else view.axes[axis] for axis in kept)
    return replace(view, axes=axes, batch_axis=batch_axis)


def _narrow(b: GraphBuilder, call: Call) -> View:
    view = b.any_view(call.args[0])
    axis, start, length = call.args[1:4]
    return b.sliced(view, b.axis(axis, view), int(start), int(length))


def _parts(b: GraphBuilder, call: Call) -> View:
    """Check the tensor that is split; its parts are handled by :meth:`_item`."""
    return b.any_view(arguments.of(call)["input"])


def _item(b: GraphBuilder, call: Call) -> View:
    whole, index = call.args
    view = b.any_view(whole)
    given = arguments.of(whole)
    if whole.function in ("max", "min"):
        if index > 0:
            b.refuse("returns places of values, but the engine computes in float32 only")
        return view
    if whole.function == "multi_head_attention_forward":
        return view
    axis = b.axis(int(given.get("dim", given.get("axis", 0))), view)
    if whole.function == "unbind":
        part = b.sliced(view, axis, index, 1)
        rest = (*part.axes[:axis], *part.axes[axis + 1 :])
        return replace(part, axes=rest, batch_axis=view.batch_axis - (axis < view.batch_axis))
    total = view.shape[axis]
    place = axis if axis < view.batch_axis else axis + 1 - view.folded  # in the tensor
    if whole.function == "chunk":
        size = -(-total // int(given["chunks"]))
        start = size * index
    else:
        sizes: Any = given.get("split_size_or_sections", given.get("split_size"))
        start = sum(map(int, sizes[:index])) if isinstance(sizes, (tuple, list)) else int(sizes) * index
    return b.sliced(view, axis, start, call.shape[place])


def _concat(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    tensors = given.get("tensors", given.get("input"))
    if not isinstance(tensors, (tuple, list)):
        b.refuse("is not applied to a list of tensors")
    axis = int(given.get("dim", given.get("axis", 0)))
    constants = [at for at, each in enumerate(tensors) if isinstance(each, Tensor)]
    if constants and call.function != "stack":
        return _concat_with_constants(b, tensors, axis)
    views = [b.view(each) for each in tensors]
    if call.function == "stack":
        axis %= len(views[0].axes) + 2
        views = [b.reshaped(view, (*view.shape[: axis - 1], 1, *view.shape[axis - 1 :])) for view in views]
    return join(b, views, b.axis(axis, views[0]))


def _concat_with_constants(b: GraphBuilder, tensors: Sequence[Any], axis: int) -> View:
    """Join tensors that depend on the images, and constants before and after them, such as class tokens."""
    views = [b.view(each) for each in tensors if isinstance(each, Call)]
    axis = b.axis(axis, views[0])
    view = join(b, views, axis) if len(views) > 1 else views[0]
    places = [at for at, each in enumerate(tensors) if isinstance(each, Call)]
    if places != list(range(places[0], places[-1] + 1)):
        b.refuse("joins constants with tensors on both sides")
    ends = [[_of_each_image(b, each) for each in some] for some in (tensors[: places[0]], tensors[places[-1] + 1 :])]
    before, after = (sum(each.shape[axis] for each in some) for some in ends)
    # A frame of zeros, to which the constants are added.
    grouping, axes = _around(axis, len(view.axes))
    place = next(at for at, group in enumerate(grouping) if axis in group)
    vertical, horizontal = ((before, after) if place == other else (0, 0) for other in (H, W))
    frame = Pad((*vertical, *horizontal), (before, after) if place == C else (0, 0))
    value = b.emit(frame, b.emit(view.rearrangement(grouping), view.value))
    shape = (*view.shape[:axis], before + view.shape[axis] + after, *view.shape[axis + 1 :])
    # For symbolic image sizes this array has gigabytes; untouched pages of np.zeros take no memory.
    whole = np.zeros(shape, np.float32)
    for constants, part in zip(ends, (slice(before), slice(shape[axis] - after, None)), strict=True):
        if constants:
            np.concatenate(constants, axis, out=whole[(*[slice(None)] * axis, part)])
    return with_constant(b, "add", b.reshaped(view_of(value, b.shapes[value], axes), shape), whole)


def _of_each_image(b: GraphBuilder, constant: Tensor) -> Floats:
    """Return a constant that is the same for all images, without the axis of the images."""
    if constant.shape[0] not in (1, b.batch) or (constant.shape[0] > 1 and constant.stride(0) != 0):
        b.refuse("joins images with a tensor that has a batch of its own")
    return b.floats(constant[0])


def join(b: GraphBuilder, views: Sequence[View], axis: int) -> View:
    """Join tensors along one of the axes of their views."""
    grouping, axes = _around(axis, len(views[0].axes))
    place = next(at for at, group in enumerate(grouping) if axis in group)
    parts = tuple(view.rearrangement(grouping) for view in views)
    value = b.emit(Concat(place, parts), *(view.value for view in views))
    shape, total = views[0].shape, sum(view.shape[axis] for view in views)
    return b.reshaped(view_of(value, b.shapes[value], axes), (*shape[:axis], total, *shape[axis + 1 :]))


def _around(axis: int, rank: int) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """Return which axes of a tensor are the C, H and W of a value in which ``axis`` is alone, and the reverse."""
    axes = {1: ((C,),), 2: ((W,), (C,)), 3: ((C,), (H,), (W,))}.get(rank, ((H,), (W,), (C,)))
    if rank > 3:  # that axis alone, and those before and after it
        return (range(axis + 1, rank), range(axis), (axis,)), axes
    return grouping_of(rank), axes


def _roll(b: GraphBuilder, call: Call) -> View:
    given = arguments.of(call)
    shifts, dims = given["shifts"], given.get("dims")
    if dims is None or dims == ():
        b.refuse("is not supported by the engine")
    shifts, dims = ([one] if isinstance(one, int) else list(one) for one in (shifts, dims))
    view = b.view(given["input"])
    for shift, dim in zip(shifts, dims, strict=True):
        axis = b.axis(dim, view)
        length = view.shape[axis]
        shift = int(shift) % length
        if shift:
            last, first = b.sliced(view, axis, length - shift, shift), b.sliced(view, axis, 0, length - shift)
            view = join(b, [last, first], axis)
    return view


def _repeat(b: GraphBuilder, call: Call) -> View:
    view, given = b.view(call.args[0]), call.args[1:]
    counts = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if len(counts) != len(view.axes) + 1 or counts[0] != 1:
        b.refuse("mixes the images of a batch")
    pairs = zip(counts[1:], view.axes, strict=True)
    axes = ((Factor(BROADCAST, int(count), 0), *axis) if count > 1 else axis for count, axis in pairs)
    return b.materialize(replace(view, axes=tuple(axes)))


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
    (("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "adjoint"), _permute),
    (("__getitem__",), _index),
    (("narrow",), _narrow),
    (("chunk", "split", "unbind"), _parts),
    (("item",), _item),
    (("cat", "concat", "concatenate", "stack"), _concat),
    (("roll",), _roll),
    (("repeat",), _repeat),
    (("pixel_shuffle",), _pixel_shuffle),
    (("pixel_unshuffle",), _pixel_unshuffle),
    (("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    (("expand", "expand_as", "broadcast_to"), _expand),
)
