"""Build the compiled passes once per machine with its own C++ compiler, cache the library, and load it with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

from filelock import FileLock

from repvgg._files import cache_folder

_SOURCE = Path(__file__).with_name("fused_bn_sum.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi")
# Tried in this order. GCC prefers 256-bit vectors on most AVX-512 CPUs; clang may lack OpenMP (one thread then).
_OPTIONAL_FLAGS = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_SECONDS = 300

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
        path = _library()
        function = ctypes.CDLL(str(path)).repvgg_fused_bn_sum
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
    return Build(function, f"The compiled training passes are those in {path}.")


def _library() -> Path:
    """Return the shared library; compile it unless it is in the cache.

    Raises:
        OSError: there is no compiler, or no writable folder.
        SubprocessError: the compiler fails or times out.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler among {', '.join(_COMPILERS)}; install one, or set CXX")
    key = "\n".join((_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, _processor()))
    path = _folder() / f"fused_bn_sum-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if path.exists():
        return path
    lock, partial = path.with_suffix(".lock"), path.with_suffix(".partial")
    # Of processes that start together, such as the ranks of a run, one compiles. A timeout is an OSError.
    with FileLock(lock, timeout=_TIMEOUT_SECONDS):
        try:
            if not path.exists():
                _compile(compiler, str(partial))
                os.replace(partial, path)  # atomic, so that no process loads an incomplete file
        finally:
            partial.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    return path


def _compile(compiler: str, target: str) -> None:
    """Compile with the first set of optional flags that the compiler accepts."""
    for optional in _OPTIONAL_FLAGS:
        command = [*compiler.split(), *_FLAGS, *optional, str(_SOURCE), "-o", target]
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False, text=True)
        if done.returncode == 0:
            return
    raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _folder() -> Path:
    """Return the cache folder, or a temporary folder if caching is off or the folder is not writable."""
    folder = cache_folder("training")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            pass
    return Path(tempfile.mkdtemp(prefix="repvgg-"))


def _processor() -> str:
    """Identify the target of -march=native: machines with other instruction sets may share the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join((platform.machine(), platform.processor(), *features))
