"""The results of a study on disk: a header, one JSON file per cell, and locks for processes that share the folder.

Every cell is written as soon as it is measured, so that an interrupted study continues where it stopped. Cells of other
settings or of another machine are refused, because the numbers of one table must be comparable.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout

from repvgg._files import write_text
from repvgg.errors import DataError, OutputError, OutputExistsError, UsageError
from repvgg.measure import IDENTITY

HEADER, CELLS = "study.json", "cells"
_KEY = re.compile(r"[a-z0-9][a-z0-9_.-]*")

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Header:
    """What all cells of a folder have in common."""

    study: str
    settings: Mapping[str, Any]  # of the study, as JSON types
    environment: Mapping[str, str]  # the machine when the study starts; see environment()
    command: str = ""  # continues the study
    started: str = ""  # ISO 8601 time
    finished: str = ""  # ISO 8601 time; empty while cells are missing

    @property
    def machine(self) -> dict[str, str]:
        """The entries of the environment that identify the machine."""
        return {name: self.environment[name] for name in IDENTITY if name in self.environment}


class CellStore:
    """The cells of one study in one folder. Nothing is written before the first cell or :meth:`create`."""

    def __init__(self, folder: Path, header: Header, values: Mapping[str, Cell]) -> None:
        self.folder, self.header = folder, header
        self._values = dict(values)

    @classmethod
    def open(cls, folder: Path, header: Header, *, overwrite: bool = False, mix_machines: bool = False) -> CellStore:
        """Start in a new folder, or continue an unfinished study.

        Args:
            folder: it need not exist.
            header: describes the study that starts.
            overwrite: remove the study in the folder and start again.
            mix_machines: accept cells of several machines, for studies whose cells hold no times.

        Raises:
            OutputExistsError: the folder holds a finished study, or files that are no study.
            UsageError: it holds cells of another study, other settings or another machine; the text names the entry.
            DataError: a file in it cannot be read.
        """
        if not _has_content(folder):
            return cls(folder, replace(header, started=_now()), {})
        if not (folder / HEADER).is_file():
            # Never remove files that this class did not write, not even with overwrite.
            raise OutputExistsError(f"{str(folder)!r} is not empty and holds no study: choose another folder.")
        if overwrite:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise OutputError(f"{str(folder)!r} cannot be removed: {error.strerror or error}.") from error
            return cls(folder, replace(header, started=_now()), {})
        found = read_header(folder)
        _check_comparable(folder, found, header, mix_machines)
        if found.finished:
            raise OutputExistsError(
                f"{str(folder)!r} holds a finished study: choose another folder, or pass --overwrite."
            )
        store = cls(folder, found, {})
        store.refresh_all()
        return store

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: str) -> Cell:
        return self._values[key]

    @property
    def values(self) -> Mapping[str, Cell]:
        """All cells by their keys, sorted by key."""
        return {key: self._values[key] for key in sorted(self._values)}

    def refresh(self, key: str) -> bool:
        """Return whether the cell exists, reading it if another process has written it since.

        Raises:
            DataError: its file cannot be read.
        """
        path = self.folder / CELLS / f"{key}.json"
        # Cells never change once they are written.
        if key not in self._values and path.is_file():
            self._values[key] = read_cell(path)
        return key in self._values

    def refresh_all(self) -> None:
        """Read all cells that other processes have written since.

        Raises:
            DataError: a file cannot be read.
        """
        for path in sorted((self.folder / CELLS).glob("*.json")):
            self.refresh(path.stem)

    def put(self, key: str, value: Cell) -> None:
        """Write a cell to disk.

        Raises:
            OutputError: it cannot be written.
        """
        assert _KEY.fullmatch(key), key  # it becomes a file name
        self.create()
        write_text(self.folder / CELLS / f"{key}.json", _to_json(value), overwrite=True)
        self._values[key] = value

    def create(self) -> None:
        """Create the folder and its header if they do not exist.

        Raises:
            OutputError: they cannot be created.
        """
        if (self.folder / HEADER).exists():
            return
        try:
            (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{str(self.folder)!r} cannot be created: {error.strerror or error}.") from error
        write_text(self.folder / HEADER, _to_json(asdict(self.header)), overwrite=True)

    def finish(self) -> None:
        """Record in the header that no cell is missing."""
        self.header = replace(self.header, finished=_now())
        write_text(self.folder / HEADER, _to_json(asdict(self.header)), overwrite=True)


def read_header(folder: Path) -> Header:
    """Read the header of the study in a folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    data = read_cell(folder / HEADER)
    try:
        return Header(**data)
    except TypeError as error:
        raise DataError(f"{str(folder / HEADER)!r} is not the header of a study: remove the folder.") from error


