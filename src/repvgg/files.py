"""Writing files so that nothing is ever half there: under a temporary name first, renamed when whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from repvgg.errors import OutputError, OutputExistsError


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a file may be written at ``path``, before the work that makes it begins.

    Raises:
        OutputExistsError: a folder is there, or a file and ``overwrite`` is not set.
        OutputError: its folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise OutputError(f"There is no folder {str(target.parent)!r} to write {target.name} to: make it first.")
    if target.is_dir():
        raise OutputExistsError(f"{str(target)!r} is a folder: give the name of a file.")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{str(target)!r} exists: ask to overwrite it, or choose another name.")
    return target


@contextmanager
def whole_or_nothing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path in a folder of its own beside ``path``: renamed to it if all goes well, removed if not.

    Raises:
        OutputExistsError: see :func:`check_output`.
        OutputError: the file cannot be written, a full disk for one.
    """
    target = check_output(path, overwrite=overwrite)
    try:
        with TemporaryDirectory(prefix=".repvgg-", dir=target.parent) as folder:
            part = Path(folder) / target.name
            yield part
            _flush(part)
            part.replace(target)
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> Path:
    """Write UTF-8 text, wholly or not at all. See :func:`whole_or_nothing` for the errors."""
    with whole_or_nothing(path, overwrite=overwrite) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def _flush(path: Path) -> None:
    """Have the bytes on the disk before the name points to them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
