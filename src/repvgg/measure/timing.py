"""Latency, measured side by side: two protocols, two clocks, and the summary over the rounds.

In the interleaved protocol every round times every candidate, so that a transient slowdown affects all of them equally;
speed-ups are ratios within a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from repvgg._contexts import gc_paused
from repvgg.errors import UsageError, is_out_of_memory

Call = Callable[[], object]
Clock = Callable[[], float]

#: Seconds for one call, by candidate: all candidates of an interleaved round, or a single one.
Sample = Mapping[str, float]

#: Takes the name of a candidate that ran out of memory, and PyTorch's error.
OnFailure = Callable[[str, Exception], None]

MIN_ROUNDS_AFTER_INTERRUPT = 3  # quartiles of fewer rounds are meaningless

#: Seconds of rest for contenders with threads of their own. Most runtimes let idle threads spin for less (libgomp, ONNX
#: Runtime, OpenVINO: milliseconds); Intel's OpenMP spins for 200 ms, which :func:`rest_until_idle` waits for.
REST_SECONDS = 0.02
MAX_REST_SECONDS = 0.5


class Stopwatch(Protocol):
    """Times ``calls`` consecutive calls."""

    def __call__(self, call: Call, calls: int) -> float:
        """Make the calls; return the seconds of all of them together."""
        ...


@dataclass(frozen=True)
class WallClock:
    """Time by a clock of the host. If CUDA is in use, wait for its queues before each reading of the clock."""

    clock: Clock = time.perf_counter  # seconds from any origin; tests pass their own

    def __call__(self, call: Call, calls: int) -> float:
        """Make the calls; return the seconds of all of them together."""
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
    """The part of ``torch.cuda.Event`` that is used."""

    def record(self) -> None:
        """Record the time at which the GPU finishes the work queued so far."""

    def synchronize(self) -> None:
        """Wait for that time."""

    def elapsed_time(self, end_event: Event, /) -> float:
        """Return the milliseconds from this event to ``end_event``."""
        ...


def _timing_event() -> Event:
    return cast("Event", torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class CudaEvents:
    """Time by the clock of the GPU, between two events on the current stream."""

    # Wait for the result of each call before the next one starts (latency). Otherwise calls are queued back to back
    # (throughput).
    waits: bool = False
    event: Callable[[], Event] = _timing_event  # makes an event; tests pass their own

    def __call__(self, call: Call, calls: int) -> float:
        """Make the calls; return the seconds of all of them together."""
        if self.waits:
            return sum(self._between_events(call, 1) for _ in range(calls))
        return self._between_events(call, calls)

    def _between_events(self, call: Call, calls: int) -> float:
        start, end = self.event(), self.event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class SpeedProtocol:
    """How often candidates are called, and in which order.

    Attributes:
        rounds: samples of each candidate.
        warmup_calls: minimum number of calls of each candidate before its first sample.
        warmup_seconds: minimum duration of the warm-up.
        min_round_seconds: shortest duration to read off the clock, above 0. A faster candidate is called 2, 4, 8, …
            times in a row, and the mean is taken.
        interleaved: each round samples every candidate, starting with the next one each time; otherwise all rounds of
            a candidate are taken before those of the next.
        rest_seconds: when the candidate changes, shortest rest before its sample, followed by an untimed call that
            wakes its own threads. 0 for candidates that share their threads; :data:`REST_SECONDS` for engines, whose
            idle threads spin for a while on the cores that the next candidate needs.
        batch: default number of images in a call.

    Raises:
        UsageError: ``rounds`` or ``batch`` is below 1, ``min_round_seconds`` is not positive, or ``rest_seconds`` is
            negative.
    """

    rounds: int = 30
    warmup_calls: int = 2
    warmup_seconds: float = 0.5
    min_round_seconds: float = 0.01
    interleaved: bool = True
    batch: int = 1
    rest_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batch < 1:
            raise UsageError(f"rounds and batch must be at least 1, got {self.rounds} and {self.batch}.")
        if not self.min_round_seconds > 0.0:
            raise UsageError(f"min_round_seconds must be above 0, got {self.min_round_seconds}.")
        if not self.rest_seconds >= 0.0:
            raise UsageError(f"rest_seconds must be at least 0, got {self.rest_seconds}.")


#: Suited to shared machines: many short rounds, medians, ratios within each round.
INTERLEAVED = SpeedProtocol()

#: The paper's (§4.1): 50 batches of 128 to warm up, then 50 timed ones, one model after the other.
PAPER = SpeedProtocol(
    rounds=50, warmup_calls=50, warmup_seconds=0.0, min_round_seconds=1e-6, interleaved=False, batch=128
)

PROTOCOLS = {"interleaved": INTERLEAVED, "paper": PAPER}


def take_samples(
    candidates: Mapping[str, Call],
    protocol: SpeedProtocol,
    on_sample: Callable[[Sample], None],
    *,
    on_failure: OnFailure | None = None,
    stopwatch: Stopwatch | None = None,
) -> set[str]:
    """Time the candidates as the protocol says, and pass each sample to ``on_sample``.

    Runs in ``torch.inference_mode`` with Python's garbage collector off.

    Args:
        candidates: name to a call without arguments.
        protocol: how often and in which order.
        on_sample: takes the seconds for one call, by name; its own time is not measured.
        on_failure: called for a candidate that runs out of memory, which is then left out; None raises.
        stopwatch: None takes the wall clock.

    Returns:
        The names of the candidates that ran out of memory.

    Raises:
        UsageError: there are no candidates.
    """
    if not candidates:
        raise UsageError("There is nothing to time: pass at least one candidate.")
    gc.collect()
    with torch.inference_mode(), gc_paused():
        sampler = _Sampler(candidates, protocol, stopwatch or WallClock(), on_failure)
        for sample in sampler.interleaved() if protocol.interleaved else sampler.one_by_one():
            on_sample(sample)
        return sampler.failed


class _Sampler:
    def __init__(
        self,
        candidates: Mapping[str, Call],
        protocol: SpeedProtocol,
        stopwatch: Stopwatch,
        on_failure: OnFailure | None,
    ) -> None:
        self.candidates, self.protocol, self.stopwatch = candidates, protocol, stopwatch
        self.on_failure = on_failure
        self.calls: dict[str, int] = {}  # consecutive calls for one sample, by candidate
        self.last: str | None = None  # the candidate that ran last
        self.failed: set[str] = set()

    def interleaved(self) -> Iterator[Sample]:
        for name in self.candidates:
            self._warm_up(name)
        for index in range(self.protocol.rounds):
            names = [name for name in self.candidates if name not in self.failed]
            # Rotate the order, because a candidate finds its predecessor's data in the caches.
            first = index % max(1, len(names))
            if sample := self._sample(names[first:] + names[:first]):
                yield sample

    def one_by_one(self) -> Iterator[Sample]:
        for name in self.candidates:
            self._warm_up(name)
            for _ in range(self.protocol.rounds):
                if name not in self.failed and (sample := self._sample([name])):
                    yield sample

    def _warm_up(self, name: str) -> None:
        """Warm up a candidate, and find how many consecutive calls fill ``min_round_seconds``."""
        call, protocol = self.candidates[name], self.protocol
        self._rest_before(name)
        with catch_out_of_memory(name, self._drop):
            self.stopwatch(call, 1)  # the first call may compile, allocate or read files: ignore its time
            done, spent, calls = 1, 0.0, 1
            while True:
                seconds = self.stopwatch(call, calls)
                done, spent = done + calls, spent + seconds
                too_short = seconds < protocol.min_round_seconds
                if not too_short and spent >= protocol.warmup_seconds and done >= protocol.warmup_calls:
                    break
                calls *= 2 if too_short else 1
            self.calls[name] = calls

    def _sample(self, names: Sequence[str]) -> Sample:
        sample = {}
        for name in names:
            rested = self._rest_before(name)
            with catch_out_of_memory(name, self._drop):
                if rested:
                    self.stopwatch(self.candidates[name], 1)
                sample[name] = self.stopwatch(self.candidates[name], self.calls[name]) / self.calls[name]
        return sample

    def _rest_before(self, name: str) -> bool:
        """Rest if the protocol says so and another candidate ran last; return whether it did."""
        before, self.last = self.last, name
        if not self.protocol.rest_seconds or before in (None, name):
            return False
        rest_until_idle(self.protocol.rest_seconds)
        return True

    def _drop(self, name: str, error: Exception) -> None:
        if self.on_failure is None:
            raise error
        self.failed.add(name)
        self.on_failure(name, error)


def rest_until_idle(at_least: float, at_most: float = MAX_REST_SECONDS) -> bool:
    """Sleep until no thread of this process uses a processor; return False if one still does after ``at_most`` seconds.

    Args:
        at_least: shortest sleep, in seconds.
        at_most: longest sleep, in seconds.
    """
    start = time.perf_counter()
    while True:
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(max(at_least, 0.005) / 2)
        now = time.perf_counter()
        is_idle = time.process_time() - used < 0.1 * (now - begin)  # the process time of all threads together
        if now - start >= (at_least if is_idle else at_most):
            return is_idle


@contextmanager
def catch_out_of_memory(name: str, on_failure: OnFailure) -> Iterator[None]:
    """Call ``on_failure`` if memory runs out inside, and continue after the block; all other errors pass."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_failure(name, error)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # outside the handler, where the error's traceback no longer holds tensors


