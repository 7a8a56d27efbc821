"""Latency, measured side by side: every round times every candidate, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from repvgg.errors import UsageError
from repvgg.measure.protocol import INTERLEAVED, OnFailure, Reading, SpeedProtocol, take_readings
from repvgg.measure.stopwatch import Call, Stopwatch

_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another one, with the quartiles that show the spread."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True)
class Timing:
    """The latency of one candidate. Times are in seconds for one call; q1 and q3 are the quartiles over the rounds.

    Attributes:
        name: of the candidate.
        median_seconds: over the rounds.
        q1: lower quartile.
        q3: upper quartile.
        rounds: readings of this candidate.
        ratio_to_baseline: the speed-up, see :func:`ratio`. 1 for the baseline itself.
        ratio_q1: lower quartile of these ratios.
        ratio_q3: upper quartile.
        mean_seconds: over the rounds, which is what the paper prints.
        baseline: the candidate that ratios refer to.
    """

    name: str
    median_seconds: float
    q1: float
    q3: float
    rounds: int
    ratio_to_baseline: float
    ratio_q1: float
    ratio_q3: float
    mean_seconds: float
    baseline: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        return asdict(self)

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

    Ctrl-C stops early and keeps what was measured, if at least 3 rounds were complete.

    Args:
        candidates: name to a call without arguments.
        protocol: how often and in which order.
        baseline: the candidate that ratios refer to; None for the first.
        on_progress: called after each round with the rounds done and the rounds in all.
        on_failure: told of a candidate that ran out of memory; the others go on without it. None raises.
        stopwatch: None takes the clock of this machine.

    Returns:
        One :class:`Timing` for each candidate that was measured, in their order.

    Raises:
        UsageError: there are no candidates, or none is called ``baseline``.
        KeyboardInterrupt: Ctrl-C before 3 rounds were complete.
    """
    base = next(iter(candidates), "") if baseline is None else baseline
    if base not in candidates:
        raise UsageError(f"The baseline {base!r} is not among the candidates: {', '.join(candidates) or 'none'}.")
    readings: list[Reading] = []
    total = protocol.rounds * (1 if protocol.interleaved else len(candidates))

    def keep(reading: Reading) -> None:
        readings.append(reading)
        if on_progress is not None:
            on_progress(len(readings), total)

    try:
        failed = take_readings(candidates, protocol, keep, on_failure=on_failure, stopwatch=stopwatch)
    except KeyboardInterrupt:
        if not (kept := measured(readings, _FEWEST_ROUNDS)):
            raise
        return summarize(readings, [name for name in candidates if name in kept], base)
    return summarize(readings, [name for name in candidates if name not in failed], base)


def measured(readings: Sequence[Reading], fewest: int = 1) -> set[str]:
    """The candidates of which there are so many readings."""
    names = {name for reading in readings for name in reading}
    return {name for name in names if len(seconds_of(readings, name)) >= fewest}


def seconds_of(readings: Sequence[Reading], name: str) -> list[float]:
    """All readings of one candidate."""
    return [reading[name] for reading in readings if name in reading]


def summarize(readings: Sequence[Reading], names: Sequence[str], baseline: str) -> list[Timing]:
    """One :class:`Timing` for each of ``names``; where the baseline is not among them, the first takes its place."""
    base = baseline if baseline in names else next(iter(names), baseline)
    return [_timing(readings, name, base) for name in names]


def _timing(readings: Sequence[Reading], name: str, base: str) -> Timing:
    own = seconds_of(readings, name)
    q1, median, q3 = quartiles(own)
    faster = ratio(readings, name, base)
    spread = (faster.median, faster.q1, faster.q3)
    return Timing(name, median, q1, q3, len(own), *spread, statistics.fmean(own), base)


def ratio(readings: Sequence[Reading], name: str, baseline: str) -> Ratio:
    """How many times as fast as ``baseline`` a candidate is.

    Where rounds hold both: the median over the rounds of (baseline's time / this time). Each ratio is taken within one
    round, so that a slow spell of the machine cancels. Where they were measured one after the other: the ratio of the
    means, from (baseline's q1 / this q3) to (baseline's q3 / this q1), which is wide, as nothing cancels.
    """
    if pairs := [reading[baseline] / reading[name] for reading in readings if {name, baseline} <= reading.keys()]:
        q1, median, q3 = quartiles(pairs)
        return Ratio(median, q1, q3)
    own, base = seconds_of(readings, name), seconds_of(readings, baseline)
    (own_q1, _, own_q3), (base_q1, _, base_q3) = quartiles(own), quartiles(base)
    return Ratio(statistics.fmean(base) / statistics.fmean(own), base_q1 / own_q3, base_q3 / own_q1)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between values; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3
