"""Atomic file writes: to a temporary name, renamed when complete."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from repvgg.errors import OutputError, OutputExistsError

TEMPORARY_PREFIX = ".repvgg-"  # of folders in which a file is written before it gets its name


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a file may be written at ``path``; call it before the work that makes the content.

    Raises:
        OutputExistsError: ``path`` is a folder, or a file and ``overwrite`` is not set.
        OutputError: the parent folder does not exist or is not accessible.
    """
    target = Path(path)
    try:
        if not target.parent.is_dir():
            raise OutputError(f"There is no folder {str(target.parent)!r} to write {target.name} to: make it first.")
        if target.is_dir():
            raise OutputExistsError(f"{str(target)!r} is a folder: give the name of a file.")
        if target.exists() and not overwrite:
            raise OutputExistsError(
                f"{str(target)!r} exists: add --overwrite (overwrite=True), or choose another name."
            )
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be written: {error.strerror or error}.") from error
    return target


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, renamed to it on success and removed on failure.

    The file gets the permissions of the file that it replaces, or those of a new file. An ``OSError`` in the body is a
    failure to write.

    Raises:
        OutputExistsError: see :func:`check_output`.
        OutputError: the file cannot be written; the disk is full, for example.
    """
    target = check_output(path, overwrite=overwrite)
    real = Path(os.path.realpath(target))  # replace the file that a symbolic link points to, not the link
    try:
        # The same file system as the target: a rename across file systems is not atomic.
        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=real.parent) as folder:
            part = Path(folder) / target.name
            mode = _permissions(real, Path(folder) / "mode")
            yield part
            _flush_to_disk(part)
            part.chmod(mode)
            check_output(target, overwrite=overwrite)  # another process may have created the file meanwhile
            part.replace(real)
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error


@contextmanager
def atomic_files(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path like ``path``; on success, it and all files next to it are renamed into its folder.

    For formats of several files, such as weights next to a description. What is written must have a name that begins
    with the stem of ``path``; ``path`` itself is renamed last, so that it is complete as soon as it exists.

    Raises:
        OutputExistsError: see :func:`check_output`; of a file next to it, too.
        OutputError: a file cannot be written; the disk is full, for example.
    """
    target = check_output(path, overwrite=overwrite)
    try:
        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=target.parent) as folder:
            part = Path(folder) / target.name
            yield part
            written = sorted(Path(folder).iterdir(), key=lambda file: file == part)
            for file in written:
                check_output(target.with_name(file.name), overwrite=overwrite)
                _flush_to_disk(file)
            mode = _permissions(target, Path(folder) / f"{target.name}.mode")
            for file in written:
                file.chmod(mode)
                file.replace(target.with_name(file.name))
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error


def check_output_folder(path: str | os.PathLike[str], replaceable: str, *, overwrite: bool = False) -> Path:
    """Check that a folder may be written at ``path``; call it before the work that makes its files.

    Args:
        path: of the folder.
        replaceable: a pattern of file names: only an empty folder, or one with such a file, is ever replaced.
        overwrite: replace a folder that exists.

    Raises:
        OutputExistsError: ``path`` is a file, or a folder that is not to be replaced.
        OutputError: the parent folder does not exist or is not accessible.
    """
    target = Path(path)
    try:
        if not target.parent.is_dir():
            raise OutputError(f"There is no folder {str(target.parent)!r} to write {target.name} to: make it first.")
        if target.exists() and not target.is_dir():
            raise OutputExistsError(f"{str(target)!r} is a file: give the name of a folder.")
        if target.exists() and not overwrite:
            raise OutputExistsError(
                f"{str(target)!r} exists: add --overwrite (overwrite=True), or choose another name."
            )
        if target.exists() and any(target.iterdir()) and not any(target.glob(replaceable)):
            raise OutputExistsError(
                f"{str(target)!r} has other files than an export, which would be lost: choose another."
            )
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be written: {error.strerror or error}.") from error
    return target


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replaceable: str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder next to ``path``, renamed to it on success and removed with its files on failure.

    See :func:`check_output_folder` for the arguments. An ``OSError`` in the body is a failure to write.

    Raises:
        OutputExistsError: see :func:`check_output_folder`.
        OutputError: a file cannot be written; the disk is full, for example.
    """
    target = check_output_folder(path, replaceable, overwrite=overwrite)
    real = Path(os.path.realpath(target))
    try:
        with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=real.parent) as temporary:
            part = Path(temporary) / real.name
            part.mkdir()
            yield part
            for file in part.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            check_output_folder(target, replaceable, overwrite=overwrite)  # another process may have made it meanwhile
            replaced = Path(temporary) / "replaced"
            if real.exists():
                real.rename(replaced)  # a folder with files cannot be renamed over
            try:
                part.rename(real)
            except OSError:
                if replaced.exists():
                    replaced.rename(real)
                raise
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> Path:
    """Write UTF-8 text atomically. See :func:`atomic_write` for the errors."""
    with atomic_write(path, overwrite=overwrite) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def create_text(path: str | os.PathLike[str], text: str, *, temporary_prefix: str = TEMPORARY_PREFIX) -> bool:
    """Create a file with this text, which is complete as soon as it exists; return False if it exists already.

    Of several processes, exactly one gets True.

    Raises:
        OutputError: it cannot be created.
    """
    target = Path(path)
    try:
        with TemporaryDirectory(prefix=temporary_prefix, dir=target.parent) as folder:
            part = Path(folder) / target.name
            part.write_text(text, encoding="utf-8")
            _flush_to_disk(part)
            try:
                os.link(part, target)  # unlike a rename, it fails if the name exists
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                try:
                    with target.open("x", encoding="utf-8") as file:
                        file.write(text)
                except FileExistsError:
                    return False
            return True
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be created: {error.strerror or error}.") from error


def _permissions(target: Path, probe: Path) -> int:
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    probe.touch()  # the umask can only be read by setting it, which is not thread-safe; a new file shows it
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _flush_to_disk(path: Path) -> None:
    # Without it, a crash after the rename may leave the new name with an empty file.
    with path.open("r+b") as file:
        os.fsync(file.fileno())
