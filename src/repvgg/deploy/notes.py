"""Notes about a network in a JSON file next to its export, for formats without metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repvgg._files import write_text
from repvgg._serde import to_json
from repvgg.errors import ExportError

_NAMES = "repvgg-names"  # the note of names and shapes


def json_beside(path: Path) -> Path:
    """Return the name of the JSON file with the notes of ``path``."""
    return path.with_name(f"{path.name}.json")


def write_notes(file: Path, described: str, notes: Mapping[str, str]) -> None:
    """Write texts about the exported file of the name ``described``."""
    write_text(file, to_json({"file": described, "notes": dict(notes)}) + "\n")


def read_notes(file: Path) -> dict[str, str]:
    """Return the texts that :func:`write_notes` wrote; none if there is no such file.

    Raises:
        ExportError: it cannot be read.
    """
    if not file.is_file():
        return {}
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))["notes"]
        return {str(name): str(text) for name, text in notes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{str(file)!r} is not the description of an exported file: export it again.") from error


def names_note(**names: Any) -> dict[str, str]:
    """Return a note with names and shapes of inputs and outputs that a format does not keep."""
    return {_NAMES: json.dumps(names)}


def take_names(notes: dict[str, str], path: Path) -> dict[str, Any]:
    """Remove the note of :func:`names_note` from the notes of ``path``, and return its contents; {} without one.

    Raises:
        ExportError: it is no JSON object.
    """
    try:
        return dict(json.loads(notes.pop(_NAMES, "{}")))
    except (ValueError, TypeError) as error:
        raise ExportError(f"The names next to {str(path)!r} are no JSON object: export the model again.") from error
