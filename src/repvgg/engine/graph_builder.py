"""Builds the graph of a network from views: the operations that the handlers of torch functions share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeAlias, final

import torch
from torch import Tensor

from repvgg.engine.graph import (
    C,
    Elementwise,
    Factor,
    FeatureShape,
    Floats,
    H,
    Node,
    Op,
    Pointwise,
    W,
    output_shape,
)
from repvgg.engine.nested import leaves
from repvgg.engine.recorder import Call
from repvgg.engine.runtime.memory import why_unreadable
from repvgg.engine.views import View, grouping_of, view_of


class Refusal(Exception):  # noqa: N818 - it ends the translation of a call, not of the network
    """Why a call is not supported: a clause whose subject is the call."""


class UnknownValue(Exception):  # noqa: N818
    """An argument is the result of a call that is not supported."""


@final
class GraphBuilder:
    """The nodes of a graph so far, and the views of the tensors that calls have returned.

    Args:
        batch: the number of images of the recording.

    Attributes:
        nodes: in execution order.
        shapes: of all values, those of the inputs first.
        views: by ``id()`` of the call; None if the call is not supported.
        call: the call that is translated; nodes get its name.
        batch_axis: of the arguments of the call, where :func:`on_other_axes` has hidden it; see :class:`View`.
        folded: the same.
    """

    call: Call
    batch_axis = 0
    folded = 0

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.nodes: list[Node] = []
        self.shapes: list[FeatureShape] = []
        self.views: dict[int, View | None] = {}

    def input(self, call: Call) -> View:
        """Return the view of a tensor that is computed elsewhere, in a new value."""
        shape = call.shape[1:]
        channels, height, width = (math.prod(shape[axis] for axis in group) for group in grouping_of(len(shape)))
        self.shapes.append(FeatureShape(channels, (height, width)))
        return self.canonical(len(self.shapes) - 1, shape)

    def view(self, value: Any) -> View:
        """Return the view of an argument whose first axis is that of the images."""
        view = self.any_view(value)
        if not view.is_plain:
            self.refuse("mixes the images of a batch")
        return view

    def any_view(self, value: Any) -> View:
        """Return the view of an argument; its first axis need not be that of the images."""
        if not isinstance(value, Call):
            self.refuse("is not applied to feature maps")
        view = self.views[id(value)]
        if view is None:
            raise UnknownValue
        return view

    def axis(self, number: int, view: View) -> int:
        """Return which of the axes of a view an axis of its tensor is; that of the images is refused."""
        at = axis_of(view, number, self.batch_axis + view.batch_axis, self.folded + view.folded)
        if at is None:
            self.refuse("mixes the images of a batch")
        return at

    def emit(self, op: Op, *inputs: int, name: str = "") -> int:
        """Append an operation on values, and return its value."""
        node = Node(name or self.call.name, op, inputs)
        self.shapes.append(output_shape(node, [self.shapes[value] for value in inputs]))
        self.nodes.append(node)
        return len(self.shapes) - 1

    def refuse(self, reason: str) -> NoReturn:
        """Refuse the current call; the reason is a clause whose subject is the call."""
        raise Refusal(reason)

    def floats(self, tensor: Any) -> Floats:
        """Return the values of a weight; the call is refused if it is none that the engine can read."""
        if not isinstance(tensor, Tensor):
            self.refuse("has weights that depend on the images")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            self.refuse("has weights that are not float32 tensors on the CPU: call model.float().cpu() first")
        reason = why_unreadable(tensor)
        if reason is not None:
            self.refuse(f"has weights that the engine cannot read ({reason})")
        values: Floats = tensor.detach().resolve_neg().numpy()
        return values

    def whole(self, value: int) -> View:
        """Return a value as a tensor (N, C, H, W)."""
        return view_of(value, self.shapes[value])

    def materialize(self, view: View) -> View:
        """Copy the elements of a view to a value of their own, in which the view is canonical."""
        copied = self.canonical(self.emit(view.rearrangement(grouping_of(len(view.axes))), view.value), view.shape)
        return replace(copied, batch_axis=view.batch_axis, folded=view.folded)

    def canonical(self, value: int, shape: Sequence[int]) -> View:
        """Return the view of a value whose axes are those of :func:`repvgg.engine.views.grouping_of`."""
        rank = len(shape)
        if rank == 3:
            return self.whole(value)
        groups = {0: (), 1: ((C,),), 2: ((W,), (C,))}.get(rank, ((H,), (W,), (C,)))
        reshaped = view_of(value, self.shapes[value], groups).reshape(shape)
        assert reshaped is not None
        return reshaped

    def is_canonical(self, view: View) -> bool:
        """Whether a tensor lies in memory as :meth:`materialize` would copy it."""
        sizes = tuple(math.prod(view.shape[axis] for axis in group) for group in grouping_of(len(view.axes)))
        return sizes == view.source.axes and view.plain() == self.canonical(view.value, view.shape)

    def as_map(self, view: View) -> int:
        """Return the value of a tensor (N, C, H, W), which is copied if it has another order."""
        if len(view.axes) != 3:
            self.refuse(f"is applied to a tensor of {len(view.axes) + 1} axes, not to feature maps (N, C, H, W)")
        if replace(view, value=0) == replace(self.whole(view.value), value=0):
            return view.value
        return self.emit(view.rearrangement(((0,), (1,), (2,))), view.value)

    def as_channels_last(self, view: View) -> View:
        """Return a view whose last axis is the channels of a value, and whose other axes are its pixels."""
        source = view.source
        wanted = tuple(Factor(axis, source.axes[axis], 1) for axis in (H, W) if source.axes[axis] > 1)
        pixels = tuple(factor for axis in view.axes[:-1] for factor in axis)
        channels = (Factor(C, source.channels, 1),) if source.channels > 1 else ()
        if view.offset == (0, 0, 0) and pixels == wanted and view.axes[-1] == channels:
            return view
        if len(view.axes) == 3:  # not the canonical order of three axes, which is that of maps
            value = self.emit(view.rearrangement(((2,), (0,), (1,))), view.value)
            return view_of(value, self.shapes[value], ((H,), (W,), (C,)))
        return self.materialize(view)

    def with_channels(self, view: View, value: int) -> View:
        """Return the view of a value that has other channels than that of ``view``, in the last axis."""
        source = self.shapes[value]
        channels = (Factor(C, source.channels, 1),) if source.channels > 1 else ()
        return View(value, source, (*view.axes[:-1], channels))

    def elementwise(self, view: View, *functions: Pointwise) -> View:
        """Apply functions to each element of a tensor, which is copied first if it has not each of its value once."""
        if not view.is_whole:
            view = self.materialize(view)
        return replace(view, value=self.emit(Elementwise(functions), view.value))

    def reshaped(self, view: View, shape: Sequence[int]) -> View:
        """Return a tensor in another shape (without the batch); it is copied if no view has that shape."""
        found = view.reshape(shape)
        if found is None:  # factors do not divide: one axis in memory does
            value = self.emit(view.rearrangement((range(len(view.axes)), (), ())), view.value)
            found = view_of(value, self.shapes[value], ((C,),)).reshape(shape)
        assert found is not None
        return found

    def sliced(self, view: View, axis: int, start: int, length: int, step: int = 1) -> View:
        """Return every ``step``-th of the elements from ``start`` on along an axis, counted without the batch."""
        if length < 1:
            self.refuse("selects no elements")
        found = view.slice(axis, start, length, step)
        if found is None:
            found = self.materialize(view).slice(axis, start, length, step)
        if found is None:
            self.refuse("is a slice that the engine does not support")
        return found


def axis_of(view: View, number: int, batch_axis: int, folded: int) -> int | None:
    """Return which of the axes of a view an axis of its tensor is; None for that of the images."""
    number %= len(view.axes) - folded + 1
    if number == batch_axis:
        return None
    return number if number < batch_axis else number - 1 + folded


#: Appends the nodes of a call and returns the view of its result.
Handler: TypeAlias = Callable[[GraphBuilder, Call], View]


def by_name(*rows: tuple[Iterable[str], Handler]) -> dict[str, Handler]:
    """Return the handler of each torch function, from rows of functions that share one."""
    return {name: handler for names, handler in rows for name in names}


def on_other_axes(handler: Handler) -> Handler:
    """Let a handler of functions that treat all images alike take tensors whose first axis is not that of the images.

    The handler gets plain views, and :meth:`GraphBuilder.axis` the numbers of axes of the tensors.
    """

    def handle(b: GraphBuilder, call: Call) -> View:
        given = {id(one): b.views.get(id(one)) for one in leaves((call.args, call.kwargs)) if isinstance(one, Call)}
        places = {(view.batch_axis, view.folded, len(view.axes)) for view in given.values() if view is not None}
        if all(view is None or view.is_plain for view in given.values()):
            return handler(b, call)
        if len(places) > 1:
            b.refuse("mixes the images of a batch")
        ((b.batch_axis, b.folded, _),) = places
        b.views.update({key: view and view.plain() for key, view in given.items()})
        try:
            found = handler(b, call)
            return replace(found, batch_axis=b.batch_axis, folded=b.folded)
        finally:
            b.views.update(given)
            b.batch_axis = b.folded = 0

    return handle
