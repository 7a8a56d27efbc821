"""The logic of the measurement, on a clock that the candidates move by hand; no test asserts a time of this machine."""

import gc
import json

import pytest
import torch

from repvgg.errors import UsageError
from repvgg.measure import compare, environment


class Clock:
    """Seconds that pass only where a candidate says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name, seconds):
        """A call that takes ``seconds``, or ``seconds(n)`` the n-th time, counted from 0."""
        calls = 0

        def call() -> None:
            nonlocal calls
            self.now += seconds(calls) if callable(seconds) else seconds
            self.log.append(name)
            calls += 1

        return call


def timed(clock, candidates, **options):
    defaults = {"rounds": 4, "min_round_seconds": 1.0, "warmup_seconds": 1.0, "clock": clock}
    return compare({name: clock.candidate(name, s) for name, s in candidates.items()}, **defaults | options)


def test_medians_and_speed_ups():
    slow, fast = timed(Clock(), {"slow": 8.0, "fast": 2.0})
    assert (slow.name, slow.median_seconds, slow.ratio_to_baseline) == ("slow", 8.0, 1.0)
    assert (fast.name, fast.median_seconds, fast.ratio_to_baseline) == ("fast", 2.0, 4.0)
    assert (fast.q1, fast.q3, fast.rounds) == (2.0, 2.0, 4)
    slow, fast = timed(Clock(), {"slow": 8.0, "fast": 2.0}, baseline="fast")
    assert (slow.ratio_to_baseline, fast.ratio_to_baseline) == (0.25, 1.0)


def test_quartiles_by_hand():
    times = iter([1.0, 1.0, 5.0, 1.0, 4.0, 2.0, 3.0])  # first call, warm-up, five rounds
    (timing,) = timed(Clock(), {"a": lambda n: next(times)}, rounds=5)
    assert (timing.q1, timing.median_seconds, timing.q3) == (2.0, 3.0, 4.0)
    times = iter([1.0, 1.0, 7.0])
    (timing,) = timed(Clock(), {"a": lambda n: next(times)}, rounds=1)
    assert (timing.q1, timing.median_seconds, timing.q3, timing.rounds) == (7.0, 7.0, 7.0, 1)


def test_ratios_are_taken_within_a_round_so_that_a_drift_cancels():
    """Each round is ten times as slow as the one before; ratios of medians would depend on which round is whose."""
    drift = {"a": lambda n: 2.0 * 10.0 ** max(0, n - 2), "b": lambda n: 1.0 * 10.0 ** max(0, n - 2)}
    _, b = timed(Clock(), drift, rounds=6)
    assert (b.ratio_q1, b.ratio_to_baseline, b.ratio_q3) == (2.0, 2.0, 2.0)
    assert b.q3 > 10 * b.q1


def test_candidates_take_turns_and_the_order_rotates():
    clock = Clock()
    timed(clock, {"a": 1.0, "b": 1.0, "c": 1.0}, rounds=4)
    assert "".join(clock.log) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_short_calls_are_repeated_and_divided_out():
    clock = Clock()
    long, short = timed(clock, {"long": 2.0, "short": 0.25}, rounds=2)
    assert (long.median_seconds, short.median_seconds, short.ratio_to_baseline) == (2.0, 0.25, 8.0)
    assert clock.log[-10:] == ["long", *["short"] * 4, *["short"] * 4, "long"], "two rounds, the second the other way"


def test_warming_up_lasts_and_the_first_call_does_not_count():
    clock = Clock()
    (timing,) = timed(clock, {"a": lambda n: 50.0 if n == 0 else 1.0}, rounds=3, warmup_seconds=5.0)
    assert timing.median_seconds == 1.0
    assert clock.log == ["a"] * (1 + 5 + 3)


class Interrupting:
    """Raises Ctrl-C at one call."""

    def __init__(self, call, at: int) -> None:
        self.call, self.left = call, at

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.call()


@pytest.mark.parametrize("complete", [3, 5])
def test_ctrl_c_keeps_complete_rounds(complete):
    clock = Clock()
    b = Interrupting(clock.candidate("b", 1.0), at=2 + complete)
    timings = compare(
        {"a": clock.candidate("a", 2.0), "b": b}, rounds=9, min_round_seconds=1.0, warmup_seconds=1.0, clock=clock
    )
    assert [timing.rounds for timing in timings] == [complete, complete]
    assert timings[1].ratio_to_baseline == 2.0


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_ctrl_c_with_too_few_rounds_is_passed_on(calls):
    clock = Clock()
    a = Interrupting(clock.candidate("a", 1.0), at=calls)
    with pytest.raises(KeyboardInterrupt):
        compare({"a": a}, rounds=9, min_round_seconds=1.0, warmup_seconds=1.0, clock=clock)
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_progress_is_told_after_each_round():
    seen = []
    timed(Clock(), {"a": 1.0, "b": 1.0}, rounds=3, on_progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_candidates_run_in_inference_mode_without_the_collector():
    clock, seen = Clock(), set()

    def call() -> None:
        clock.now += 1.0
        seen.add((torch.is_inference_mode_enabled(), gc.isenabled()))

    compare({"a": call}, rounds=1, min_round_seconds=1.0, warmup_seconds=1.0, clock=clock)
    assert seen == {(True, False)}
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_the_real_clock_works_too():
    first, second = compare({"a": lambda: sum(range(200)), "b": lambda: None}, rounds=3, warmup_seconds=0.0)
    assert first.median_seconds > 0.0
    assert second.q1 <= second.median_seconds <= second.q3


@pytest.mark.parametrize(
    ("candidates", "options"),
    [
        ({}, {}),
        ({"a": 1.0}, {"rounds": 0}),
        ({"a": 1.0}, {"baseline": "b"}),
        ({"a": 1.0}, {"min_round_seconds": 0.0}),
    ],
)
def test_arguments_that_make_no_sense(candidates, options):
    with pytest.raises(UsageError):
        timed(Clock(), candidates, **options)


def test_a_timing_reads_well_and_is_json():
    _, fast = timed(Clock(), {"slow": 3.0, "fast": 2.0})
    assert "2000.000" in str(fast)
    assert "x1.50" in str(fast)
    assert json.loads(json.dumps(fast.to_dict(), allow_nan=False))["ratio_to_baseline"] == 1.5


def test_the_environment_is_a_stamp_of_words():
    stamp = environment()
    assert stamp["torch"] == torch.__version__
    assert stamp["threads"] == str(torch.get_num_threads())
    assert {"cpu", "cores", "instructions", "python", "platform"} <= stamp.keys()
    assert all(isinstance(value, str) and value for value in stamp.values())
