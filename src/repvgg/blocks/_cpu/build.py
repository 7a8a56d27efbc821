"""Build the compiled passes once per machine with its own C++ compiler, cache the library, and load it with ctypes.

The library runs in this process, so the cached file is trusted only under the rule of :mod:`repvgg._cache`, and what
is loaded is a copy of the bytes that were checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from repvgg import _cache

_SOURCE = Path(__file__).with_name("fused_bn_sum.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi")
# Tried in this order. GCC prefers 256-bit vectors on most AVX-512 CPUs; clang may lack OpenMP (one thread then).
_OPTIONAL_FLAGS = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 300
_KIND = "training"  # of cached files

_LOG = logging.getLogger("repvgg")


@final
@dataclass(frozen=True, eq=False)
class Build:
    """The result of building the passes."""

    function: Any  # repvgg_fused_bn_sum of the library, or None if there is no library
    report: str  # one sentence: where the library is, or why there is none


@cache
def build() -> Build:
    """Build the passes or load them from the cache; a failure is logged once and becomes the report."""
    try:
        function = _load(_library()).repvgg_fused_bn_sum
    except (OSError, subprocess.SubprocessError) as error:
        message = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        report = (
            "The compiled training passes could not be built, PyTorch's own functions are used "
            f"({message[0] if message else error})."
        )
        _LOG.warning(report)
        return Build(None, report)
    # ctypes would pass Python integers as 32-bit ints by default: element counts need 64.
    function.restype = ctypes.c_int
    size, number = ctypes.c_int64, ctypes.c_int
    function.argtypes = [number, number, number, number, size, size, size, number, ctypes.c_void_p, ctypes.c_void_p]
    folder = _cache.usable_folder(_KIND)
    return Build(
        function, f"The compiled training passes are loaded, {f'cached in {folder}' if folder else 'uncached'}."
    )


def _library() -> bytes:
    """Return the content of the shared library; compile it unless it is in the cache.

    Raises:
        OSError: there is no compiler, or no folder for temporary files.
        SubprocessError: the compiler fails or times out.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler among {', '.join(_COMPILERS)}; install one, or set CXX")
    text = "\n".join((_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, _processor()))
    key = hashlib.sha256(text.encode()).digest()
    name = f"fused_bn_sum-{key.hex()[:20]}.so"
    if cached := _cache.read_entry(_KIND, name, key):
        return cached
    # Of processes that start together, such as the ranks of a run, one compiles.
    with _cache.locked(_KIND, _TIMEOUT_SECONDS):
        content = _cache.read_entry(_KIND, name, key)
        if content is None:
            content = _compile(compiler)
            _cache.write_entry(_KIND, name, key, content)
    return content


def _compile(compiler: str) -> bytes:
    """Compile with the first set of optional flags that the compiler accepts."""
    with tempfile.TemporaryDirectory(prefix="repvgg-") as folder:
        target = Path(folder) / "library.so"
        for optional in _OPTIONAL_FLAGS:
            command = [*compiler.split(), *_FLAGS, *optional, str(_SOURCE), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False, text=True)
            if done.returncode == 0:
                return target.read_bytes()
    raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _load(content: bytes) -> ctypes.CDLL:
    """Load a shared library from a private copy, so that the bytes that were checked are the bytes that are loaded.

    Raises:
        OSError: it cannot be loaded.
    """
    with suppress(OSError):  # code in the folder for temporary files may be forbidden (noexec)
        return _load_from(None, content)
    return _load_from(_cache.usable_folder(_KIND), content)


def _load_from(folder: Path | None, content: bytes) -> ctypes.CDLL:
    # Over NFS a file that is in use cannot be removed completely.
    with tempfile.TemporaryDirectory(prefix=".repvgg-", dir=folder, ignore_cleanup_errors=True) as private:
        path = Path(private) / "library.so"
        path.write_bytes(content)
        return ctypes.CDLL(str(path))


def _processor() -> str:
    """Identify the target of -march=native: machines with other instruction sets may share the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join((platform.machine(), platform.processor(), *features))
