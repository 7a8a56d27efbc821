"""Threads that run the code of a network beside its caller, and sleep in between.

A network as a table of steps in memory, and the functions that run it: a call for the whole network.

A row of the table is 24 i64, in three cache lines. The first: the function, four pointers (see
``kernels.kernel.UNITS``), units of a block, parts of a block, and the parts of the batch. The second is claimed from,
the third counts what is done, and says how many parts an image has, which image of the batch comes first, and how many
there are at most; the parts of the batch, claims and counts belong to the code. A row that nobody can claim stands
behind the last.

Work is claimed, not shared out: whoever comes takes the next chunk of a step with one compare-and-swap, and a step is
over when all its units are done. So a thread that comes late, or not at all, holds nobody up: the caller can do
everything alone. Half of the threads take chunks from the end, so that what one thread wrote is mostly what it reads in
the next step. A claim counts the chunks that are taken from either end, 16 bits each, and carries the number of the
call, so that a thread which was left behind by an earlier call takes nothing of a later one; the batch of a row changes
only when the claims of the call before are void. Idle threads look around for a moment, and then sleep on a futex.
Linux likes to wake a thread on the processor of who wakes it, which is busy, and to leave it there for milliseconds: so
workers are kept off the caller's processor, by a call of the system whenever the caller has moved before workers are
woken.

Calls may run different tables one after the other. Before the memory of one goes, ``forget`` sees to it that no thread
that was left behind still looks at it.

The IR of what runs a table of steps; see :mod:`repvgg.engine.runtime.thread_pool`, which fills in the names in braces.
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
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from repvgg.engine.codegen.disk_cache import cached_object_code
from repvgg.engine.codegen.jit import Code, Isa
from repvgg.engine.runtime.memory import zeros
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
    if count > 1 and not has_workers():
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
        self._code = Code([cached_object_code(thread_pool_ir(isa), isa)], isa)
        kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
        self._run = ctypes.CFUNCTYPE(None, *kinds)(self._code.address(RUN))
        self._forget = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2)(self._code.address(FORGET))
        self._nothing, self._threads = table(0), threads
        self._shared = self._begun(0)

    def run(self, row: int, count: int, batch: int) -> None:
        """Run rows of a table on a batch; it returns when they are done. One caller at a time.

        Args:
            row: address of the first, of a :func:`repvgg.engine.runtime.thread_pool.table`.
            count: of rows; there is another one behind them.
            batch: images.
        """
        self._run(self._address, row, count, batch)

    def forget(self) -> None:
        """Wait until no thread looks at a table that was run before, so that its memory may go."""
        self._forget(self._address, self._nothing.ctypes.data)

    def restart(self) -> None:
        """Have threads in a forked child, where those of its parent do not run."""
        self._shared = self._begun(int(self._shared[CALL]))  # tables know the numbers of calls

    def _begun(self, call: int) -> NDArray[np.int64]:
        """Threads that wait for the call behind number ``call``, and what they share."""
        shared = shared_words(self._threads, _processors())
        shared[CALL], shared[STEPS] = call, self._nothing.ctypes.data
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
    enter = _function(code, WORKER)

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
    _function(code, STOPPER)(shared.ctypes.data)
    for helper in helpers:
        helper.join()


WORDS = 24  # of a row; places in it:
FUNCTION, SOURCE, TARGET, WEIGHTS, BIAS, UNITS, BLOCK = range(7)
PARTS, FIRST, LIMIT = 17, 18, 19
CALL, SLEEPERS, STEPS, COUNT, THREADS, STOP, INSIDE = 0, 8, 16, 17, 18, 24, 32  # i64 that all threads share
AVOIDED, BEGUN, ALLOWED, LEFT, WORKERS = 40, 41, 48, 64, 80  # the last is as long as there are threads
PROCESSORS = 64 * (LEFT - ALLOWED)  # bits of a set of processors
RUN, WORKER, STOPPER, FORGET = "run", "worker", "stop", "forget"

_CHUNKS, _MOST = 16, 2**14  # of a step for each thread, and of all of them
_SPINS = 2500  # looks for work, of about 0.1 us, before a thread sleeps; more of them cost others their time
_YIELDS = 4095  # looks before a thread that waits for others lets somebody else run; a power of two, less one
_CALLS = ("FUTEX", "GETTID", "SETAFFINITY")  # of Linux, by processor
_X86_CALLS, _ARM_CALLS = (202, 186, 203), (98, 178, 122)
_NUMBERS = {"x86_64": _X86_CALLS, "AMD64": _X86_CALLS, "aarch64": _ARM_CALLS, "arm64": _ARM_CALLS}
_WAIT, _WAKE, _EVERYBODY = 128, 129, 2**31 - 1  # both private to the process

_X86 = ("call void @llvm.x86.sse2.pause()", "declare void @llvm.x86.sse2.pause()")
_ARM = ("call void @llvm.aarch64.hint(i32 1)", "declare void @llvm.aarch64.hint(i32)")
_PAUSES = {"avx512": _X86, "avx2": _X86, "sse2": _X86, "neon": _ARM}


def table(steps: int) -> NDArray[np.int64]:
    """A table to be filled: so many rows, and the one behind them."""
    rows = zeros(2 * WORDS * (steps + 1)).view(np.int64).reshape(-1, WORDS)
    rows[:, BLOCK] = 1  # what is divided by
    return rows


def shared_words(threads: int, processors: Iterable[int]) -> NDArray[np.int64]:
    """What so many threads share, which may run on these processors."""
    words = zeros(2 * (WORKERS + threads)).view(np.int64)
    words[THREADS], words[AVOIDED] = threads, -1
    bits = words[ALLOWED:LEFT].view(np.uint8)
    for processor in processors:
        if processor < PROCESSORS:
            bits[processor // 8] |= 1 << processor % 8
    return words


def has_workers() -> bool:
    """Whether the code can have threads of its own here: they need the futex of Linux."""
    return sys.platform == "linux" and platform.machine() in _NUMBERS


def thread_pool_ir(isa: Isa) -> str:
    """The IR of ``run(shared, steps, count, batch)``, ``forget(shared, nothing)``, ``stop(shared)``, and a worker.

    ``worker(shared)`` returns after a stop; where there is no futex there is none. ``nothing`` is a table of no steps.
    """
    call, declaration = _PAUSES.get(isa.name, ("", ""))
    pause = f"define internal void @pause() alwaysinline nounwind {{{{\n  {call}\n  ret void\n}}}}\n{declaration}\n"
    text = RUN_TEXT + (WORKER_TEXT if has_workers() else NOBODY_TEXT) + pause
    places = {"STEPS": STEPS, "COUNT": COUNT, "INSIDE": INSIDE, "THREADS": THREADS, "STOP": STOP, "SLEEPERS": SLEEPERS}
    names = {"RUN": RUN, "WORKER": WORKER, "STOPPER": STOPPER, "FORGET": FORGET, "WORDS": WORDS, "PARTS": PARTS}
    names |= {"FIRST": FIRST, "LIMIT": LIMIT}
    waits = {"CHUNKS": _CHUNKS, "MOST": _MOST, "SPINS": _SPINS, "YIELDS": _YIELDS, "WAIT": _WAIT, "WAKE": _WAKE}
    sets = {"AVOIDED": AVOIDED, "BEGUN": BEGUN, "ALLOWED": ALLOWED, "LEFT": LEFT, "WORKERS": WORKERS}
    sets |= {"WORKERS_LESS_1": WORKERS - 1, "PROCESSORS": PROCESSORS, "EVERYBODY": _EVERYBODY}
    sets |= {"WORDS_OF_SET": PROCESSORS // 64, "BYTES_OF_SET": PROCESSORS // 8}
    calls = dict(zip(_CALLS, _NUMBERS.get(platform.machine(), (0, 0, 0)), strict=True))
    return text.format(**places, **names, **waits, **sets, **calls)


#: ``run``, ``stop`` and ``forget``, and ``work``, which goes through the steps of a call beside other threads.
RUN_TEXT = """
define void @{RUN}(ptr %shared, ptr %steps, i64 %count, i64 %batch) nounwind {{
entry:
  %steps_at = getelementptr i64, ptr %shared, i64 {STEPS}
  store ptr %steps, ptr %steps_at
  %count_at = getelementptr i64, ptr %shared, i64 {COUNT}
  store i64 %count, ptr %count_at
  %before = load atomic i32, ptr %shared monotonic, align 64
  %call = add i32 %before, 1
  %call64 = zext i32 %call to i64
  %tag = shl i64 %call64, 32
  br label %reset
reset:
  %step = phi i64 [0, %entry], [%next, %reset]
  %place = mul i64 %step, {WORDS}
  %row = getelementptr i64, ptr %steps, i64 %place
  %claim_at = getelementptr i64, ptr %row, i64 8
  %done_at = getelementptr i64, ptr %row, i64 16
  %batch_at = getelementptr i64, ptr %row, i64 7
  store atomic i64 0, ptr %done_at monotonic, align 64
  store atomic i64 %tag, ptr %claim_at release, align 64
  %parts_at = getelementptr i64, ptr %row, i64 {PARTS}
  %of_image = load i64, ptr %parts_at
  %first_at = getelementptr i64, ptr %row, i64 {FIRST}
  %first = load i64, ptr %first_at
  %limit_at = getelementptr i64, ptr %row, i64 {LIMIT}
  %limit = load i64, ptr %limit_at
  %behind = call i64 @llvm.usub.sat.i64(i64 %batch, i64 %first)
  %images = call i64 @llvm.umin.i64(i64 %behind, i64 %limit)
  %parts = mul i64 %images, %of_image
  store atomic i64 %parts, ptr %batch_at release, align 8
  %next = add i64 %step, 1
  %more = icmp ult i64 %next, %count
  br i1 %more, label %reset, label %publish
publish:
  store atomic i32 %call, ptr %shared seq_cst, align 64
  call void @wake(ptr %shared)
  call void @work(ptr %shared, i32 %call, i64 0)
  ret void
}}

