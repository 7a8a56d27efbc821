"""Who works on which cell, where several processes and machines share a folder: a lock file for each cell at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLock, Timeout

from repvgg.errors import OutputError, UsageError


@dataclass(frozen=True)
class Share:
    """The cells that one process looks at: every ``of``-th one, beginning with number ``number``.

    Raises:
        UsageError: there is no such share.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(f"There is no share {self.number} of {self.of}: give --cells as 1/2, 2/2 and so on.")

    @classmethod
    def read(cls, text: str) -> Share:
        """Out of ``i/n``.

        Raises:
            UsageError: it is written otherwise, or there is no such share.
        """
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UsageError(f"A share of the cells is written as 1/2, not {text!r}.")
        return cls(*map(int, parts))

    def holds(self, index: int) -> bool:
        """Whether the cell at ``index``, counted from 0, is among them."""
        return index % self.of == self.number - 1


@dataclass(frozen=True)
class Holder:
    """Whose lock it is: a process and its machine; empty where the file does not tell."""

    process: str = ""
    machine: str = ""

    def __str__(self) -> str:
        return f"process {self.process or 'unknown'} on {self.machine or 'an unknown machine'}"


@dataclass(frozen=True)
class Claim:
    """What came of asking for a cell.

    Attributes:
        ours: it is ours until the end of the context.
        other: who has it, or who had it and is no more.
    """

    ours: bool
    other: Holder | None = None


@contextmanager
def claimed(lock: Path) -> Iterator[Claim]:
    """Take a lock file if nobody has it; give it back at the end.

    The file is made exclusively, so it works on every file system that several machines share, and names the process
    and the machine. One that is left of a process of this machine that is no more is taken over. Of another machine's
    processes nobody here can tell: theirs stay until they, or a person, remove them.

    Raises:
        OutputError: the file cannot be made.
    """
    before = holder_of(lock)
    file = SoftFileLock(str(lock), timeout=0)
    try:
        file.acquire()
    except Timeout:
        yield Claim(False, holder_of(lock) or before)
        return
    except OSError as error:
        raise OutputError(f"{str(lock)!r} cannot be made: {error.strerror or error}.") from error
    try:
        yield Claim(True, before)
    finally:
        file.release()


def holder_of(lock: Path) -> Holder | None:
    """Who wrote a lock file; None where there is none."""
    try:
        lines = lock.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return Holder(*(line.strip() for line in lines[:2]))
