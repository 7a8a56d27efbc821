"""A config as YAML and back: what a run folder holds, and what repeats the run."""

from __future__ import annotations

import os
import types
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from repvgg._files import write_text
from repvgg.errors import UsageError, first_line
from repvgg.training.config import TrainConfig


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """PyYAML's, except that text with line breaks of any kind is quoted and escaped.

    Left as they are, NEL and Unicode's line and paragraph separators come back as spaces or line feeds: YAML folds
    them, and PyYAML takes them for printable.
    """


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if text.splitlines(keepends=True) != text.splitlines() else None
    node: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)
    return node


_Dumper.add_representer(str, _represent_text)


def to_yaml(config: TrainConfig) -> str:
    """Every field of ``config``, nested as it is, in its own order."""
    text: str = yaml.dump(_plain(asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def write_config(path: str | os.PathLike[str], config: TrainConfig, *, overwrite: bool = False) -> Path:
    """Write ``config`` as YAML, wholly or not at all. See :func:`repvgg._files.atomic_write` for the errors."""
    return write_text(path, to_yaml(config), overwrite=overwrite)


def read_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read what :func:`write_config` wrote, or what a person wrote; fields that are missing take their defaults.

    Raises:
        UsageError: no such file, not YAML, a field that does not exist, or a value that does not fit its field.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The config {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"The config {str(path)!r} is not YAML: {first_line(error)}.") from error
    config = from_plain(TrainConfig, data, str(path))
    assert isinstance(config, TrainConfig)
    return config


def differences(one: TrainConfig, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, by dotted name, with both values."""
    first, second = _flat(asdict(one)), _flat(asdict(other))
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in data.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML knows no others."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def from_plain(kind: Any, data: Any, where: str) -> Any:
    """A value of type ``kind`` out of plain data.

    Raises:
        UsageError: it does not fit; the text names the place.
    """
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if data not in arguments:
            raise _misfit(where, f"one of {', '.join(map(repr, arguments))}", data)
        return data
    if origin in (Union, types.UnionType):
        return None if data is None and type(None) in arguments else from_plain(_but_none(arguments), data, where)
    if origin is tuple:
        return _tuple(arguments, data, where)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise _misfit(where, f"of type {kind.__name__}", data)
    return data


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _misfit(where, "a table of fields", data)
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    if unknown := [name for name in data if name not in known]:
        raise UsageError(f"{where} has no field {unknown[0]!r}: there are {', '.join(sorted(known))}.")
    return kind(**{name: from_plain(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def _but_none(arguments: tuple[Any, ...]) -> Any:
    rest = [argument for argument in arguments if argument is not type(None)]
    return rest[0] if len(rest) == 1 else Literal[tuple(one for r in rest for one in get_args(r))]


def _tuple(arguments: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, (list, tuple)):
        raise _misfit(where, "a list", data)
    if arguments[-1] is Ellipsis:
        return tuple(from_plain(arguments[0], one, where) for one in data)
    if len(data) != len(arguments):
        raise _misfit(where, f"a list of {len(arguments)}", data)
    return tuple(from_plain(kind, one, where) for kind, one in zip(arguments, data, strict=True))


def _misfit(where: str, wanted: str, data: Any) -> UsageError:
    return UsageError(f"{where} has to be {wanted}, not {data!r}.")
