"""What a study has measured so far: a folder with a header and a file for each cell, each written as it comes.

A study that was interrupted, in whatever way, goes on from there. Cells of other settings or of another machine are
never mixed in: numbers of one table have to be comparable.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from repvgg._files import write_text
from repvgg.errors import DataError, OutputError, OutputExistsError, UsageError
from repvgg.measure import IDENTITY

HEADER, CELLS = "study.json", "cells"
_KEY = re.compile(r"[a-z0-9][a-z0-9_.-]*")

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Header:
    """What all cells of a folder have in common.

    Attributes:
        study: name.
        settings: of the study, as JSON knows them.
        environment: the machine, as :func:`repvgg.measure.environment` tells it when the study starts.
        command: that starts it again.
        started: ISO 8601 time.
        finished: likewise; empty while something is missing.
    """

    study: str
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    command: str = ""
    started: str = ""
    finished: str = ""

    @property
    def machine(self) -> dict[str, str]:
        """What tells this machine from another."""
        return {name: self.environment[name] for name in IDENTITY if name in self.environment}


class Cells:
    """The cells of one study in one folder; nothing is written before the first of them is put."""

    def __init__(self, folder: Path, header: Header, values: Mapping[str, Cell]) -> None:
        self.folder, self.header = folder, header
        self._values = dict(values)

    @classmethod
    def open(cls, folder: Path, header: Header, *, overwrite: bool = False, anywhere: bool = False) -> Cells:
        """Begin in a new folder, or go on with what is in it.

        Args:
            folder: where the cells are kept; it need not exist.
            header: of the study that is about to run.
            overwrite: remove the study that is there, whatever it is, and begin anew.
            anywhere: cells of several machines may stand beside each other: they hold no times.

        Raises:
            OutputExistsError: the folder holds a study that is finished, or files that are none.
            UsageError: it holds cells of another study, other settings or another machine; the text says which.
            DataError: a file in it cannot be read.
        """
        if not _is_taken(folder):
            return cls(folder, _now(header), {})
        if not (folder / HEADER).is_file():
            raise OutputExistsError(f"{str(folder)!r} holds something else than a study: choose another folder.")
        if overwrite:
            _remove(folder)
            return cls(folder, _now(header), {})
        found = read_header(folder)
        _check_same(folder, found, header, anywhere)
        if found.finished:
            raise OutputExistsError(
                f"{str(folder)!r} holds a finished study: choose another folder, or ask to overwrite it."
            )
        return cls(folder, found, dict(_read_cells(folder)))

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: str) -> Cell:
        return self._values[key]

    @property
    def values(self) -> Mapping[str, Cell]:
        """All cells by their keys, in the order of the keys."""
        return {key: self._values[key] for key in sorted(self._values)}

    def look(self, key: str) -> bool:
        """Whether a cell is there, or another process has put it meanwhile.

        Raises:
            DataError: its file cannot be read.
        """
        path = self.folder / CELLS / f"{key}.json"
        if key not in self._values and path.is_file():
            self._values[key] = read_cell(path)
        return key in self._values

    def look_at_all(self) -> None:
        """Take in all that other processes have put meanwhile.

        Raises:
            DataError: a file cannot be read.
        """
        for path in sorted((self.folder / CELLS).glob("*.json")):
            self.look(path.stem)

    def put(self, key: str, value: Cell) -> None:
        """Keep a cell, on the disk at once.

        Raises:
            OutputError: it cannot be written.
        """
        assert _KEY.fullmatch(key), key
        self.begin()
        write_text(self.folder / CELLS / f"{key}.json", _text(value), overwrite=True)
        self._values[key] = value

    def finish(self) -> None:
        """Say in the header that nothing is missing."""
        self.header = replace(self.header, finished=datetime.now(UTC).isoformat(timespec="seconds"))
        write_text(self.folder / HEADER, _text(asdict(self.header)), overwrite=True)

    def begin(self) -> None:
        """Make the folder and its header, unless they are there.

        Raises:
            OutputError: they cannot be made.
        """
        if (self.folder / HEADER).exists():
            return
        try:
            (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{str(self.folder)!r} cannot be made: {error.strerror or error}.") from error
        write_text(self.folder / HEADER, _text(asdict(self.header)), overwrite=True)


def read_header(folder: Path) -> Header:
    """The header of the study in a folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    data = read_cell(folder / HEADER)
    try:
        return Header(**data)
    except TypeError as error:
        raise DataError(f"{str(folder / HEADER)!r} is not the header of a study: remove the folder.") from error


def _now(header: Header) -> Header:
    return replace(header, started=datetime.now(UTC).isoformat(timespec="seconds"))


def _is_taken(folder: Path) -> bool:
    try:
        return folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be looked into: {error.strerror or error}.") from error


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be removed: {error.strerror or error}.") from error


def _check_same(folder: Path, found: Header, wanted: Header, anywhere: bool) -> None:
    """Refuse to mix what cannot be compared."""
    ours = {"study": wanted.study, **plain_data(wanted.settings), **({} if anywhere else wanted.machine)}
    theirs = {"study": found.study, **found.settings, **({} if anywhere else found.machine)}
    for name in dict.fromkeys((*theirs, *ours)):
        before, now = theirs.get(name), ours.get(name)
        if before != now:
            raise UsageError(
                f"What is in {str(folder)!r} was measured with {name} {before!r}, and now it is {now!r}: choose "
                "another folder, or ask to overwrite it."
            )


def _read_cells(folder: Path) -> Iterator[tuple[str, Cell]]:
    for path in sorted((folder / CELLS).glob("*.json")):
        yield path.stem, read_cell(path)


def read_cell(path: Path) -> dict[str, Any]:
    """What one file holds.

    Raises:
        DataError: it cannot be read, or is no cell.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: remove it to measure that again.") from error
    if not isinstance(data, dict):
        raise DataError(f"{str(path)!r} holds no cell: remove it to measure that again.")
    return data


def plain_data(value: Any) -> Any:
    """The value as it comes back from a file: lists for tuples."""
    return json.loads(json.dumps(value))


def _text(value: Cell) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
