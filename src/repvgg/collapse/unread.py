"""Modules that a forward calls although no output depends on the result: the plain model does without them.

An auxiliary head whose result is only returned during training or evaluation is an example. The forward around stays as
it is, and calls a stand-in that computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from repvgg.collapse.alias import AliasAnalysis
from repvgg.collapse.modules import has_own_hooks, has_parameters, is_leaf, paths_around
from repvgg.collapse.recording import Frame, Recording, leaves

# The size of an output's axis: a number, or that of an axis of the input, as (axis,).
Axes: TypeAlias = tuple[int | tuple[int], ...]


class Unread(nn.Module):
    """Stands for a module whose result nothing reads: returns a tensor of its shape.

    All numbers in it are NaN, so that a use of it could not go unnoticed.

    Args:
        axes: the size of each axis of the output: a number, or that of an axis of the input, as (axis,).
    """

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        shape = [axis if isinstance(axis, int) else x.shape[axis[0]] for axis in self.axes]
        return x.new_full(shape, torch.nan)

    def extra_repr(self) -> str:
        """Return the shape, with ``x`` for the sizes of the input."""
        return ", ".join(str(axis) if isinstance(axis, int) else f"x{axis[0]}" for axis in self.axes)


class Liveness:
    """What the outputs of a recorded call depend on, its effects included.

    It is determined for each forward by itself: what a forward returns counts as read if anything of its call is. So a
    part of it is not read in any call of the module that runs the same.

    Attributes:
        nodes: the nodes whose results are read.
        frames: the calls of modules of which something is read, or that have effects.
    """

    def __init__(self, recording: Recording) -> None:
        self.nodes: set[fx.Node] = set()
        self.frames: set[Frame] = set()
        self._recording = recording
        self._waiting: list[fx.Node] = []
        for frame in recording.root.frames():
            if frame is recording.root or self._has_effects(frame):
                self._reach_frame(frame)
        self._waiting += [node for node in recording.graph.nodes if self._is_effect(node)]
        self._propagate()
        aliasing = AliasAnalysis(recording)
        writes = [node for node in recording.graph.nodes if node.meta.get("writes")]
        while seen := [node for node in writes if node not in self.nodes and aliasing.is_seen(node, self.nodes)]:
            self._waiting += seen
            self._propagate()

    def paths(self) -> set[str]:
        """Return the paths of the modules whose calls are read, and of parameters that are read by themselves."""
        named = {str(node.target) for node in self.nodes if node.op in ("call_module", "get_attr")}
        return named | {frame.path for frame in self.frames}

    def _has_effects(self, frame: Frame) -> bool:
        part = self._recording.module.get_submodule(frame.path)
        return bool(frame.caveats) or frame.path in self._recording.changed or has_own_hooks(part)

    def _is_effect(self, node: fx.Node) -> bool:
        """Whether a node has effects besides its result, or decides where the forward branches."""
        recording = self._recording
        if node in recording.escaped or node in recording.opaque or node.meta.get("unknown"):
            return True
        if node.op == "call_module":
            part = recording.module.get_submodule(str(node.target))
            return has_own_hooks(part) or not is_leaf(part) or str(node.target) in recording.changed
        return node.op == "call_method" and node.target == "item"

    def _reach_frame(self, frame: Frame) -> None:
        for outer in frame.stack():
            if outer in self.frames:
                return
            self.frames.add(outer)
            found = leaves((outer.args, outer.kwargs, outer.output))
            self._waiting += [leaf for leaf in found if isinstance(leaf, fx.Node)]

    def _propagate(self) -> None:
        while self._waiting:
            node = self._waiting.pop()
            if node not in self.nodes:
                self.nodes.add(node)
                self._waiting += node.all_input_nodes
                if node in self._recording.frame_of and node.op.startswith("call"):
                    self._reach_frame(self._recording.frame_of[node])


def unread_modules(recording: Recording, similar: Callable[[], Recording | None]) -> Iterator[tuple[Frame, str, Axes]]:
    """Yield modules with parameters none of whose calls is read: the frame of the call, the path, and a shape.

    The shape is that of the result in both recordings, as one that depends on the input; ``similar`` returns that of a
    call with other sizes. Modules that return anything else than one tensor are left out.
    """
    live = Liveness(recording)
    needed, found = paths_around(live.paths()), dict[str, tuple[Frame, Any]]()
    for frame, path, call in recording.all_calls():
        if frame in live.frames and path not in needed and has_parameters(recording.module.get_submodule(path)):
            found.setdefault(path, (frame, call))
    other = similar() if found else None
    if other is None:
        return
    needed = paths_around(Liveness(other).paths())
    calls = {path: call for _, path, call in other.all_calls()}
    for path, (frame, call) in found.items():
        axes = None if path in needed else _axes(call, calls.get(path))
        if axes is not None:
            yield frame, path, axes


def is_read(recording: Recording, path: str) -> bool:
    """Whether a recorded call reads the result of the module at ``path``, or a part of it by itself."""
    return path in paths_around(Liveness(recording).paths())


def _shapes(call: Any) -> tuple[Sequence[int], Sequence[int]] | None:
    """Return the shapes of the only input and of the output of a call; None if they are not one tensor each."""
    output = call.output if isinstance(call, Frame) else call
    if call is None or call.kwargs or len(call.args) != 1:
        return None
    shapes = [node.meta.get("shape") if isinstance(node, fx.Node) else None for node in (call.args[0], output)]
    if None in shapes:
        return None
    kinds = {node.meta["dtype"] for node in (call.args[0], output)}
    if len(kinds) > 1 or not output.meta["dtype"].is_floating_point:
        return None
    return shapes[0], shapes[1]  # type: ignore[return-value]


def _axes(call: Any, similar: Any) -> Axes | None:
    """Return the shape of a call's result as a function of that of its input; None if two calls do not show it."""
    first, second = _shapes(call), _shapes(similar)
    if first is None or second is None or len(first[0]) != len(second[0]) or len(first[1]) != len(second[1]):
        return None
    inputs, outputs = list(zip(first[0], second[0], strict=True)), list(zip(first[1], second[1], strict=True))
    found: list[int | tuple[int]] = []
    for place, size in enumerate(outputs):
        if place < len(inputs) and inputs[place] == size:
            found.append((place,))
        elif size[0] == size[1]:
            found.append(size[0])
        elif size in inputs:
            found.append((inputs.index(size),))
        else:
            return None
    return tuple(found)
