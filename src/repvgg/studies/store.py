"""The results of a study on disk: a header, one JSON file per cell, and locks for processes that share the folder.

Every cell is written as soon as it is measured, so that an interrupted study continues where it stopped. Cells of other
settings or of another machine are refused, because the numbers of one table must be comparable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from repvgg._files import TEMPORARY_PREFIX, create_text, write_text
from repvgg.errors import DataError, OutputError, OutputExistsError, UsageError
from repvgg.measure import IDENTITY

HEADER, CELLS = "study.json", "cells"
_EMPTY_LOCK_SECONDS = 60  # a process writes its number within milliseconds
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

    def __init__(self, folder: Path, header: Header, values: Mapping[str, Cell], *, mix_machines: bool = False) -> None:
        self.folder, self.header = folder, header
        self._values = dict(values)
        self._mix_machines = mix_machines
        self._extends = False  # whether the header's command is that of this process, and it is not finished

    @classmethod
    def open(
        cls,
        folder: Path,
        header: Header,
        *,
        overwrite: bool = False,
        mix_machines: bool = False,
        extends: bool = False,
    ) -> CellStore:
        """Start in a new folder, or continue an unfinished study.

        Args:
            folder: it need not exist.
            header: describes the study that starts.
            overwrite: remove the study in the folder and start again.
            mix_machines: accept cells of several machines, for studies whose cells hold no times.
            extends: continue a finished study, too; it is shown with the new command.

        Raises:
            OutputExistsError: the folder holds a finished study and ``extends`` is not set, or files that are no study.
            UsageError: it holds cells of another study, other settings or another machine; the text names the entry.
            DataError: a file in it cannot be read.
        """
        if not _has_content(folder):
            return cls(folder, replace(header, started=_now()), {}, mix_machines=mix_machines)
        if not (folder / HEADER).is_file():
            # Never remove files that this class did not write, not even with overwrite.
            raise OutputExistsError(f"{str(folder)!r} is not empty and holds no study: choose another folder.")
        if overwrite:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise OutputError(f"{str(folder)!r} cannot be removed: {error.strerror or error}.") from error
            return cls(folder, replace(header, started=_now()), {}, mix_machines=mix_machines)
        found = read_header(folder)
        _check_comparable(folder, found, header, mix_machines)
        if extends:
            found = replace(found, command=header.command, finished="")
        elif found.finished:
            raise OutputExistsError(
                f"{str(folder)!r} holds a finished study: choose another folder, or pass --overwrite."
            )
        store = cls(folder, found, {}, mix_machines=mix_machines)
        store._extends = extends
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
            UsageError: another process has started another study in the folder.
        """
        assert _KEY.fullmatch(key), key  # it becomes a file name
        self.create()
        write_text(self.folder / CELLS / f"{key}.json", _to_json(value), overwrite=True)
        self._values[key] = value

    def create(self) -> None:
        """Create the folder and its header if they do not exist; the header is the first file in it.

        Raises:
            OutputError: they cannot be created.
            UsageError: another process has started another study in the folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Of processes that start at once, one creates the header. It is compared before every cell, because
            # another process may have replaced the study.
            if not create_text(self.folder / HEADER, _to_json(asdict(self.header))):
                found = read_header(self.folder)
                _check_comparable(self.folder, found, self.header, self._mix_machines)
                self.header = replace(found, command=self.header.command, finished="") if self._extends else found
            (self.folder / CELLS).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{str(self.folder)!r} cannot be created: {error.strerror or error}.") from error

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
    except (OSError, ValueError, RecursionError) as error:
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
        return folder.exists() and not all(_is_unfinished(path) for path in folder.iterdir())
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be read: {error.strerror or error}.") from error


def _is_unfinished(path: Path) -> bool:
    """Whether a process that was killed before there was a header has left this behind."""
    if path.name.startswith(TEMPORARY_PREFIX):
        return True
    return path.name in (CELLS, "runs") and path.is_dir() and not any(path.iterdir())


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

    The file is complete as soon as it exists. A lock is taken over if its process on this machine has ended, or if the
    file is empty. Locks of other machines stay until they are removed by their process or by hand, because this machine
    cannot know whether that process is alive.

    Raises:
        OutputError: the file cannot be created.
    """
    abandoned = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(path.parent)!r} cannot be created: {error.strerror or error}.") from error
    with _one_process_of_this_machine(path.parent) as alone:
        for leftover in path.parent.glob(f"{_lock_prefix()}*") if alone else ():  # of processes killed in here
            shutil.rmtree(leftover, ignore_errors=True)
        before = lock_holder(path)
        if before is not None and _is_abandoned(path, before):
            abandoned = before
            path.unlink(missing_ok=True)
        acquired = create_text(path, "\n".join(_identity()) + "\n", temporary_prefix=_lock_prefix())
    if not acquired:
        # Read again, because another process may have acquired the lock since.
        yield LockResult(False, lock_holder(path) or before)
        return
    try:
        yield LockResult(True, abandoned)
    finally:
        with _one_process_of_this_machine(path.parent):
            if _lines(path) == _identity():  # unless a person has removed it and another process has acquired it
                path.unlink(missing_ok=True)


def lock_holder(path: Path) -> LockHolder | None:
    """Return the process that wrote a lock file; None if there is none."""
    lines = _lines(path)
    return None if lines is None else LockHolder(*lines[:2])


def _lines(path: Path) -> list[str] | None:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return None


@contextmanager
def _one_process_of_this_machine(folder: Path) -> Iterator[bool]:
    """Let one process of this machine at a time run the body; yield False where the system cannot do that.

    Without it, of two processes that find the same dead holder, the second could remove the lock of the first. The
    lock files themselves exclude other machines, which never remove a file of this one.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise OutputError(f"{str(folder)!r} cannot be opened: {error.strerror or error}.") from error
        stack.callback(os.close, descriptor)  # which releases the lock, as the end of the process does
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


def _identity() -> list[str]:
    """The lines of a lock file of this process: its number, machine and start, which tells a reused number apart."""
    return [str(os.getpid()), socket.gethostname(), _started(os.getpid())]


def _started(process: int) -> str:
    """Return when a process started, in clock ticks since the machine did; "unknown" if the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name of the program, in brackets, may contain spaces and brackets.
        ticks = (
            Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return "unknown"
    return f"{boot} {ticks}"


def _is_abandoned(path: Path, holder: LockHolder) -> bool:
    if not holder.process.isdecimal():
        with suppress(OSError):
            return time.time() - path.stat().st_mtime > _EMPTY_LOCK_SECONDS
        return False
    if holder.machine != socket.gethostname():
        return False
    process = int(holder.process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    started = (_lines(path) or [])[2:3]
    return bool(started) and "unknown" not in (started[0], now := _started(process)) and started[0] != now


def _lock_prefix() -> str:
    return f".lock-{socket.gethostname()}-"
