"""Writing files so that nothing is ever half there: under a temporary name first, renamed when whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from repvgg.errors import OutputError, OutputExistsError


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a file may be written at ``path``, before the work that makes it begins.

    Raises:
        OutputExistsError: a folder is there, or a file and ``overwrite`` is not set.
        OutputError: its folder does not exist, or cannot be looked into.
    """
    target = Path(path)
    try:
        _check(target, overwrite)
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be written: {error.strerror or error}.") from error
    return target


def _check(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"There is no folder {str(target.parent)!r} to write {target.name} to: make it first.")
    if target.is_dir():
        raise OutputExistsError(f"{str(target)!r} is a folder: give the name of a file.")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{str(target)!r} exists: ask to overwrite it, or choose another name.")


@contextmanager
def whole_or_nothing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path in a folder of its own beside ``path``: renamed to it if all goes well, removed if not.

    The file gets the permissions of the one that it replaces, or those of any new file. Any ``OSError`` inside is
    taken for a failure to write.

    Raises:
        OutputExistsError: see :func:`check_output`.
        OutputError: the file cannot be written, a full disk for one.
    """
    target = check_output(path, overwrite=overwrite)
    real = Path(os.path.realpath(target))  # a link stays, what it points to is replaced
    try:
        with TemporaryDirectory(prefix=".repvgg-", dir=real.parent) as folder:
            part = Path(folder) / target.name
            mode = _mode(real, Path(folder) / "mode")
            yield part
            _flush(part)
            part.chmod(mode)
            check_output(target, overwrite=overwrite)  # a file may have come in between
            part.replace(real)
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error


def _mode(target: Path, probe: Path) -> int:
    """The permissions of the file that is replaced, or those that a new file gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> Path:
    """Write UTF-8 text, wholly or not at all. See :func:`whole_or_nothing` for the errors."""
    with whole_or_nothing(path, overwrite=overwrite) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def _flush(path: Path) -> None:
    """Have the bytes on the disk before the name points to them."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