def read_cell(path: Path) -> dict[str, Any]:
    """Read the content of one cell file.

    Raises:
        DataError: it cannot be read, or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: remove it to measure that cell again.") from error
    if not isinstance(data, dict):
        raise DataError(f"{str(path)!r} is not a cell: remove it to measure that cell again.")
    return data


def as_stored(value: Any) -> Any:
    """Return ``value`` as a JSON file would return it: tuples become lists."""
    return json.loads(json.dumps(value))


def _to_json(value: Cell) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"  # NaN is not JSON: fail here, not in a reader


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _has_content(folder: Path) -> bool:
    try:
        return folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be read: {error.strerror or error}.") from error


def _check_comparable(folder: Path, found: Header, wanted: Header, mix_machines: bool) -> None:
    ours = {"study": wanted.study, **as_stored(wanted.settings), **({} if mix_machines else wanted.machine)}
    theirs = {"study": found.study, **found.settings, **({} if mix_machines else found.machine)}
    # A setting that one side lacks counts as None: later versions may add settings with that default.
    for name in dict.fromkeys((*theirs, *ours)):
        if theirs.get(name) != ours.get(name):
            raise UsageError(
                f"{str(folder)!r} holds results with {name} {theirs.get(name)!r}, not {ours.get(name)!r}: choose "
                "another folder, or pass --overwrite."
            )


@dataclass(frozen=True)
class CellShare:
    """Every ``of``-th cell, starting with the cell at ``number`` (from 1).

    Raises:
        UsageError: ``number`` is not in [1, ``of``].
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(
                f"There is no share {self.number}/{self.of} of the cells: pass --cells 1/2, 2/2 and so on."
            )

    @classmethod
    def parse(cls, text: str) -> CellShare:
        """Parse ``i/n``.

        Raises:
            UsageError: the text has another form, or i is not in [1, n].
        """
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UsageError(f"A share of the cells is written as 1/2, not {text!r}.")
        return cls(*map(int, parts))

    def holds(self, index: int) -> bool:
        """Return whether the cell at ``index`` (from 0) belongs to the share."""
        return index % self.of == self.number - 1


@dataclass(frozen=True)
class LockHolder:
    """The process and machine that wrote a lock file; empty if the file does not say."""

    process: str = ""
    machine: str = ""

    def __str__(self) -> str:
        return f"process {self.process or 'unknown'} on {self.machine or 'an unknown machine'}"


@dataclass(frozen=True)
class LockResult:
    """Result of trying to lock a cell."""

    acquired: bool  # whether this process holds the lock until the end of the context
    # The process that holds it otherwise; if acquired, the dead process that held it before.
    holder: LockHolder | None = None


@contextmanager
def try_lock(path: Path) -> Iterator[LockResult]:
    """Acquire a lock file without waiting; release it on exit.

    The lock of a dead process of this machine is taken over. Locks of other machines stay until their processes or a
    person remove them, because it is unknown whether those processes are alive.

    Raises:
        OutputError: the file cannot be created.
    """
    before = lock_holder(path)  # filelock overwrites the file of a dead process
    # A soft lock is a file created exclusively: unlike flock it works on every file system that machines share.
    lock = SoftFileLock(str(path), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        # Read again, because another process may have acquired the lock since.
        yield LockResult(False, lock_holder(path) or before)
        return
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be created: {error.strerror or error}.") from error
    try:
        yield LockResult(True, before)
    finally:
        lock.release()


def lock_holder(path: Path) -> LockHolder | None:
    """Return the process that wrote a lock file; None if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return LockHolder(*(line.strip() for line in lines[:2]))
