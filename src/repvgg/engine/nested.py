"""Values inside of nested arguments and outputs of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested tuples, lists, sets, mappings and slices, in order."""
    if isinstance(value, (tuple, list, set, frozenset)):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    elif type(value) is slice:
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among the leaves."""
    return (one for one in leaves(value) if isinstance(one, Tensor))


def map_arguments(function: Callable[[Any], Any], value: Any) -> Any:
    """Replace the leaves of nested tuples, lists, dictionaries and slices; subclasses of them are leaves."""
    if type(value) in (tuple, list):
        return type(value)(map_arguments(function, one) for one in value)
    if type(value) is dict:
        return {key: map_arguments(function, one) for key, one in value.items()}
    if type(value) is slice:
        return slice(*(map_arguments(function, one) for one in (value.start, value.stop, value.step)))
    return function(value)


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Replace the leaves of nested tuples (named ones too), lists and dictionaries; subclasses of them stay."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(function, one) for one in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(function, one) for one in value)
    if isinstance(value, dict):
        return type(value)((key, map_structure(function, one)) for key, one in value.items())
    return function(value)
