"""Sampling and summary on a fake clock; no test asserts a time of this machine."""

import gc
import json
from dataclasses import asdict, replace

import pytest
import torch

from repvgg.errors import UsageError
from repvgg.measure import PAPER, SpeedProtocol, WallClock, compare, ratio
from repvgg.measure import timing as timing_module
from repvgg.measure.timing import rest_until_idle
from tests.measure.helpers import Clock, Interrupting

SHORT = SpeedProtocol(rounds=4, min_round_seconds=1.0, warmup_seconds=1.0)
MANY = replace(SHORT, rounds=9)


def timed(clock, candidates, *, protocol=SHORT, on_progress=None, baseline=None, **changes):
    return compare(
        {name: clock.candidate(name, s) for name, s in candidates.items()},
        replace(protocol, **changes),
        stopwatch=WallClock(clock),
        on_progress=on_progress,
        baseline=baseline,
    )


def test_medians_and_speedups():
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


def test_drift_cancels_in_ratios_within_a_round():
    """Each round is ten times as slow as the one before, which a ratio of medians would not cancel."""
    drift = {"a": lambda n: 2.0 * 10.0 ** max(0, n - 2), "b": lambda n: 1.0 * 10.0 ** max(0, n - 2)}
    _, b = timed(Clock(), drift, rounds=6)
    assert (b.ratio_q1, b.ratio_to_baseline, b.ratio_q3) == (2.0, 2.0, 2.0)
    assert b.q3 > 10 * b.q1


def test_candidates_alternate_and_the_order_rotates():
    clock = Clock()
    timed(clock, {"a": 1.0, "b": 1.0, "c": 1.0}, rounds=4)
    assert "".join(clock.log) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_another_candidate_runs_after_a_rest_and_an_untimed_call(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing_module, "rest_until_idle", lambda seconds: clock.log.append(f"rest {seconds}"))
    cold = {"a": lambda n: 9.0 if n in (2, 4) else 1.0, "b": lambda n: 9.0 if n in (2, 5) else 2.0}
    a, b = timed(clock, cold, rounds=3, rest_seconds=0.5)
    assert (a.median_seconds, a.q3, b.median_seconds) == (1.0, 1.0, 2.0)  # the slow calls were not timed
    rest = "rest 0.5"
    assert clock.log == [*"aa", rest, *"bb", rest, *"aa", rest, *"bb", *"b", rest, *"aa", *"a", rest, *"bb"]
    clock.log.clear()
    timed(clock, {"a": 1.0, "b": 1.0}, rounds=2, rest_seconds=0.5, interleaved=False)
    assert clock.log == [*"aaaa", rest, *"bbbb"]
    clock.log.clear()
    timed(clock, {"a": 1.0}, rounds=2, rest_seconds=0.5)
    assert clock.log == [*"aaaa"]