@dataclass(frozen=True)
class Ratio:
    """A speed-up over another candidate, with quartiles over the rounds."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Timing:
    """The latency of one candidate. Times are seconds for one call; q1 and q3 are quartiles over the rounds."""

    name: str  # of the candidate
    median_seconds: float  # over the rounds
    q1: float  # lower quartile
    q3: float  # upper quartile
    rounds: int  # number of samples
    ratio_to_baseline: float  # the speed-up, see ratio; 1 for the baseline itself
    ratio_q1: float  # lower quartile of the speed-up
    ratio_q3: float  # upper quartile of the speed-up
    mean_seconds: float  # over the rounds, which is what the paper prints
    baseline: str  # the candidate that the speed-up refers to

    def __str__(self) -> str:
        times = " ".join(f"{1e3 * seconds:.3f}" for seconds in (self.q1, self.median_seconds, self.q3))
        ratios = f"x{self.ratio_to_baseline:.2f} ({self.ratio_q1:.2f} to {self.ratio_q3:.2f})"
        return f"{self.name}: {times} ms (q1, median, q3), speed-up {ratios}, {self.rounds} rounds"


def compare(
    candidates: Mapping[str, Call],
    protocol: SpeedProtocol = INTERLEAVED,
    *,
    baseline: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_failure: OnFailure | None = None,
    stopwatch: Stopwatch | None = None,
) -> list[Timing]:
    """Time the candidates against each other, in ``torch.inference_mode``.

    Ctrl-C stops early and keeps the complete rounds, if there are at least 3.

    Args:
        candidates: name to a call without arguments.
        protocol: how often and in which order.
        baseline: the candidate that speed-ups refer to; None for the first.
        on_progress: called after each sample with the number done and the total.
        on_failure: called for a candidate that runs out of memory, which is then left out; None raises.
        stopwatch: None takes the wall clock.

    Returns:
        One :class:`Timing` for each candidate that was measured, in their order.

    Raises:
        UsageError: there are no candidates, or none is called ``baseline``.
        KeyboardInterrupt: Ctrl-C before 3 rounds were complete.
    """
    base = next(iter(candidates), "") if baseline is None else baseline
    if base not in candidates:
        raise UsageError(f"The baseline {base!r} is not among the candidates: {', '.join(candidates) or 'none'}.")
    samples: list[Sample] = []
    total = protocol.rounds * (1 if protocol.interleaved else len(candidates))

    def keep(sample: Sample) -> None:
        samples.append(sample)
        if on_progress is not None:
            on_progress(len(samples), total)

    try:
        failed = take_samples(candidates, protocol, keep, on_failure=on_failure, stopwatch=stopwatch)
    except KeyboardInterrupt:
        if not (names := sampled_names(samples, MIN_ROUNDS_AFTER_INTERRUPT)):
            raise
        return summarize(samples, [name for name in candidates if name in names], base)
    return summarize(samples, [name for name in candidates if name not in failed], base)


def sampled_names(samples: Sequence[Sample], at_least: int = 1) -> set[str]:
    """Return the candidates with at least that many samples."""
    names = {name for sample in samples for name in sample}
    return {name for name in names if len(seconds_of(samples, name)) >= at_least}


def seconds_of(samples: Sequence[Sample], name: str) -> list[float]:
    """Return all samples of one candidate."""
    return [sample[name] for sample in samples if name in sample]


def summarize(samples: Sequence[Sample], names: Sequence[str], baseline: str) -> list[Timing]:
    """Return a :class:`Timing` for each name; if the baseline is not among the names, the first one replaces it."""
    base = baseline if baseline in names else next(iter(names), baseline)
    return [_timing(samples, name, base) for name in names]


def _timing(samples: Sequence[Sample], name: str, base: str) -> Timing:
    seconds = seconds_of(samples, name)
    q1, median, q3 = quartiles(seconds)
    speedup = ratio(samples, name, base)
    return Timing(
        name=name,
        median_seconds=median,
        q1=q1,
        q3=q3,
        rounds=len(seconds),
        ratio_to_baseline=speedup.median,
        ratio_q1=speedup.q1,
        ratio_q3=speedup.q3,
        mean_seconds=statistics.fmean(seconds),
        baseline=base,
    )


def ratio(samples: Sequence[Sample], name: str, baseline: str) -> Ratio:
    """Return the speed-up of a candidate over ``baseline``.

    If rounds hold both, that is the median over the rounds of (baseline's time / candidate's time), in which a slow
    phase of the machine cancels. If they were measured one after the other, it is the ratio of the means, from
    (baseline's q1 / candidate's q3) to (baseline's q3 / candidate's q1): wide, because nothing cancels.
    """
    if pairs := [sample[baseline] / sample[name] for sample in samples if {name, baseline} <= sample.keys()]:
        q1, median, q3 = quartiles(pairs)
        return Ratio(median, q1, q3)
    own, base = seconds_of(samples, name), seconds_of(samples, baseline)
    (own_q1, _, own_q3), (base_q1, _, base_q3) = quartiles(own), quartiles(base)
    return Ratio(statistics.fmean(base) / statistics.fmean(own), base_q1 / own_q3, base_q3 / own_q1)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, median and upper quartile, interpolated between values."""
    if len(values) == 1:  # statistics.quantiles needs two
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3
