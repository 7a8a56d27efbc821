"""Thread pool: runs a model's table of kernel calls on the calling thread and on workers, which sleep between calls.

``thread_pool.c`` describes how work is claimed and how threads wait. The LLVM IR generated from it is stored next to it
and compiled like the kernels, so that no C compiler is needed. This module allocates the structures of the C code and
starts the threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import warnings
import weakref
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from repvgg.engine.codegen.disk_cache import cached_object_code
from repvgg.engine.codegen.jit import MachineCode, VectorIsa
from repvgg.engine.graph import Floats
from repvgg.engine.runtime.memory import FLOAT_BYTES, aligned_zeros
from repvgg.errors import FallbackWarning, UsageError

RUN, WORKER, QUIESCE, SHUTDOWN = "pool_run", "pool_worker", "pool_quiesce", "pool_shutdown"
MAX_CPUS = 1024  # as glibc's cpu_set_t; workers do not use processors of higher numbers
_STACK_BYTES = 2**22  # a fused Winograd kernel keeps up to 1.25 MiB of transformed tiles on the stack
_ARCHITECTURES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_ISA_ARCHITECTURES = {"sse2": "x86_64", "avx2": "x86_64", "avx512": "x86_64", "neon": "aarch64"}


def _structure(itemsize: int, **fields: tuple[int, Any]) -> np.dtype[np.void]:
    """Return the dtype of a C structure, given (offset in bytes, type) of each field."""
    offsets, formats = zip(*fields.values(), strict=True)
    return np.dtype({"names": [*fields], "formats": formats, "offsets": offsets, "itemsize": itemsize})


#: ``struct step``: one kernel call. Pointers are int64; the pool sets ``num_items``, ``claims`` and ``units_done``.
STEP = _structure(
    192,
    function=(0, np.int64),
    source=(8, np.int64),
    target=(16, np.int64),
    weights=(24, np.int64),
    bias=(32, np.int64),
    units_per_block=(40, np.int64),
    items_per_block=(48, np.int64),
    num_items=(56, np.int64),
    claims=(64, np.int64),
    units_done=(128, np.int64),
    items_per_image=(136, np.int64),
    first_image=(144, np.int64),
    max_images=(152, np.int64),
)

#: ``struct thread_pool``; the thread ids of the workers, an int64 each, follow it.
POOL = _structure(
    640,
    call=(0, np.uint32),
    sleepers=(64, np.uint32),
    steps=(128, np.int64),
    num_steps=(136, np.int64),
    num_threads=(144, np.int64),
    stop=(192, np.int64),
    active_workers=(256, np.int64),
    avoided_cpu=(320, np.int64),
    workers_started=(328, np.int64),
    allowed_cpus=(384, (np.uint8, (MAX_CPUS // 8,))),
    worker_cpus=(512, (np.uint8, (MAX_CPUS // 8,))),
)


def check_threads(threads: int | None) -> None:
    """Check a number of threads; None is the default.

    Raises:
        UsageError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"The engine needs at least one thread, not {threads}.")


def thread_count(threads: int | None) -> int:
    """Return ``threads``, or by default ``torch.get_num_threads()``, at most one for each processor.

    The processors are those of this process's affinity mask. Where the pool has no workers (see :func:`has_workers`),
    the result is 1, with a warning if it would be more.

    Raises:
        UsageError: ``threads`` is less than one.
    """
    check_threads(threads)
    count = threads or min(torch.get_num_threads(), len(_processors()))
    if count > 1 and not has_workers():
        warnings.warn(
            f"The engine's worker threads need Linux on x86-64 or ARM64: running on one thread instead of {count}.",
            FallbackWarning,
            stacklevel=2,
        )
        return 1
    return count


