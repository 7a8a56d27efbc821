"""From recorded calls of torch functions to a graph.

The handler of each call (``handlers/``) appends nodes and returns the view of the result. Calls without a handler, and
those that a handler refuses, are collected: the error names all of them at once.
"""

from __future__ import annotations

from typing import Any, final

import torch

from repvgg.engine.graph import C, Graph, H, Output, W
from repvgg.engine.graph_builder import GraphBuilder, Refusal, UnknownValue
from repvgg.engine.handlers import HANDLERS
from repvgg.engine.nested import map_structure
from repvgg.engine.recorder import Call, Recording
from repvgg.engine.views import View

_SEVERAL_TENSORS = ("chunk", "split", "unbind", "tensor_split", "max", "min", "multi_head_attention_forward")


@final
class Translator:
    """Translates a recording call by call.

    Args:
        recording: of a network.
        batch: the number of images of the recording.
    """

    def __init__(self, recording: Recording, batch: int) -> None:
        self._recording = recording
        self._builder = GraphBuilder(batch)
        self.refused: list[tuple[Call, str]] = []  # calls that are not supported, each with the reason
        for call in recording.inputs:
            self._builder.views[id(call)] = self._builder.input(call)

    def translate(self, *, tolerant: bool = False) -> None:
        """Translate all calls that the outputs depend on.

        With ``tolerant``, the results of calls that are not supported are taken as given, to find all that are.
        """
        needed = _needed(self._recording)
        for call in self._recording.calls:
            if id(call) not in needed:
                continue
            self._builder.call = call
            try:
                self._builder.views[id(call)] = self._handle(call)
            except Refusal as refusal:
                self.refused.append((call, str(refusal)))
                self._builder.views[id(call)] = self._taken_as_given(call) if tolerant else None
            except UnknownValue:
                if tolerant:
                    self.refused.append((call, "depends on what is no tensor of float32"))
                self._builder.views[id(call)] = self._taken_as_given(call) if tolerant else None

    def _taken_as_given(self, call: Call) -> View | None:
        is_given = call.dtype is torch.float32 and call.shape[:1] == (self._builder.batch,)
        return self._builder.input(call) if is_given else None

    def is_translated(self, call: Call) -> bool:
        """Whether a call is one that the outputs depend on."""
        return id(call) in self._builder.views

    def has_images_first(self, call: Call) -> bool:
        """Whether the first axis of the result of a translated call is that of the images, and only that."""
        view = self._builder.views.get(id(call))
        return view is None or view.is_plain

    def graph(self) -> Graph:
        """Return the graph; all calls have been translated."""
        found: list[Output] = []

        def place(value: Any) -> Any:
            if not isinstance(value, Call):
                return value
            found.append(self._output(value))
            return len(found) - 1

        structure = map_structure(place, self._recording.output)
        channels = tuple(shape.channels for shape in self._builder.shapes[: len(self._recording.inputs)])
        return Graph(channels, tuple(self._builder.nodes), tuple(found), structure)

    def _output(self, call: Call) -> Output:
        self._builder.call = call
        view = self._builder.views[id(call)]
        assert view is not None
        if view.whole_axes() is None:
            view = self._builder.materialize(view)
        axes = view.whole_axes()
        place = view.batch_axis, view.folded
        if axes is None:  # several axes of the tensor are one in memory
            return Output(view.value, ((H,), (W,), (C,)), view.shape, *place)
        return Output(view.value, axes, None, *place)

    def _handle(self, call: Call) -> View:
        handler = HANDLERS.get(call.function)
        if handler is None or _writes_elsewhere(call):
            # Arguments that are not supported themselves do not hide that this function is not.
            self._builder.refuse("is not supported by the engine")
        if call.dtype is not torch.float32:
            kind = str(call.dtype).removeprefix("torch.") if call.dtype else "something else than a tensor"
            if call.function not in _SEVERAL_TENSORS:
                self._builder.refuse(f"returns {kind}, but the engine computes in float32 only")
        view = handler(self._builder, call)
        if call.shape and view.tensor_shape(self._builder.batch) != call.shape:
            self._builder.refuse("mixes the images of a batch")
        return view


def _needed(recording: Recording) -> set[int]:
    """Return the ids of the calls that the output depends on."""
    waiting: list[Any] = [recording.output] if recording.error is None else list(recording.calls)
    waiting += (call for call in recording.calls if _writes_elsewhere(call))
    found: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Call):
            if id(value) not in found:
                found.add(id(value))
                waiting += [value.args, value.kwargs]
        elif isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
    return found


def _writes_elsewhere(call: Call) -> bool:
    """Whether a call changes a tensor that it does not return."""
    return call.function == "__setitem__" or call.kwargs.get("out") is not None
