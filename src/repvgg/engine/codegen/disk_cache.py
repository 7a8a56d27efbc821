"""Disk cache: each model is compiled, and its convolutions are tuned, once on a machine.

A file name is the SHA-256 of everything that the content depends on. For machine code that is the IR, the instruction
set with the processor and its features, and the versions of repvgg, llvmlite and LLVM. Format of a file::

    magic (16 bytes) | key: SHA-256 of what the content depends on (32) | SHA-256 of the content (32) | content

A file that does not match its key or checksum, or belongs to another user, counts as a miss and is replaced. Files are
written atomically, so that processes may share the folder.
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

from repvgg import _files
from repvgg._files import CACHE_VARIABLE, atomic_write
from repvgg.engine.codegen.jit import VectorIsa, compile_to_object
from repvgg.errors import CacheWarning, OutputError, first_line, require

OBJECT_SUFFIX, TUNING_SUFFIX = ".o", ".choice"
MAX_BYTES = 2**26  # 64 MiB of object files; a model takes about 64 KiB

_MAGIC = b"repvgg engine 1\n"
_DIGEST_BYTES = 32


def cache_folder() -> Path | None:
    """Return the engine's cache folder, or None if caching is off; see :func:`repvgg._files.cache_folder`."""
    return _files.cache_folder("engine")


def cached_object_code(ir: str, isa: VectorIsa) -> bytes:
    """Return the object file of a module of IR, from the disk if it was compiled before.

    Warns, once in a process, if the folder cannot be written to. Raises as
    :func:`repvgg.engine.codegen.jit.compile_to_object`.
    """
    folder = cache_folder()
    if folder is None:
        return compile_to_object(ir, isa)
    key = _object_key(ir, isa)
    path = folder / f"{key.hex()}{OBJECT_SUFFIX}"
    code = read_entry(path, key)
    if code is None:
        code = compile_to_object(ir, isa)
        write_entry(path, key, code)
    return code


def clear_cache() -> None:
    """Remove cached machine code and tuning results from the disk. Models that are compiled already are not affected.

    Raises:
        OutputError: a file cannot be removed.
    """
    folder = cache_folder()
    if folder is None or not folder.is_dir():
        return
    try:
        entries = [path for suffix in (OBJECT_SUFFIX, TUNING_SUFFIX) for path in folder.glob(f"*{suffix}")]
        for path in [*entries, *folder.glob(".repvgg-*")]:  # temporary files of processes that were killed
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be cleared: {first_line(error)}.") from error


def entry_key(*parts: str) -> bytes:
    """Return the SHA-256 of strings and of the version of this library."""
    digest = hashlib.sha256()
    for part in (import_module("repvgg").__version__, *parts):
        digest.update(f"{len(part)} {part}".encode())  # with the length, so that ("ab", "c") is not ("a", "bc")
    return digest.digest()


def _object_key(ir: str, isa: VectorIsa) -> bytes:
    return entry_key(*_compiler_versions(), *map(str, astuple(isa)), ir)


@cache
def _compiler_versions() -> tuple[str, str]:
    binding = require("llvmlite.binding", "engine")
    return require("llvmlite", "engine").__version__, ".".join(map(str, binding.llvm_version_info))


def read_entry(path: Path, key: bytes) -> bytes | None:
    """Return the content of a file if it is intact, has this key and belongs to this user; else None."""
    head = len(_MAGIC) + 2 * _DIGEST_BYTES
    try:
        with path.open("rb") as file:
            # Machine code is executed: in a shared folder, another user must not be able to provide it.
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            data = file.read()
        os.utime(path)  # eviction removes the least recently used
    except OSError:
        return None
    content = data[head:]
    return content if data[:head] == _MAGIC + key + hashlib.sha256(content).digest() and content else None


def write_entry(path: Path, key: bytes, content: bytes) -> None:
    """Write a file for :func:`read_entry`; warn, once for each folder, if it cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(path, overwrite=True) as part:
            part.write_bytes(_MAGIC + key + hashlib.sha256(content).digest() + content)
        _evict(path.parent)
    except (OSError, OutputError) as error:
        _warn_once(str(path.parent), first_line(error))


def _evict(folder: Path) -> None:
    """Remove the least recently used object files beyond :data:`MAX_BYTES`."""
    found = []
    for path in folder.glob(f"*{OBJECT_SUFFIX}"):
        with suppress(FileNotFoundError):  # another process removed it
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)


@cache
def _warn_once(folder: str, reason: str) -> None:
    text = f"The cache folder {folder!r} cannot be written to ({reason}), so each process compiles again."
    hint = f"{CACHE_VARIABLE} names another folder."
    warnings.warn(f"{text} {hint}", CacheWarning, stacklevel=2)
