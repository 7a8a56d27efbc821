"""Latency, measured side by side: every round times every candidate, so that a drift of the machine hits all alike."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from repvgg.errors import UsageError

_FEWEST_ROUNDS = 3

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """The latency of one candidate. Times are in seconds for one call; q1 and q3 are the quartiles over the rounds.

    Attributes:
        name: of the candidate.
        median_seconds: over the rounds.
        q1: lower quartile.
        q3: upper quartile.
        rounds: complete rounds.
        ratio_to_baseline: the speed-up, the median over the rounds of (baseline's time / this time). Each ratio is
            taken within one round, so that a slow spell of the machine cancels. 1 for the baseline itself.
        ratio_q1: lower quartile of these ratios.
        ratio_q3: upper quartile.
    """

    name: str
    median_seconds: float
    q1: float
    q3: float
    rounds: int
    ratio_to_baseline: float
    ratio_q1: float
    ratio_q3: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        return asdict(self)

    def __str__(self) -> str:
        times = " ".join(f"{1e3 * seconds:.3f}" for seconds in (self.q1, self.median_seconds, self.q3))
        ratios = f"x{self.ratio_to_baseline:.2f} ({self.ratio_q1:.2f} to {self.ratio_q3:.2f})"
        return f"{self.name}: {times} ms (q1, median, q3), speed-up {ratios}, {self.rounds} rounds"


def compare(
    candidates: Mapping[str, Call],
    *,
    rounds: int = 30,
    min_round_seconds: float = 0.01,
    warmup_seconds: float = 0.5,
    baseline: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Time the candidates against each other, interleaved, in ``torch.inference_mode``.

    Each round times every candidate once, and each round starts with the next one. A candidate that takes less than
    ``min_round_seconds`` is called 2, 4, 8, … times in a row and the mean is taken. Python's garbage collector is off
    meanwhile. Where CUDA is in use the device is synchronized before the clock is read.

    Ctrl-C stops early and keeps what was measured, if at least 3 rounds were complete.

    Args:
        candidates: name to a call without arguments.
        rounds: how many.
        min_round_seconds: the shortest time worth reading off the clock, above 0.
        warmup_seconds: how long each candidate is called before the first round; at least two calls.
        baseline: the candidate that ratios refer to; None for the first.
        on_progress: called after each round with the rounds done and ``rounds``.
        clock: seconds from any origin; a test puts in its own.

    Returns:
        One :class:`Timing` a candidate, in their order.

    Raises:
        UsageError: there are no candidates, no rounds, no time in a round, or no candidate called ``baseline``.
        KeyboardInterrupt: Ctrl-C before 3 rounds were complete.
    """
    if not candidates or rounds < 1:
        raise UsageError(f"Measuring needs a candidate and a round, not {len(candidates)} and {rounds}.")
    if min_round_seconds <= 0.0:
        raise UsageError(f"A clock cannot read off {min_round_seconds} s: let a round take longer than that.")
    base = next(iter(candidates)) if baseline is None else baseline
    if base not in candidates:
        raise UsageError(f"The baseline {base!r} is not among {', '.join(candidates)}.")
    samples: list[dict[str, float]] = []
    with torch.inference_mode(), _collector_off():
        calls = {name: _warm_up(call, min_round_seconds, warmup_seconds, clock) for name, call in candidates.items()}
        try:
            for sample in _rounds(candidates, calls, rounds, clock):
                samples.append(sample)
                if on_progress is not None:
                    on_progress(len(samples), rounds)
        except KeyboardInterrupt:
            if len(samples) < _FEWEST_ROUNDS:
                raise
    return [_timing(name, base, samples) for name in candidates]


def _warm_up(call: Call, min_round_seconds: float, warmup_seconds: float, clock: Clock) -> int:
    """Call for at least ``warmup_seconds``; return how many calls in a row take ``min_round_seconds``."""
    call()  # the first may compile, allocate and read files: it says nothing about the others
    start, calls = clock(), 1
    while True:
        short = calls * _mean_seconds(call, calls, clock) < min_round_seconds
        if not short and clock() - start >= warmup_seconds:
            return calls
        calls *= 2 if short else 1


def _rounds(
    candidates: Mapping[str, Call], calls: Mapping[str, int], rounds: int, clock: Clock
) -> Iterator[dict[str, float]]:
    """Seconds for a call of each candidate, round by round; round r starts with candidate r."""
    names = list(candidates)
    for index in range(rounds):
        first = index % len(names)
        order = names[first:] + names[:first]
        yield {name: _mean_seconds(candidates[name], calls[name], clock) for name in order}


def _mean_seconds(call: Call, calls: int, clock: Clock) -> float:
    _synchronize()
    start = clock()
    for _ in range(calls):
        call()
    _synchronize()
    return (clock() - start) / calls


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


@contextmanager
def _collector_off() -> Iterator[None]:
    """Collect garbage once, then not until the end."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _timing(name: str, base: str, samples: Sequence[Mapping[str, float]]) -> Timing:
    q1, median, q3 = _quartiles([sample[name] for sample in samples])
    ratios = [sample[base] / sample[name] for sample in samples]
    ratio_q1, ratio, ratio_q3 = _quartiles(ratios)
    return Timing(name, median, q1, q3, len(samples), ratio, ratio_q1, ratio_q3)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between values; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def environment() -> dict[str, str]:
    """Where a measurement was made: processor, its instruction set as PyTorch uses it, cores, threads, versions.

    The GPU is named where CUDA is in use; asking does not start it.
    """
    stamp = {
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count() or "unknown"),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        stamp["gpu"] = torch.cuda.get_device_name()
    return stamp


def _processor() -> str:
    """The model name of the processor, from Linux's /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"
