"""Frozen dataclasses to JSON-able values and back, with every field checked on the way in.

JSON has no NaN and no infinity; those are written as the words ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from repvgg.errors import UsageError

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """The dataclass, tuple, mapping or scalar ``value`` as dictionaries, lists, strings, numbers, booleans and None."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def decode(hint: Any, value: Any, where: str) -> Any:
    """Read ``value`` as what the type ``hint`` says; the inverse of :func:`encode`.

    Args:
        hint: a dataclass, ``tuple[T, ...]``, ``dict[str, T]``, ``Literal[...]``, ``T | None``, or a scalar type.
        value: what a JSON file held.
        where: path to the value, for the error's text.

    Raises:
        UsageError: the value does not fit; the text says where.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _record(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is UnionType and NoneType in arguments:
        return None if value is None else decode(arguments[0], value, where)
    if origin is Literal and value in arguments:
        return value
    return _scalar(hint, value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _misfit(kind, value, where)
    hints = get_type_hints(kind)
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    if unknown := sorted(set(value) - set(hints)):
        raise UsageError(f"{where} has entries that no report has: {', '.join(map(str, unknown))}.")
    if missing := sorted(required - set(value)):
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise _misfit(hint, value, where)


def _misfit(hint: Any, value: Any, where: str) -> UsageError:
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    return UsageError(f"{where} of a report should be {wanted}, not {value!r}.")