def has_workers() -> bool:
    """Return whether the pool has worker threads on this platform: they need Linux's futex, on x86-64 or ARM64."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES


def thread_pool_ir(isa: VectorIsa) -> str:
    """Return the LLVM IR of the pool for a processor.

    It defines ``pool_run``, ``pool_quiesce`` and ``pool_shutdown``, and ``pool_worker`` where there are workers.
    """
    if not has_workers():
        return _read_ir("single_threaded")
    return _read_ir(f"linux_{_ISA_ARCHITECTURES.get(isa.name, _ARCHITECTURES[platform.machine()])}")


@cache
def _read_ir(variant: str) -> str:
    return Path(__file__).with_name(f"thread_pool.{variant}.ll").read_text()


def step_table(steps: int) -> NDArray[np.void]:
    """Return a zeroed table of :data:`STEP`, aligned to cache lines: ``steps`` rows, and a sentinel.

    The sentinel's claim word never has the number of a call, so that a worker that reads it finds no work.
    """
    rows: NDArray[np.void] = aligned_zeros((steps + 1) * STEP.itemsize // FLOAT_BYTES).view(STEP)
    rows["items_per_block"] = 1  # a worker of an earlier call divides by it before it reads the claim word
    return rows


def _processors() -> Collection[int]:
    """Return the numbers of the processors that this thread may run on."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)


def _shared_state(threads: int, processors: Iterable[int]) -> Floats:
    """Return an initialized :data:`POOL`, followed by space for the thread ids of the workers."""
    memory = aligned_zeros((POOL.itemsize + 8 * threads) // FLOAT_BYTES)
    pool = _as_pool(memory)
    pool["num_threads"], pool["avoided_cpu"] = threads, -1  # no processor has this number
    for processor in processors:
        if processor < MAX_CPUS:
            pool["allowed_cpus"][processor // 8] |= 1 << processor % 8
    return memory


def _as_pool(memory: Floats) -> Any:
    return memory[: POOL.itemsize // FLOAT_BYTES].view(POOL)[0]


@final
class ThreadPool:
    """The calling thread and ``threads - 1`` workers. One caller at a time.

    The workers end when this object is collected, or when Python exits.
    """

    def __init__(self, isa: VectorIsa, threads: int) -> None:
        self._code, self._threads = _compile(isa), threads
        kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
        self._run = ctypes.CFUNCTYPE(None, *kinds)(self._code.address(RUN))
        self._quiesce = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2)(self._code.address(QUIESCE))
        self._no_steps = step_table(0)
        self._shared = self._start(0)

    def run(self, steps: int, num_steps: int, batch: int) -> None:
        """Run ``num_steps`` steps on a batch of images; ``steps`` is the address of a row of a :func:`step_table`."""
        self._run(self._address, steps, num_steps, batch)

    def quiesce(self) -> None:
        """Wait until no worker reads the steps of an earlier call, so that their memory may be freed."""
        self._quiesce(self._address, self._no_steps.ctypes.data)

    def restart(self) -> None:
        """Start workers in a forked child, where those of the parent do not run."""
        # Step tables hold the numbers of past calls: numbering continues, so that none of them is used again.
        self._shared = self._start(int(_as_pool(self._shared)["call"]))

    def _start(self, call: int) -> Floats:
        """Start workers that wait for the call after number ``call``; return what they share."""
        shared = _shared_state(self._threads, _processors())
        pool = _as_pool(shared)
        pool["call"], pool["steps"] = call, self._no_steps.ctypes.data
        if self._threads > 1:
            # Not self: workers that refer to the pool would keep it alive, so it would never shut them down.
            owners = (self._code, self._no_steps)
            workers = [_start_worker(self._code, shared, owners) for _ in range(self._threads - 1)]
            weakref.finalize(self, _shutdown, self._code, shared, workers, os.getpid())
        self._address: int = shared.ctypes.data
        return shared


def _compile(isa: VectorIsa) -> MachineCode:
    return MachineCode([cached_object_code(thread_pool_ir(isa), isa)], isa)


def _function(code: MachineCode, name: str) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address(name))


def _start_worker(code: MachineCode, shared: Floats, owners: object) -> threading.Thread:
    enter = _function(code, WORKER)

    def work(owners: object = owners) -> None:  # holds what the worker reads until it returns
        enter(shared.ctypes.data)

    # A Python thread rather than pthread_create: ctypes releases the GIL, and the stack size is portable.
    thread = threading.Thread(target=work, name="repvgg-engine", daemon=True)
    before = threading.stack_size(_STACK_BYTES)  # of all threads that start from here on, so it is restored
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


def _shutdown(code: MachineCode, shared: Floats, workers: list[threading.Thread], process: int) -> None:
    if os.getpid() != process:  # in a forked child, the workers do not exist
        return
    _function(code, SHUTDOWN)(shared.ctypes.data)
    for worker in workers:
        worker.join()
