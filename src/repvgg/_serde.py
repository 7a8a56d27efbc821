"""Convert dataclasses to JSON or YAML and back, and check the types of their fields.

Supported field types: dataclasses, ``tuple[T, ...]``, ``tuple[A, B]``, ``dict[str, T]``, ``Literal[...]``, unions
(``T | None``), ``Any``, and the scalars ``bool``, ``int``, ``float`` and ``str``. A ``bool`` is no ``int`` here; an
``int`` is accepted where a ``float`` is expected.

Files may be untrusted: a YAML document has a limited size, also after its aliases are expanded, an ``int`` has
64 bits, and messages quote the beginning of a value that does not fit.

JSON has no NaN and no infinity: :func:`to_json` writes the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, and
:func:`from_plain` reads them where a ``float`` is expected.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from repvgg.errors import UsageError, first_line, typed_line

T = TypeVar("T")

MAX_YAML_BYTES = 2**20
_MAX_YAML_NODES = 100_000  # with aliases expanded: ten levels of ten aliases are ten billion nodes in 500 bytes
_MAX_KEY = 100  # characters of a key in a message
_INT64 = range(-(2**63), 2**63)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(value: Any) -> Any:
    """Return ``value`` as dictionaries, lists and scalars; the inverse of :func:`from_plain`."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def json_ready(value: Any) -> Any:
    """Return :func:`to_plain` of ``value`` with non-finite floats as strings, for a strict JSON writer."""
    plain = to_plain(value)
    if isinstance(plain, dict):
        return {key: json_ready(item) for key, item in plain.items()}
    if isinstance(plain, list):
        return [json_ready(item) for item in plain]
    if isinstance(plain, float) and not math.isfinite(plain):
        return "NaN" if math.isnan(plain) else "Infinity" if plain > 0 else "-Infinity"
    return plain


