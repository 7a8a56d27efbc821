"""Nested values: lists, tuples, mappings, dataclasses and other objects that hold tensors.

Models take and return such values. A *leaf* is what is inside: a tensor, a number, a string, None. Each leaf has a
name, the Python expression that reads it: ``output['boxes'][0]``, ``output.logits``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

_SHOWN = 60  # characters of a value that :func:`describe` prints


@dataclass(frozen=True, eq=False)
class _Children:
    """The direct parts of a container: their names after that of the container, the parts, and how to put it back."""

    names: Sequence[str]
    values: Sequence[Any]
    rebuild: Callable[[Sequence[Any]], Any]


def leaves(value: Any, name: str = "output") -> list[tuple[str, Any]]:
    """Return the leaves of ``value`` with their names, in order. An empty container is a leaf.

    Containers are lists, tuples (named ones too), deques, mappings, dataclasses, classes registered with
    ``torch.utils._pytree``, and any other object that has a tensor among its attributes, at any depth. An object that
    contains itself is a leaf where it is met again.
    """
    return list(_walk(value, name, ()))


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in ``value``, in the order of :func:`leaves`."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return a new ``value`` with ``function`` applied to each leaf; classes of the containers stay."""
    return _map(function, value, ())


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a new ``value`` with ``function`` applied to each tensor; other leaves are the same objects."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def as_builtins(value: Any) -> Any:
    """Return ``value`` with dictionaries, lists and tuples as its only containers: of an object, its attributes."""
    return _as_builtins(value, ())


def _as_builtins(value: Any, above: tuple[int, ...]) -> Any:
    children = _children(value, above)
    if children is None:
        return value
    parts = [_as_builtins(child, (*above, id(value))) for child in children.values]
    if isinstance(value, Mapping):
        return dict(zip(value, parts, strict=True))
    if children.names[0].startswith("."):
        return {name[1:]: part for name, part in zip(children.names, parts, strict=True)}
    return tuple(parts) if isinstance(value, tuple) else parts


def describe(leaf: Any) -> str:
    """Return ``float32 (2, 3, 8, 8)`` for a tensor, and the shortened ``repr`` of anything else."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    text = repr(leaf)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _walk(value: Any, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    children = _children(value, above)
    if children is None:
        yield name, value
        return
    for suffix, child in zip(children.names, children.values, strict=True):
        yield from _walk(child, name + suffix, (*above, id(value)))


def _map(function: Callable[[Any], Any], value: Any, above: tuple[int, ...]) -> Any:
    children = _children(value, above)
    if children is None:
        return function(value)
    return children.rebuild([_map(function, child, (*above, id(value))) for child in children.values])


def _children(value: Any, above: tuple[int, ...]) -> _Children | None:
    """Return the parts of a container, None for a leaf. ``above`` are the containers around it."""
    if isinstance(value, (Tensor, nn.Module, str, bytes, int, float, complex, type, ModuleType)) or value is None:
        return None
    if id(value) in above:
        return None
    children = _known_children(value)
    if children is None and _holds_tensor(value, above):
        children = _of_attributes(value, vars(value))
    return children if children is not None and children.values else None


def _known_children(value: Any) -> _Children | None:
    if isinstance(value, tuple) and hasattr(value, "_make"):
        named: Any = value  # a named tuple
        return _Children([f".{field}" for field in named._fields], value, named._make)
    if isinstance(value, (list, tuple, deque)):
        return _Children([f"[{place}]" for place in range(len(value))], list(value), lambda parts: _like(value, parts))
    if isinstance(value, Mapping):
        return _Children(
            [f"[{key!r}]" for key in value],
            list(value.values()),
            lambda parts: _like_mapping(value, dict(zip(value, parts, strict=True))),
        )
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return _of_attributes(value, {field: getattr(value, field) for field in fields})
    if type(value) in _pytree.SUPPORTED_NODES:  # of some other library
        parts, spec = _pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
        rebuild = _pytree.SUPPORTED_NODES[type(value)].unflatten_fn
        return _Children([f"[{place}]" for place in range(len(parts))], parts, lambda new: rebuild(new, spec))
    return None


def _holds_tensor(value: Any, above: tuple[int, ...]) -> bool:
    # Functions have attributes as well, but are no data.
    if callable(value) or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    inside = (*above, id(value))
    return any(isinstance(leaf, Tensor) for part in vars(value).values() for _, leaf in _walk(part, "", inside))


def _of_attributes(value: Any, attributes: Mapping[str, Any]) -> _Children:
    def rebuild(parts: Sequence[Any]) -> Any:
        new = copy.copy(value)  # not the constructor, which may check, convert or have no such arguments
        for name, part in zip(attributes, parts, strict=True):
            object.__setattr__(new, name, part)  # works for frozen classes, too
        return new

    return _Children([f".{name}" for name in attributes], list(attributes.values()), rebuild)


def _like(value: Any, parts: Sequence[Any]) -> Any:
    if isinstance(value, deque):
        return type(value)(parts, value.maxlen)
    return type(value)(parts)


def _like_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        new: Any = copy.copy(value)  # keeps what a defaultdict or a subclass knows besides
        for key, item in items.items():
            new[key] = item
    except TypeError:  # a read-only mapping
        return items
    return new
