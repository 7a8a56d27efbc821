"""A network as a table of steps in memory, and the functions that run it: a call for the whole network.

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
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from repvgg.engine.isa import Isa
from repvgg.engine.memory import zeros
from repvgg.engine.program_text import NOBODY_TEXT, RUN_TEXT, WORKER_TEXT

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


def shared(threads: int, processors: Iterable[int]) -> NDArray[np.int64]:
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


def runtime(isa: Isa) -> str:
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