define void @{STOPPER}(ptr %shared) nounwind {{
  %stop_at = getelementptr i64, ptr %shared, i64 {STOP}
  store atomic i64 1, ptr %stop_at seq_cst, align 64
  %before = atomicrmw add ptr %shared, i32 1 seq_cst
  call void @wake(ptr %shared)
  ret void
}}

define void @{FORGET}(ptr %shared, ptr %nothing) nounwind {{
entry:
  %steps_at = getelementptr i64, ptr %shared, i64 {STEPS}
  store atomic ptr %nothing, ptr %steps_at seq_cst, align 8
  %inside_at = getelementptr i64, ptr %shared, i64 {INSIDE}
  br label %look
look:
  %inside = load atomic i64, ptr %inside_at seq_cst, align 8
  %empty = icmp eq i64 %inside, 0
  br i1 %empty, label %end, label %others
others:
  %yielded = call i32 @sched_yield()
  br label %look
end:
  ret void
}}

define internal void @work(ptr %shared, i32 %call, i64 %side) nounwind {{
entry:
  %odd = icmp ne i64 %side, 0
  %one = select i1 %odd, i64 1, i64 65536
  %steps_at = getelementptr i64, ptr %shared, i64 {STEPS}
  %steps = load atomic ptr, ptr %steps_at seq_cst, align 8
  %count_at = getelementptr i64, ptr %shared, i64 {COUNT}
  %count = load i64, ptr %count_at
  %threads_at = getelementptr i64, ptr %shared, i64 {THREADS}
  %threads = load i64, ptr %threads_at
  %many = mul i64 %threads, {CHUNKS}
  %shares = call i64 @llvm.umin.i64(i64 %many, i64 {MOST})
  %call64 = zext i32 %call to i64
  br label %step
step:
  %index = phi i64 [0, %entry], [%following, %finished]
  %place = mul i64 %index, {WORDS}
  %row = getelementptr i64, ptr %steps, i64 %place
  %function = load ptr, ptr %row
  %source_at = getelementptr i64, ptr %row, i64 1
  %source = load ptr, ptr %source_at
  %target_at = getelementptr i64, ptr %row, i64 2
  %target = load ptr, ptr %target_at
  %weights_at = getelementptr i64, ptr %row, i64 3
  %weights = load ptr, ptr %weights_at
  %bias_at = getelementptr i64, ptr %row, i64 4
  %bias = load ptr, ptr %bias_at
  %units_at = getelementptr i64, ptr %row, i64 5
  %units = load i64, ptr %units_at
  %block_at = getelementptr i64, ptr %row, i64 6
  %block = load i64, ptr %block_at
  %parts_at = getelementptr i64, ptr %row, i64 7
  %parts = load atomic i64, ptr %parts_at acquire, align 8
  %filled = add i64 %parts, %block
  %less = sub i64 %filled, 1
  %blocks = udiv i64 %less, %block
  %total = mul i64 %units, %blocks
  %share = udiv i64 %total, %shares
  %chunk = call i64 @llvm.umax.i64(i64 %share, i64 1)
  %short = add i64 %total, %chunk
  %shorter = sub i64 %short, 1
  %chunks = udiv i64 %shorter, %chunk
  %claim_at = getelementptr i64, ptr %row, i64 8
  %done_at = getelementptr i64, ptr %row, i64 16
  br label %claim
claim:
  %seen = load atomic i64, ptr %claim_at acquire, align 64
  %tag = lshr i64 %seen, 32
  %mine = icmp eq i64 %tag, %call64
  br i1 %mine, label %left, label %gone
left:
  %high = lshr i64 %seen, 16
  %front = and i64 %high, 65535
  %back = and i64 %seen, 65535
  %both = add i64 %front, %back
  %some = icmp ult i64 %both, %chunks
  br i1 %some, label %take, label %wait
take:
  %behind = sub i64 %chunks, %back
  %last = sub i64 %behind, 1
  %number = select i1 %odd, i64 %last, i64 %front
  %begin = mul i64 %number, %chunk
  %far = add i64 %begin, %chunk
  %end = call i64 @llvm.umin.i64(i64 %far, i64 %total)
  %taken = sub i64 %end, %begin
  %after = add i64 %seen, %one
  %pair = cmpxchg ptr %claim_at, i64 %seen, i64 %after acq_rel acquire
  %won = extractvalue {{ i64, i1 }} %pair, 1
  br i1 %won, label %compute, label %claim
compute:
  call void %function(ptr %source, ptr %target, ptr %weights, ptr %bias, i64 %blocks, i64 %begin, i64 %end)
  %already = atomicrmw add ptr %done_at, i64 %taken release
  br label %claim
wait:
  %looks = phi i64 [0, %left], [%looked, %patience], [%looked, %others]
  %done = load atomic i64, ptr %done_at acquire, align 64
  %over = icmp eq i64 %done, %total
  br i1 %over, label %finished, label %current
current:
  %now = load atomic i64, ptr %claim_at acquire, align 64
  %now_tag = lshr i64 %now, 32
  %still = icmp eq i64 %now_tag, %call64
  br i1 %still, label %patience, label %gone
patience:
  call void @pause()
  %looked = add i64 %looks, 1
  %rest = and i64 %looked, {YIELDS}
  %tired = icmp eq i64 %rest, 0
  br i1 %tired, label %others, label %wait
others:
  %yielded = call i32 @sched_yield()
  br label %wait
finished:
  %following = add i64 %index, 1
  %again = icmp ult i64 %following, %count
  br i1 %again, label %step, label %gone
gone:
  ret void
}}

