"""Threads that run the code of a network beside its caller, and sleep in between."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from repvgg.engine import program
from repvgg.engine.jit import Code
from repvgg.engine.memory import zeros
from repvgg.errors import UsageError


def thread_count(threads: int | None) -> int:
    """How many threads to take: as asked, or as many as PyTorch takes, but no more than this process may run on.

    Raises:
        UsageError: fewer than one are asked for, or more than one where the engine has no threads.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"The engine needs at least one thread, not {threads}.")
    if not program.has_workers():
        if threads is not None and threads > 1:
            raise UsageError("The engine has threads of its own on Linux alone: ask for threads=1.")
        return 1
    return threads or min(torch.get_num_threads(), len(os.sched_getaffinity(0)))


@final
class Workers:
    """The caller of a network, and ``threads - 1`` threads that help it.

    They end when this object goes, or when Python does. A forked child has none of them, and its caller does all work
    alone.

    Args:
        code: with the functions of :func:`repvgg.engine.program.runtime`.
        table: the steps; see :mod:`repvgg.engine.program`.
        threads: all of them together.
    """

    def __init__(self, code: Code, table: NDArray[np.int64], threads: int) -> None:
        self._table, self._shared = table, zeros(2 * program.SHARED).view(np.int64)
        self._shared[program.THREADS] = threads
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(code.address(program.RUN))
        if threads > 1:
            helpers = [_started(code, self._shared, table) for _ in range(threads - 1)]
            weakref.finalize(self, _stop, code, self._shared, helpers, os.getpid())

    def run(self, batch: int, steps: slice = slice(None)) -> None:
        """Run all steps on a batch, or those of a slice; it returns when they are done. One caller at a time."""
        table = self._table[steps]
        self._shared[program.STEPS], self._shared[program.COUNT] = table.ctypes.data, len(table)
        self._run(self._shared.ctypes.data, batch)


def _function(code: Code, name: str) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address(name))


def _started(code: Code, shared: NDArray[np.int64], table: NDArray[np.int64]) -> threading.Thread:
    """A thread inside of the code; it keeps the code and what it reads alive until it returns."""
    enter = _function(code, program.WORKER)

    def work(kept: object = (code, table)) -> None:
        enter(shared.ctypes.data)

    thread = threading.Thread(target=work, name="repvgg-engine", daemon=True)
    thread.start()
    return thread


def _stop(code: Code, shared: NDArray[np.int64], helpers: list[threading.Thread], process: int) -> None:
    if os.getpid() != process:  # a forked child, where they never ran
        return
    _function(code, program.STOPPER)(shared.ctypes.data)
    for helper in helpers:
        helper.join()
