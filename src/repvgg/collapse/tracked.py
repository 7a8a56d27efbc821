"""Numbers that a recorded forward reads from tensors: they compute like numbers, and remember where they come from.

A size that only becomes an argument (``x.view(x.size(0), -1)``) is a node of the graph, so a new forward computes it
anew. A comparison or a truth value is a decision: another input might take another branch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import fx


class NumberRecorder(Protocol):
    """What a tracked number reports to."""

    def number(self, value: Any, node: fx.Node) -> Any:
        """Return ``value`` as a tracked number that ``node`` computes."""

    def number_node(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Return a node that applies ``function`` to numbers."""

    def decide(self, outcome: bool, node: fx.Node | None) -> bool:
        """Record that the code branches on a number, and return which way it shall go."""


class TrackedInt(int):
    """An integer that was read from a tensor: a size, a rank, or an element."""

    node: fx.Node
    recorder: NumberRecorder

    def __hash__(self) -> int:
        return int.__hash__(self)


class TrackedFloat(float):
    """A real number that was computed from tracked integers, or an element of a tensor."""

    node: fx.Node
    recorder: NumberRecorder

    def __hash__(self) -> int:
        return float.__hash__(self)


class TrackedShape(tuple[int, ...]):
    """The shape of a tensor, or a slice of it."""

    node: fx.Node
    recorder: NumberRecorder

    def __getitem__(self, index: Any) -> Any:
        value = tuple.__getitem__(self, index)
        return self.recorder.number(value, self.recorder.number_node(operator.getitem, self, index))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(tuple.__len__(self)))

    def __eq__(self, other: object) -> bool:
        return self.recorder.decide(tuple.__eq__(self, other), self.node)

    def __ne__(self, other: object) -> bool:
        return self.recorder.decide(tuple.__ne__(self, other), self.node)

    def __hash__(self) -> int:
        return tuple.__hash__(self)

    def __add__(self, other: Any) -> Any:
        return tuple(self) + tuple(other)

    def __radd__(self, other: Any) -> Any:
        return tuple(other) + tuple(self)

    def numel(self) -> Any:
        """Return the number of elements, as ``torch.Size.numel`` does."""
        total: Any = 1
        for size in self:
            total = size * total
        return total


def tracked(value: Any, node: fx.Node, recorder: NumberRecorder) -> Any:
    """Return ``value`` (a number, or a tuple of integers) as a tracked one; anything else as it is."""
    kind: Any
    if isinstance(value, (bool, complex)):
        return value
    if isinstance(value, int):
        kind = TrackedInt
    elif isinstance(value, float):
        kind = TrackedFloat
    elif isinstance(value, tuple):
        kind = TrackedShape
    else:
        return value
    result = kind(value)
    result.node, result.recorder = node, recorder
    return result


def is_tracked(value: Any) -> bool:
    """Whether a value is one of the tracked kinds."""
    return isinstance(value, (TrackedInt, TrackedFloat, TrackedShape))


def untracked(value: Any) -> Any:
    """Return the number or the tuple itself."""
    if isinstance(value, TrackedInt):
        return int(value)
    if isinstance(value, TrackedFloat):
        return float(value)
    return tuple.__getitem__(value, slice(None)) if isinstance(value, TrackedShape) else value


def _arithmetic(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def compute(self: Any, other: Any = None) -> Any:
        if other is not None and not isinstance(other, (int, float)):
            return NotImplemented
        args = (self,) if other is None else (other, self) if reflected else (self, other)
        result = function(*map(untracked, args))
        return self.recorder.number(result, self.recorder.number_node(function, *args))

    return compute


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    def compare(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return self.recorder.decide(function(untracked(self), untracked(other)), self.node)

    return compare


def _define_operators() -> None:
    import math

    binary = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    unary = {"__neg__": operator.neg, "__abs__": operator.abs, "__pos__": operator.pos, "__round__": round}
    unary |= {"__ceil__": math.ceil, "__floor__": math.floor, "__trunc__": math.trunc}
    for kind in (TrackedInt, TrackedFloat):
        for name in binary:
            setattr(kind, f"__{name}__", _arithmetic(getattr(operator, name), reflected=False))
            setattr(kind, f"__r{name}__", _arithmetic(getattr(operator, name), reflected=True))
        for dunder, function in unary.items():
            setattr(kind, dunder, _arithmetic(function, reflected=False))
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            setattr(kind, f"__{name}__", _comparison(getattr(operator, name)))
        setattr(kind, "__bool__", lambda self: self.recorder.decide(bool(untracked(self)), self.node))


_define_operators()
