"""The compiled passes: built once a machine with its own C++ compiler, kept in the user's cache, loaded with ctypes."""

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

_SOURCE = Path(__file__).with_name("normsum.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi")
_EXTRAS = (("-fopenmp", "-mprefer-vector-width=512"), ("-fopenmp",), ())  # the first that the compiler takes
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300

_LOG = logging.getLogger("repvgg")


@final
@dataclass(frozen=True, eq=False)
class Build:
    """What came of building the passes.

    Attributes:
        function: ``repvgg_norm_sum`` of the library, or None: there is no library.
        report: one sentence: where it is, or why there is none.
    """

    function: Any
    report: str


@cache
def build() -> Build:
    """Build the passes, or load what was built before; what goes wrong is logged once and becomes the report."""
    try:
        path = _library()
        function = ctypes.CDLL(str(path)).repvgg_norm_sum
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        report = (
            f"The compiled training passes could not be built, PyTorch's own are used ({said[0] if said else error})."
        )
        _LOG.warning(report)
        return Build(None, report)
    function.restype = ctypes.c_int
    size, number = ctypes.c_int64, ctypes.c_int
    function.argtypes = [number, number, number, number, size, size, size, number, ctypes.c_void_p, ctypes.c_void_p]
    return Build(function, f"The compiled training passes are those in {path}.")


def _library() -> Path:
    """The shared library, built unless it is in the cache.

    Raises:
        OSError: there is no compiler, or nowhere to write.
        SubprocessError: the compiler fails, or takes longer than 5 minutes.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler among {', '.join(_COMPILERS)}; install one, or name one in CXX")
    known = "\n".join((_SOURCE.read_text(encoding="utf-8"), compiler, *_FLAGS, _processor()))
    path = _folder() / f"normsum-{hashlib.sha256(known.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        handle, name = tempfile.mkstemp(".so", "building-", path.parent)
        os.close(handle)
        try:
            _compile(compiler, name)
            os.replace(name, path)  # whole or not at all: other processes may be building it as well
        finally:
            Path(name).unlink(missing_ok=True)
    return path


def _compile(compiler: str, target: str) -> None:
    """Compile with all extras that the compiler takes; without OpenMP the passes run on one thread."""
    for extras in _EXTRAS:
        command = [*compiler.split(), *_FLAGS, *extras, str(_SOURCE), "-o", target]
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False, text=True)
        if done.returncode == 0:
            return
    raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _folder() -> Path:
    """``$REPVGG_CACHE``, or ``repvgg`` in the user's cache; a new one of this process where neither can be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("REPVGG_CACHE") or Path(home) / "repvgg")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="repvgg-"))


def _processor() -> str:
    """What the code is made for: a home may be shared by machines with other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join((platform.machine(), platform.processor(), *told))
