"""Numbers that a recorded forward reads from tensors: they compute like numbers, and remember where they come from.

A size that only becomes an argument (``x.view(x.size(0), -1)``) is a node of the graph, so a new forward computes it
anew. A comparison or a truth value is a decision: another input might take another branch.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import fx

from repvgg.errors import ReparamError


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


class UnknownValueError(ReparamError):
    """The code does something with an unknown argument that only a known one allows."""


class Unknown:
    """An argument of which nothing is known: functions of it are unknown as well, and branches on it are decisions."""

    def __init__(self, recorder: Any, node: fx.Node) -> None:
        self.__dict__.update(recorder=recorder, node=node)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._derived(getattr, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() reads it: a branch that cannot be tried.
        if self.__dict__["recorder"].asks_for_class(sys._getframe(1)):
            raise UnknownValueError("an optional argument selects by its class what is computed")
        return Unknown

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnknownValueError("an attribute of an optional argument is set")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._derived(lambda *_: None, *args, *kwargs.values())

    def __getitem__(self, index: Any) -> Any:
        return self._derived(operator.getitem, index)

    def _derived(self, function: Callable[..., Any], *args: Any) -> Any:
        recorder = self.__dict__["recorder"]
        return Unknown(recorder, recorder.number_node(function, self, *args))

    def _decide(self, *_: Any) -> bool:
        return bool(self.__dict__["recorder"].decide(False, self.__dict__["node"]))

    def _refuse(self, *_: Any) -> Any:
        raise UnknownValueError("an optional argument selects what is computed")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = _decide
    __hash__ = __index__ = __int__ = __float__ = __iter__ = __len__ = _refuse


UNKNOWN = object()  # in a call that is to be recorded: stands for an Unknown


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


def _derive(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: self._derived(function, *others)


def _define_operators() -> None:
    binary = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    unary: dict[str, Callable[..., Any]] = {
        "__neg__": operator.neg,
        "__abs__": operator.abs,
        "__pos__": operator.pos,
        "__round__": round,
    }
    unary |= {"__ceil__": math.ceil, "__floor__": math.floor, "__trunc__": math.trunc}
    for kind in (TrackedInt, TrackedFloat):
        for name in binary:
            setattr(kind, f"__{name}__", _arithmetic(getattr(operator, name), reflected=False))
            setattr(kind, f"__r{name}__", _arithmetic(getattr(operator, name), reflected=True))
        for dunder, function in unary.items():
            setattr(kind, dunder, _arithmetic(function, reflected=False))
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            setattr(kind, f"__{name}__", _comparison(getattr(operator, name)))
        kind.__bool__ = lambda self: self.recorder.decide(bool(untracked(self)), self.node)  # type: ignore[method-assign]
    for name in (*binary, "matmul", "and_", "or_"):
        dunder = name.strip("_")
        setattr(Unknown, f"__{dunder}__", _derive(getattr(operator, name)))
        setattr(Unknown, f"__r{dunder}__", _derive(getattr(operator, name)))
    setattr(Unknown, "__neg__", _derive(operator.neg))  # noqa: B010 - as the others


_define_operators()