declare i64 @llvm.umax.i64(i64, i64)
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.usub.sat.i64(i64, i64)
declare i32 @sched_yield()
"""

#: ``worker``, which waits for calls; ``wake``; and ``avoid``, which keeps workers off the caller's processor.
WORKER_TEXT = """
define void @{WORKER}(ptr %shared) nounwind {{
entry:
  %sleepers_at = getelementptr i64, ptr %shared, i64 {SLEEPERS}
  %inside_at = getelementptr i64, ptr %shared, i64 {INSIDE}
  %stop_at = getelementptr i64, ptr %shared, i64 {STOP}
  %begun_at = getelementptr i64, ptr %shared, i64 {BEGUN}
  %number = atomicrmw add ptr %begun_at, i64 1 seq_cst
  %place = add i64 %number, {WORKERS}
  %even = and i64 %number, 1
  %side = xor i64 %even, 1
  %self_at = getelementptr i64, ptr %shared, i64 %place
  %self = call i64 (i64, ...) @syscall(i64 {GETTID})
  store atomic i64 %self, ptr %self_at seq_cst, align 8
  br label %look
look:
  %last = phi i32 [0, %entry], [%last, %idle], [%last, %sleep], [%call, %serve]
  %looks = phi i64 [0, %entry], [%looked, %idle], [0, %sleep], [0, %serve]
  %call = load atomic i32, ptr %shared seq_cst, align 64
  %new = icmp ne i32 %call, %last
  br i1 %new, label %called, label %nothing
called:
  %stop = load atomic i64, ptr %stop_at seq_cst, align 64
  %stopped = icmp ne i64 %stop, 0
  br i1 %stopped, label %end, label %serve
serve:
  %entered = atomicrmw add ptr %inside_at, i64 1 seq_cst
  call void @work(ptr %shared, i32 %call, i64 %side)
  %left = atomicrmw sub ptr %inside_at, i64 1 seq_cst
  br label %look
nothing:
  %looked = add i64 %looks, 1
  %tired = icmp ugt i64 %looked, {SPINS}
  br i1 %tired, label %sleep, label %idle
idle:
  call void @pause()
  br label %look
sleep:
  %more = atomicrmw add ptr %sleepers_at, i32 1 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 {FUTEX}, ptr %shared, i32 {WAIT}, i32 %last, ptr null)
  %less = atomicrmw sub ptr %sleepers_at, i32 1 seq_cst
  br label %look
end:
  ret void
}}

