"""Disk cache: each model is compiled, and its convolutions are tuned, once on a machine.

A file name is the SHA-256 of everything that the content depends on. For machine code that is the IR, the instruction
set with the processor and its features, and the versions of repvgg, llvmlite and LLVM. Which files are trusted, and
their format, is that of :mod:`repvgg._cache`; processes may share the folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from functools import cache
from importlib import import_module

from repvgg import _cache
from repvgg.engine.codegen.jit import VectorIsa, compile_to_object
from repvgg.errors import require

OBJECT_SUFFIX, TUNING_SUFFIX = ".o", ".choice"
MAX_BYTES = 2**26  # 64 MiB of object files; a model takes about 64 KiB

_KIND = "engine"


def cached_object_code(ir: str, isa: VectorIsa) -> bytes:
    """Return the object file of a module of IR, from the disk if it was compiled before.

    Warns, once in a process, if the folder cannot be used. Raises as
    :func:`repvgg.engine.codegen.jit.compile_to_object`.
    """
    if _cache.cache_folder(_KIND) is None:
        return compile_to_object(ir, isa)
    key = _object_key(ir, isa)
    code = read_entry(key, OBJECT_SUFFIX)
    if code is None:
        code = compile_to_object(ir, isa)
        write_entry(key, OBJECT_SUFFIX, code)
    return code


def clear_cache() -> None:
    """Remove cached machine code and tuning results from the disk. Models that are compiled already are not affected.

    Raises:
        OutputError: a file cannot be removed.
    """
    _cache.clear(_KIND, (OBJECT_SUFFIX, TUNING_SUFFIX))


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


def read_entry(key: bytes, suffix: str) -> bytes | None:
    """Return the content of an entry; None if there is none, or none that can be trusted."""
    return _cache.read_entry(_KIND, f"{key.hex()}{suffix}", key)


def write_entry(key: bytes, suffix: str, content: bytes) -> None:
    """Write an entry for :func:`read_entry`; warn, once for each folder, if it cannot be written."""
    _cache.write_entry(_KIND, f"{key.hex()}{suffix}", key, content)
    _cache.evict(_KIND, OBJECT_SUFFIX, MAX_BYTES)
