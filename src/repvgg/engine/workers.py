"""Threads that run the code of a network beside its caller, and sleep in between."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Collection
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from repvgg.engine import program
from repvgg.engine.cache import cached_object_code
from repvgg.engine.isa import Isa
from repvgg.engine.jit import Code
from repvgg.errors import FallbackWarning, UsageError

_STACK = 2**22  # bytes; kernels keep transformed tiles there


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that makes no sense.

    Raises:
        UsageError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"The engine needs at least one thread, not {threads}.")


def thread_count(threads: int | None) -> int:
    """How many threads to take: as asked, or as many as PyTorch takes, but no more than this process may run on.

    PyTorch's number is that of ``OMP_NUM_THREADS``, if that is set. Where the engine has no threads of its own it is
    1, with a warning if it would be more.

    Raises:
        UsageError: fewer than one are asked for.
    """
    check_threads(threads)
    count = threads or min(torch.get_num_threads(), len(_processors()))
    if count > 1 and not program.has_workers():
        warnings.warn(
            f"The engine has threads of its own on Linux alone: one thread computes, not {count}.",
            FallbackWarning,
            stacklevel=2,
        )
        return 1
    return count


def _processors() -> Collection[int]:
    """Numbers of those that this thread may run on."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)


@final
class Workers:
    """The caller of a network, and ``threads - 1`` threads that help it.

    They end when this object goes, or when Python does.

    Args:
        isa: of this processor.
        threads: all of them together.
    """

    def __init__(self, isa: Isa, threads: int) -> None:
        self._code = Code([cached_object_code(program.runtime(isa), isa)], isa)
        kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
        self._run = ctypes.CFUNCTYPE(None, *kinds)(self._code.address(program.RUN))
        self._forget = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2)(self._code.address(program.FORGET))
        self._nothing, self._threads = program.table(0), threads
        self._shared = self._begun(0)

    def run(self, row: int, count: int, batch: int) -> None:
        """Run rows of a table on a batch; it returns when they are done. One caller at a time.

        Args:
            row: address of the first, of a :func:`repvgg.engine.program.table`.
            count: of rows; there is another one behind them.
            batch: images.
        """
        self._run(self._address, row, count, batch)

    def forget(self) -> None:
        """Wait until no thread looks at a table that was run before, so that its memory may go."""
        self._forget(self._address, self._nothing.ctypes.data)

    def restart(self) -> None:
        """Have threads in a forked child, where those of its parent do not run."""
        self._shared = self._begun(int(self._shared[program.CALL]))  # tables know the numbers of calls

    def _begun(self, call: int) -> NDArray[np.int64]:
        """Threads that wait for the call behind number ``call``, and what they share."""
        shared = program.shared(self._threads, _processors())
        shared[program.CALL], shared[program.STEPS] = call, self._nothing.ctypes.data
        if self._threads > 1:
            kept = (self._code, self._nothing)
            helpers = [_started(self._code, shared, kept) for _ in range(self._threads - 1)]
            weakref.finalize(self, _stop, self._code, shared, helpers, os.getpid())
        self._address: int = shared.ctypes.data
        return shared


def _function(code: Code, name: str) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address(name))


def _started(code: Code, shared: NDArray[np.int64], kept: object) -> threading.Thread:
    """A thread inside of the code; it keeps alive what it reads until it returns."""
    enter = _function(code, program.WORKER)

    def work(kept: object = kept) -> None:
        enter(shared.ctypes.data)

    thread = threading.Thread(target=work, name="repvgg-engine", daemon=True)
    before = threading.stack_size(_STACK)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


def _stop(code: Code, shared: NDArray[np.int64], helpers: list[threading.Thread], process: int) -> None:
    if os.getpid() != process:  # a forked child, where they never ran
        return
    _function(code, program.STOPPER)(shared.ctypes.data)
    for helper in helpers:
        helper.join()
