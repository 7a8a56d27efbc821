"""Files on the disk, so that a network is compiled, and its choices measured, once on a machine.

A file is named by everything that its content depends on. For machine code those are the IR, the processor with its
features, and the versions of repvgg, llvmlite and LLVM. It begins with that name and a checksum, and what does not fit
either is made again and replaced, never used. Files are written whole or not at all, so processes do not disturb each
other.

``REPVGG_CACHE_DIR`` moves the folder, which is the user's cache folder otherwise; ``REPVGG_CACHE_DIR=off`` turns the
cache off.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import astuple
from functools import cache
from importlib import import_module
from pathlib import Path

from repvgg._files import atomic_write
from repvgg.engine.codegen.jit import Isa, object_code
from repvgg.errors import CacheWarning, OutputError, first_line, require

VARIABLE = "REPVGG_CACHE_DIR"
MOST_BYTES = 2**26  # of all files; one network takes about 2**16

_MAGIC = b"repvgg engine 1\n"
_DIGEST = 32  # bytes of a SHA-256
_CODE, CHOICE = ".o", ".choice"  # how the names of files end


def cached_object_code(ir: str, isa: Isa) -> bytes:
    """Machine code of a module of IR, from the disk if it was compiled before.

    A folder that cannot be written costs the keeping alone, and a warning once in a process. See
    :func:`repvgg.engine.codegen.jit.object_code` for the errors.
    """
    folder = cache_folder()
    if folder is None:
        return object_code(ir, isa)
    key = _key(ir, isa)
    path = folder / f"{key.hex()}{_CODE}"
    code = read_kept(path, key)
    if code is None:
        code = object_code(ir, isa)
        keep(path, key, code)
    return code


def cache_folder() -> Path | None:
    """Where machine code is kept; None if it is not kept.

    Raises:
        MissingDependencyError: platformdirs is not installed.
    """
    told = os.environ.get(VARIABLE)
    if told:
        return None if told == "off" else Path(told).expanduser() / "engine"
    return Path(require("platformdirs", "engine").user_cache_path("repvgg")) / "engine"


def clear_cache() -> None:
    """Remove all machine code, and all that was measured, from the disk. Networks that are compiled already go on.

    Raises:
        OutputError: a file cannot be removed.
    """
    folder = cache_folder()
    if folder is None or not folder.is_dir():
        return
    try:
        kept = [path for suffix in (_CODE, CHOICE) for path in folder.glob(f"*{suffix}")]
        for path in [*kept, *folder.glob(".repvgg-*")]:  # the latter of processes that were killed
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be cleared: {first_line(error)}.") from error


def _key(ir: str, isa: Isa) -> bytes:
    return digest(*_versions(), *map(str, astuple(isa)), ir)


def digest(*parts: str) -> bytes:
    """The name of what depends on these and on this version of the library."""
    whole = hashlib.sha256()
    for part in (import_module("repvgg").__version__, *parts):
        whole.update(f"{len(part)} {part}".encode())
    return whole.digest()


@cache
def _versions() -> tuple[str, str]:
    """Of llvmlite and of LLVM."""
    binding = require("llvmlite.binding", "engine")
    return require("llvmlite", "engine").__version__, ".".join(map(str, binding.llvm_version_info))


def read_kept(path: Path, key: bytes) -> bytes | None:
    """What a file holds that is whole, this user's own, and about nothing else; None if there is none."""
    head = len(_MAGIC) + 2 * _DIGEST
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            content = file.read()
        os.utime(path)  # the oldest go first
    except OSError:
        return None
    kept = content[head:]
    return kept if content[:head] == _MAGIC + key + hashlib.sha256(kept).digest() and kept else None


def keep(path: Path, key: bytes, content: bytes) -> None:
    """Write a file for :func:`read_kept`; a folder that cannot be written gets a warning, once in a process."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(path, overwrite=True) as part:
            part.write_bytes(_MAGIC + key + hashlib.sha256(content).digest() + content)
        _shrink(path.parent)
    except (OSError, OutputError) as error:
        _say_once(str(path.parent), first_line(error))


def _shrink(folder: Path) -> None:
    """Remove the files that were used the longest ago, while there is too much."""
    found = []
    for path in folder.glob(f"*{_CODE}"):
        with suppress(FileNotFoundError):  # another process removed it
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)


@cache
def _say_once(folder: str, why: str) -> None:
    text = f"Nothing can be kept in {folder!r} ({why}): each process compiles anew."
    warnings.warn(f"{text} {VARIABLE} names another folder.", CacheWarning, stacklevel=2)
