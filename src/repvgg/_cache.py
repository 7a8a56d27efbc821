r"""Cached files that only this user can have written: machine code, tuning results, compiled training kernels.

Cached code is executed, and file names are predictable, so another user of the machine could plant a file. One rule
holds for every cache: the folder and each file in it are owned by this user and writable by no one else, neither is a
symbolic link, and a file is a regular file whose checksum and key match. A file that breaks the rule counts as
missing and is replaced; a folder that breaks it is not used, with a :class:`repvgg.errors.CacheWarning`.

Format of a file::

    "repvgg KIND 1\n" | key: SHA-256 of what the content depends on (32 bytes) | SHA-256 of the content (32) | content
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from repvgg.errors import CacheWarning, OutputError, first_line

CACHE_VARIABLE = "REPVGG_CACHE_DIR"
MAX_FILE_BYTES = 2**28  # 256 MiB; the largest file of the library has a few hundred KiB

_TEMPORARY = ".repvgg-"  # prefix of files that are being written
_DIGEST_BYTES = 32


def cache_folder(kind: str) -> Path | None:
    """Return the folder for cached files of one ``kind``, or None if caching is off. It need not exist yet.

    The variable ``REPVGG_CACHE_DIR`` replaces the user's cache folder; ``off`` turns caching off. Caching is also off
    on systems without file owners and links as POSIX defines them, where the rule above cannot be checked.

    Args:
        kind: name of the subfolder: ``engine`` or ``training``.
    """
    if not hasattr(os, "geteuid"):
        return None
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return None if override == "off" else Path(os.path.abspath(Path(override).expanduser())) / kind
    return _user_cache_folder() / "repvgg" / kind


def _user_cache_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    # The XDG specification requires that relative paths are ignored.
    configured = os.environ.get("XDG_CACHE_HOME", "")
    return Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"


def usable_folder(kind: str) -> Path | None:
    """Return :func:`cache_folder` if it exists and satisfies the rule; else None."""
    with _folder(kind, create=False) as folder:
        return None if folder is None else cache_folder(kind)


def read_entry(kind: str, name: str, key: bytes) -> bytes | None:
    """Return the content of a cached file, or None if there is none that satisfies the rule and has this key."""
    with _folder(kind, create=False) as folder:
        if folder is None:
            return None
        try:
            # Non-blocking: opening a FIFO would wait for a writer.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            return None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or _not_private(status) or status.st_size > MAX_FILE_BYTES:
                return None
            with open(file, "rb", closefd=False) as stream:
                data = stream.read(MAX_FILE_BYTES + 1)
            os.utime(file)  # eviction removes the least recently used
        except OSError:
            return None
        finally:
            os.close(file)
    head = len(_magic(kind)) + 2 * _DIGEST_BYTES
    content = data[head:]
    return content if content and data[:head] == _header(kind, key, content) else None


def write_entry(kind: str, name: str, key: bytes, content: bytes) -> None:
    """Write a file for :func:`read_entry`; warn, once for each folder, if it cannot be written."""
    with _folder(kind, create=True) as folder:
        if folder is None:
            return
        part = f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            # A rename replaces the name itself: a link in its place is removed and not followed.
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
            try:
                with open(file, "wb") as stream:
                    stream.write(_header(kind, key, content) + content)
                os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(part, dir_fd=folder)
                raise
        except OSError as error:
            _warn_once(str(cache_folder(kind)), error.strerror or first_line(error))


def evict(kind: str, suffix: str, max_bytes: int) -> None:
    """Remove the least recently used files with a ``suffix`` beyond a total of ``max_bytes``."""
    with _folder(kind, create=False) as folder:
        if folder is None:
            return
        found = []
        for name in os.listdir(folder):
            if name.endswith(suffix):
                with suppress(FileNotFoundError):  # another process removed it
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    found.append((status.st_mtime, status.st_size, name))
        total = 0
        for _, size, name in sorted(found, reverse=True):
            total += size
            if total > max_bytes:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)


def clear(kind: str, suffixes: tuple[str, ...]) -> None:
    """Remove all files with one of the ``suffixes``, and temporary files of processes that were killed.

    Raises:
        OutputError: a file cannot be removed.
    """
    with _folder(kind, create=False) as folder:
        if folder is None:
            return
        for name in os.listdir(folder):
            if name.endswith(suffixes) or name.startswith(_TEMPORARY):
                try:
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
                except IsADirectoryError:
                    shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
                except OSError as error:
                    where = str(cache_folder(kind))
                    raise OutputError(f"{where!r} cannot be cleared: {name!r}: {error.strerror or error}.") from error


@contextmanager
def locked(kind: str, timeout_s: float) -> Iterator[None]:
    """Let one process at a time run the body, so that the others find what it has cached.

    The body runs without a lock where there is no usable folder, where its file system has none, and after
    ``timeout_s``: the cache saves work, and nothing depends on it.
    """
    import fcntl  # only on POSIX systems, as the cache is

    with _folder(kind, create=True) as folder:
        end = time.monotonic() + timeout_s
        while folder is not None and time.monotonic() < end:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the descriptor is closed
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield


def _magic(kind: str) -> bytes:
    return f"repvgg {kind} 1\n".encode()


def _header(kind: str, key: bytes, content: bytes) -> bytes:
    assert len(key) == _DIGEST_BYTES, len(key)
    return _magic(kind) + key + hashlib.sha256(content).digest()


@contextmanager
def _folder(kind: str, *, create: bool) -> Iterator[int | None]:
    """Yield a descriptor of the folder of a ``kind``; None if there is none, or it is not to be used."""
    path = cache_folder(kind)
    if path is None:
        yield None
        return
    try:
        folder = _open_folder(path, create)
    except FileNotFoundError:
        folder = None
    except OSError as error:
        _warn_once(str(path), error.strerror or first_line(error))
        folder = None
    try:
        yield folder
    finally:
        if folder is not None:
            os.close(folder)


def _open_folder(path: Path, create: bool) -> int:
    """Open the folder and check it. Everything in it is reached by this descriptor: its path may change meanwhile."""
    if create:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for part in (path.parent, *path.parent.parents):
        # A user may have moved the own cache to another disk with a link; the link of another user leads anywhere.
        status = part.lstat()
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
            raise PermissionError(0, f"{str(part)!r} is a link of another user")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    parent = os.open(path.parent, flags)
    try:
        if create:
            with suppress(FileExistsError):
                os.mkdir(path.name, mode=0o700, dir_fd=parent)
        if stat.S_ISLNK(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise PermissionError(0, "it is a symbolic link")
        folder = os.open(path.name, flags | os.O_NOFOLLOW, dir_fd=parent)
    finally:
        os.close(parent)
    if reason := _not_private(os.fstat(folder)):
        os.close(folder)
        raise PermissionError(0, f"it {reason}")
    return folder


def _not_private(status: os.stat_result) -> str | None:
    """Say why other users could have written to a file or folder, or None."""
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written to by other users: chmod go-w"
    return None


@cache
def _warn_once(folder: str, reason: str) -> None:
    text = f"The cache folder {folder!r} cannot be used ({reason}), so each process compiles again."
    hint = f"{CACHE_VARIABLE} names another folder."
    warnings.warn(f"{text} {hint}", CacheWarning, stacklevel=2)