@pytest.mark.parametrize(("spinning", "is_idle", "slept"), [(0.0, True, 0.02), (0.2, True, 0.21), (9.0, False, 0.5)])
def test_a_rest_lasts_until_threads_stop_spinning(monkeypatch, spinning, is_idle, slept):
    clock = Clock()
    clock.now = 0.0
    monkeypatch.setattr(timing_module.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(timing_module.time, "process_time", lambda: min(clock.now, spinning))
    monkeypatch.setattr(timing_module.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    assert rest_until_idle(0.02) == is_idle
    assert slept <= clock.now <= slept + 0.03


def test_short_calls_are_repeated_and_averaged():
    clock = Clock()
    long, short = timed(clock, {"long": 2.0, "short": 0.25}, rounds=2)
    assert (long.median_seconds, short.median_seconds, short.ratio_to_baseline) == (2.0, 0.25, 8.0)
    assert clock.log[-10:] == ["long", *["short"] * 4, *["short"] * 4, "long"], (
        "two rounds, the second in reverse order"
    )


def test_warm_up_has_a_duration_and_ignores_the_first_call():
    clock = Clock()
    (timing,) = timed(clock, {"a": lambda n: 50.0 if n == 0 else 1.0}, rounds=3, warmup_seconds=5.0)
    assert timing.median_seconds == 1.0
    assert clock.log == ["a"] * (1 + 5 + 3)


@pytest.mark.parametrize("complete", [3, 5])
def test_ctrl_c_keeps_complete_rounds(complete):
    clock = Clock()
    b = Interrupting(clock.candidate("b", 1.0), at=2 + complete)
    timings = compare({"a": clock.candidate("a", 2.0), "b": b}, MANY, stopwatch=WallClock(clock))
    assert [timing.rounds for timing in timings] == [complete, complete]
    assert timings[1].ratio_to_baseline == 2.0


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_ctrl_c_with_too_few_rounds_is_raised(calls):
    clock = Clock()
    a = Interrupting(clock.candidate("a", 1.0), at=calls)
    with pytest.raises(KeyboardInterrupt):
        compare({"a": a}, MANY, stopwatch=WallClock(clock))
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_progress_is_reported_after_each_round():
    seen = []
    timed(Clock(), {"a": 1.0, "b": 1.0}, rounds=3, on_progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_candidates_run_in_inference_mode_without_garbage_collection():
    clock, seen = Clock(), set()

    def call() -> None:
        clock.now += 1.0
        seen.add((torch.is_inference_mode_enabled(), gc.isenabled()))

    compare({"a": call}, replace(SHORT, rounds=1), stopwatch=WallClock(clock))
    assert seen == {(True, False)}
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_real_clock():
    protocol = SpeedProtocol(rounds=3, warmup_seconds=0.0)
    first, second = compare({"a": lambda: sum(range(200)), "b": lambda: None}, protocol)
    assert first.median_seconds > 0.0
    assert second.q1 <= second.median_seconds <= second.q3


@pytest.mark.parametrize(
    ("candidates", "options"),
    [
        ({}, {}),
        ({"a": 1.0}, {"rounds": 0}),
        ({"a": 1.0}, {"batch": 0}),
        ({"a": 1.0}, {"baseline": "b"}),
        ({"a": 1.0}, {"min_round_seconds": 0.0}),
        ({"a": 1.0}, {"rest_seconds": -1.0}),
    ],
)
def test_invalid_arguments_are_refused(candidates, options):
    with pytest.raises(UsageError):
        timed(Clock(), candidates, **options)


def test_timing_as_text_and_json():
    _, fast = timed(Clock(), {"slow": 3.0, "fast": 2.0})
    assert "2000.000" in str(fast)
    assert "x1.50" in str(fast)
    assert json.loads(json.dumps(asdict(fast), allow_nan=False))["ratio_to_baseline"] == 1.5


def test_paper_protocol_times_one_candidate_after_the_other():
    clock = Clock()
    few = replace(PAPER, rounds=3, warmup_calls=4)
    a, b = timed(clock, {"a": 4.0, "b": lambda n: [1.0, 2.0, 3.0][n % 3]}, protocol=few)
    assert "".join(clock.log) == "a" * 7 + "b" * 7, "4 calls to warm up, 3 timed ones"
    assert (a.mean_seconds, b.mean_seconds, b.rounds) == (4.0, 2.0, 3)
    assert b.ratio_to_baseline == 2.0, "the ratio of the means"
    assert (b.ratio_q1, b.ratio_q3) == (4.0 / 2.5, 4.0 / 1.5), "nothing cancels: the spreads of both add"


def test_paper_protocol_follows_section_4_1():
    assert (PAPER.warmup_calls, PAPER.rounds, PAPER.batch, PAPER.interleaved) == (50, 50, 128, False)
    clock = Clock()
    timed(clock, {"a": 0.5}, protocol=PAPER)
    assert len(clock.log) == 100


def test_ctrl_c_in_the_paper_protocol_keeps_measured_candidates():
    clock = Clock()
    few = replace(PAPER, rounds=3, warmup_calls=2)
    b = Interrupting(clock.candidate("b", 1.0), at=2 + 2)
    (a,) = compare({"a": clock.candidate("a", 2.0), "b": b}, few, stopwatch=WallClock(clock))
    assert (a.name, a.rounds) == ("a", 3)


class Greedy:
    """Runs out of memory after ``at`` calls, with PyTorch's message."""

    def __init__(self, call, at: int) -> None:
        self.call, self.left = call, at

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        self.call()


@pytest.mark.parametrize("protocol", [SHORT, replace(PAPER, rounds=4, warmup_calls=2)])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_candidate_out_of_memory_is_reported_and_the_others_continue(protocol, calls):
    clock, failures = Clock(), {}
    candidates = {"a": 1.0, "b": 1.0, "c": 2.0}
    made = {name: clock.candidate(name, seconds) for name, seconds in candidates.items()}
    made["b"] = Greedy(made["b"], at=calls)
    timings = compare(made, protocol, stopwatch=WallClock(clock), on_failure=failures.__setitem__)
    assert [(timing.name, timing.rounds) for timing in timings] == [("a", 4), ("c", 4)]
    assert timings[1].ratio_to_baseline == 0.5
    assert list(failures) == ["b"]
    with pytest.raises(RuntimeError, match="can't allocate"):
        compare({"b": Greedy(made["b"].call, at=calls)}, protocol, stopwatch=WallClock(clock))


def test_other_errors_are_raised():
    def broken() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        compare({"a": broken}, SHORT, on_failure=lambda *_: None)


def test_first_measured_candidate_replaces_a_failed_baseline():
    clock = Clock()
    made = {"a": Greedy(lambda: None, at=0), "b": clock.candidate("b", 2.0), "c": clock.candidate("c", 1.0)}
    b, c = compare(made, SHORT, stopwatch=WallClock(clock), on_failure=lambda *_: None)
    assert (b.baseline, c.baseline, c.ratio_to_baseline) == ("b", "b", 2.0)
    assert compare({"a": made["a"]}, SHORT, on_failure=lambda *_: None) == []


def test_ratio_of_any_two_candidates():
    samples = [{"a": 4.0, "b": 2.0, "c": 1.0}, {"a": 9.0, "b": 3.0}]
    assert ratio(samples, "b", "a").median == 2.5
    assert ratio(samples, "c", "b").median == 2.0
    assert ratio(samples, "a", "a").median == 1.0