define internal void @wake(ptr %shared) nounwind {{
entry:
  %sleepers_at = getelementptr i64, ptr %shared, i64 {SLEEPERS}
  %sleepers = load atomic i32, ptr %sleepers_at seq_cst, align 64
  %some = icmp ne i32 %sleepers, 0
  br i1 %some, label %call, label %end
call:
  call void @avoid(ptr %shared)
  %woken = call i64 (i64, ...) @syscall(i64 {FUTEX}, ptr %shared, i32 {WAKE}, i32 {EVERYBODY})
  br label %end
end:
  ret void
}}

define internal void @avoid(ptr %shared) nounwind {{
entry:
  %processor32 = call i32 @sched_getcpu()
  %processor = zext i32 %processor32 to i64
  %avoided_at = getelementptr i64, ptr %shared, i64 {AVOIDED}
  %avoided = load i64, ptr %avoided_at
  %same = icmp eq i64 %processor, %avoided
  %far = icmp uge i64 %processor, {PROCESSORS}
  %skip = or i1 %same, %far
  br i1 %skip, label %end, label %copy
copy:
  %word = phi i64 [0, %entry], [%next, %copy]
  %before = phi i64 [0, %entry], [%some, %copy]
  %from = add i64 %word, {ALLOWED}
  %from_at = getelementptr i64, ptr %shared, i64 %from
  %allowed = load i64, ptr %from_at
  %busy_word = lshr i64 %processor, 6
  %busy_bit = and i64 %processor, 63
  %busy = shl i64 1, %busy_bit
  %others = xor i64 %busy, -1
  %here = icmp eq i64 %word, %busy_word
  %mask = select i1 %here, i64 %others, i64 -1
  %free = and i64 %allowed, %mask
  %to = add i64 %word, {LEFT}
  %to_at = getelementptr i64, ptr %shared, i64 %to
  store i64 %free, ptr %to_at
  %some = or i64 %before, %free
  %next = add i64 %word, 1
  %more = icmp ult i64 %next, {WORDS_OF_SET}
  br i1 %more, label %copy, label %check
check:
  %nowhere = icmp eq i64 %some, 0
  br i1 %nowhere, label %end, label %workers
workers:
  %set = getelementptr i64, ptr %shared, i64 {LEFT}
  %threads_at = getelementptr i64, ptr %shared, i64 {THREADS}
  %threads = load i64, ptr %threads_at
  br label %worker
worker:
  %index = phi i64 [1, %workers], [%following, %moved]
  %known = phi i1 [true, %workers], [%still, %moved]
  %done = icmp uge i64 %index, %threads
  br i1 %done, label %finish, label %move
move:
  %place = add i64 %index, {WORKERS_LESS_1}
  %thread_at = getelementptr i64, ptr %shared, i64 %place
  %thread = load atomic i64, ptr %thread_at seq_cst, align 8
  %begun = icmp ne i64 %thread, 0
  %still = and i1 %known, %begun
  br i1 %begun, label %set_it, label %moved
set_it:
  %result = call i64 (i64, ...) @syscall(i64 {SETAFFINITY}, i64 %thread, i64 {BYTES_OF_SET}, ptr %set)
  br label %moved
moved:
  %following = add i64 %index, 1
  br label %worker
finish:
  br i1 %known, label %keep, label %end
keep:
  store i64 %processor, ptr %avoided_at
  br label %end
end:
  ret void
}}

declare i64 @syscall(i64, ...)
declare i32 @sched_getcpu()
"""

#: ``wake`` where there are no workers.
NOBODY_TEXT = """
define internal void @wake(ptr %shared) nounwind {{
  ret void
}}
"""