def to_json(value: Any, *, indent: int | None = 1, sort_keys: bool = False) -> str:
    """Return ``value`` as a JSON document without a final newline."""
    return json.dumps(json_ready(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def to_yaml(value: Any) -> str:
    """Return ``value`` as a YAML document, fields in their own order."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        pass

    def represent_str(dumper: Dumper, text: str) -> yaml.ScalarNode:
        # PyYAML does not quote NEL and Unicode's line and paragraph separators, but YAML folds line breaks: unquoted,
        # they would be read back as spaces or line feeds.
        style = '"' if text.splitlines(keepends=True) != text.splitlines() else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_str)
    text: str = yaml.dump(to_plain(value), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_yaml(kind: type[T], path: str | os.PathLike[str], *, what: str = "file") -> T:
    """Read a YAML file as a ``kind``; fields that are missing take their defaults.

    Args:
        kind: a dataclass.
        path: the file.
        what: the purpose of the file, for messages: ``config``.

    Raises:
        UsageError: the file cannot be read, is not YAML, or its content does not fit ``kind``.
    """
    import yaml

    where = f"The {what} {str(path)!r}"
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_YAML_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{where} cannot be read: {reason}.") from error
    except ValueError as error:  # a null character in the path
        raise UsageError(f"{where} cannot be read: {first_line(error)}.") from error
    if len(content) > MAX_YAML_BYTES:
        raise UsageError(f"{where} has more than {MAX_YAML_BYTES:,} bytes: give the YAML file of a {what}.")
    try:
        data = _load_yaml(text)
    except UsageError as error:
        raise UsageError(f"{where} {error}") from error
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {first_line(error)}.") from error
    except Exception as error:  # PyYAML's constructors raise anything: ValueError, KeyError, AttributeError, …
        reason = typed_line(error).rstrip(".")
        raise UsageError(f"{where} has a value that cannot be read ({reason}): quote it if it is text.") from error
    value = from_plain(kind, data, str(path))
    assert isinstance(value, kind)
    return value


def check_finite(value: Any) -> None:
    """Raise UsageError if a field of a dataclass is NaN or infinite, or a tuple that holds such a number."""
    for item in fields(value):
        content = getattr(value, item.name)
        numbers = content if isinstance(content, tuple) else (content,)
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise UsageError(f"{item.name} must be finite, got {content}.")


def _load_yaml(text: str) -> Any:
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:  # an empty document
            return None
        # Before the values are built: keys that are merged ("<<") are copied into each mapping then.
        if _num_nodes(root, {}) > _MAX_YAML_NODES:
            raise UsageError("has too many values, or refers to itself: write it without anchors.")
        if (repeated := _repeated_key(root, set())) is not None:
            where = f"line {repeated.start_mark.line + 1}"
            raise UsageError(f"has the key {repeated.value!r} twice, again in {where}: remove one of them.")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _num_nodes(node: Any, known: dict[int, float]) -> float:
    """Count the nodes of a YAML document as if every alias were a copy; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is being counted
        children = node.value if isinstance(node.value, list) else []
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        known[id(node)] = 1 + sum(_num_nodes(child, known) for pair in pairs for child in pair)
    return known[id(node)]


def _repeated_key(node: Any, known: set[int]) -> Any:
    """Return a key that a mapping of a YAML document has already, of which PyYAML would take the last; None if none."""
    if not isinstance(node.value, list) or id(node) in known:
        return None
    known.add(id(node))
    if isinstance(node.value[0] if node.value else None, tuple):
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key.value, str):
                if (key.tag, key.value) in seen:
                    return key
                seen.add((key.tag, key.value))
    children = (child for item in node.value for child in (item if isinstance(item, tuple) else (item,)))
    return next((found for child in children if (found := _repeated_key(child, known)) is not None), None)


def from_plain(kind: Any, data: Any, where: str, *, unknown: Literal["error", "ignore"] = "error") -> Any:
    """Build a value of type ``kind`` from plain data, and check every field.

    Args:
        kind: one of the types above.
        data: the content of a JSON or YAML document.
        where: path to ``data``, the start of each message: ``config.yaml`` gives ``config.yaml: optim: lr``.
        unknown: what to do with keys that ``kind`` has no field for. ``ignore`` reads files of later versions.

    Raises:
        UsageError: the data do not fit; the text gives the path.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if is_dataclass(kind):
        return _dataclass(kind, data, where, unknown)
    if origin is Literal:
        if not any(data == option and type(data) is type(option) for option in arguments):
            raise _mismatch(where, f"one of {', '.join(map(repr, arguments))}", data)
        return data
    if origin in (Union, types.UnionType):
        return _union(arguments, data, where, unknown)
    if origin is tuple:
        return _tuple(arguments, data, where, unknown)
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            raise _mismatch(where, "a mapping", data)
        return {
            _key(key, where): from_plain(arguments[1], item, f"{where}: {str(key)[:_MAX_KEY]}", unknown=unknown)
            for key, item in data.items()
        }
    if kind is float and isinstance(data, str) and data in _NON_FINITE:
        return _NON_FINITE[data]
    if kind in (float, int) and type(data) is int and data not in _INT64:
        raise _mismatch(where, "a number of at most 64 bits", data)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:  # not isinstance: True is no int
        raise _mismatch(where, f"of type {kind.__name__}", data)
    return data


def _key(key: Any, where: str) -> str:
    if isinstance(key, int) and key not in _INT64:
        raise _mismatch(where, "a mapping with short keys", key)
    return str(key)


def _dataclass(kind: Any, data: Any, where: str, unknown: Literal["error", "ignore"]) -> Any:
    if not isinstance(data, Mapping):
        raise _mismatch(where, "a mapping of fields", data)
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    if unknown == "error" and (extra := [name for name in data if name not in known]):
        raise UsageError(f"{where} has no field {_quoted(extra[0])}: there are {', '.join(sorted(known))}.")
    if missing := [name for name, field in known.items() if _is_required(field) and name not in data]:
        raise UsageError(f"{where} lacks {', '.join(missing)}.")
    return kind(
        **{
            name: from_plain(hints[name], item, f"{where}: {name}", unknown=unknown)
            for name, item in data.items()
            if name in known
        }
    )


def _is_required(field: Field[Any]) -> bool:
    return field.init and field.default is MISSING and field.default_factory is MISSING


def _union(arms: tuple[Any, ...], data: Any, where: str, unknown: Literal["error", "ignore"]) -> Any:
    if data is None and type(None) in arms:
        return None
    rest = [arm for arm in arms if arm is not type(None)]
    if len(rest) == 1:
        return from_plain(rest[0], data, where, unknown=unknown)  # its message has the path inside
    if all(get_origin(arm) is Literal for arm in rest):
        options = tuple(option for arm in rest for option in get_args(arm))
        return from_plain(Literal[options], data, where, unknown=unknown)
    for arm in rest:
        try:
            return from_plain(arm, data, where, unknown=unknown)
        except UsageError:
            continue
    raise _mismatch(where, f"of type {' or '.join(getattr(arm, '__name__', str(arm)) for arm in rest)}", data)


def _tuple(kinds: tuple[Any, ...], data: Any, where: str, unknown: Literal["error", "ignore"]) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise _mismatch(where, "a list", data)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(data)
    if len(data) != len(kinds):
        raise _mismatch(where, f"a list of {len(kinds)}", data)
    return tuple(
        from_plain(kind, item, f"{where}[{index}]", unknown=unknown)
        for index, (kind, item) in enumerate(zip(kinds, data, strict=True))
    )


def _mismatch(where: str, wanted: str, data: Any) -> UsageError:
    return UsageError(f"{where} has to be {wanted}, not {_quoted(data)}.")


class _Quoter(reprlib.Repr):
    """The beginning of the repr of a value, whose size does not depend on that of the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = 100

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of more than 4300 digits.
        return repr(value) if value in _INT64 else f"an integer of {value.bit_length()} bits"


_quoted = _Quoter().repr
