"""How long calls take: by the clock of this machine, or by that of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch

Call = Callable[[], object]
Clock = Callable[[], float]


class Stopwatch(Protocol):
    """Whatever can tell how many seconds ``calls`` calls in a row take."""

    def __call__(self, call: Call, calls: int) -> float:
        """Call so many times; return the seconds of all of them together."""
        ...


@dataclass(frozen=True)
class WallClock:
    """By a clock of this machine. Where CUDA is in use, its queues are empty whenever the clock is read.

    Attributes:
        clock: seconds from any origin; a test puts in its own.
    """

    clock: Clock = time.perf_counter

    def __call__(self, call: Call, calls: int) -> float:
        """Call so many times; return the seconds of all of them together."""
        _synchronize()
        start = self.clock()
        for _ in range(calls):
            call()
        _synchronize()
        return self.clock() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


class Event(Protocol):
    """What is used of ``torch.cuda.Event``."""

    def record(self) -> None:
        """Take the time when the GPU has done all that was asked of it until now."""

    def synchronize(self) -> None:
        """Wait until then."""

    def elapsed_time(self, end_event: Event, /) -> float:
        """Milliseconds from this event to ``end_event``."""
        ...


def _timing_event() -> Event:
    return cast("Event", torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class CudaEvents:
    """By the clock of the GPU, between two events on the current stream.

    Attributes:
        waits: wait for the answer of each call before the next begins, which is what one user of the model sees
            (latency). Otherwise calls follow each other without waiting, as a busy server makes them (throughput).
        event: makes an event; a test puts in its own.
    """

    waits: bool = False
    event: Callable[[], Event] = _timing_event

    def __call__(self, call: Call, calls: int) -> float:
        """Call so many times; return the seconds of all of them together."""
        if self.waits:
            return sum(self._between(call, 1) for _ in range(calls))
        return self._between(call, calls)

    def _between(self, call: Call, calls: int) -> float:
        start, end = self.event(), self.event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
