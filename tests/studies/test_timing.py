"""Rounds stored as store, groups, speed-ups and engines; with given seconds."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from repvgg.errors import UsageError
from repvgg.measure import INTERLEAVED, RunSettings
from repvgg.studies import timing
from repvgg.studies.candidates import ENGINES, Candidate
from repvgg.studies.store import CellStore, Header
from repvgg.studies.timing import OUT_OF_MEMORY, Speeds, fit_together, measure_rounds, plan_groups, prepare
from tests.studies.helpers import SECONDS, FakeStopwatch, Tiny

ROUNDS = replace(INTERLEAVED, rounds=4, warmup_seconds=0.0)
PAIRS = [("a", "b"), ("c", "d")]


@pytest.fixture
def store(tmp_path):
    return CellStore.open(tmp_path / "study", Header("s", {}, {}))


def measure(store, seconds, monkeypatch, *, groups=None, stopwatch=None, progress=lambda done, total: None):
    stopwatch = stopwatch or FakeStopwatch()
    monkeypatch.setattr(RunSettings, "stopwatch", lambda settings, batch: stopwatch)

    def make_calls(names, on_failure):
        return {name: partial(Tiny(seconds[name], name), torch.ones(1)) for name in names}

    measure_rounds(groups or [list(seconds)], make_calls, store, RunSettings(), ROUNDS, 8, progress)
    return stopwatch


def test_networks_form_one_group_or_pairs_with_the_baseline():
    assert plan_groups(list("abcde"), PAIRS, "e", True) == [list("abcde")]
    assert plan_groups(list("abcde"), PAIRS, "e", False) == [list("eab"), list("ecd"), ["e"]]
    assert plan_groups(list("abce"), PAIRS, "a", False) == [["a", "b"], ["a", "c"], ["a", "e"]]
    assert plan_groups(list("bc"), PAIRS, "a", False) == [["b"], ["c"]]


def test_weights_have_to_fit_into_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(timing, "available_memory", lambda device: 800)
    assert fit_together(100, RunSettings())
    assert not fit_together(101, RunSettings())
    assert fit_together(200, RunSettings(dtype="bfloat16"))
    monkeypatch.setattr(timing, "available_memory", lambda device: None)
    assert fit_together(1e20, RunSettings())


def test_speeds_and_speedups(store, monkeypatch):
    steps = []
    measure(store, {"a": 0.5, "b": 1.0}, monkeypatch, progress=lambda *step: steps.append(step))
    found = Speeds.from_cells(store.values, 8)
    assert (found.images_per_second("a"), found.images_per_second("b")) == (16.0, 8.0)
    assert found.cells("a")[1:] == (16.0, 16.0)
    assert found.ratio("a", "b").median == 2.0
    assert found.rounds == 4
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.images_per_second("c") is None
    assert found.cells("c")[1:] == (None, None)
    assert found.ratio("a", "c") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("reads", [4, 5, 7, 8])
def test_interrupted_rounds_are_continued(store, monkeypatch, error, reads):
    """Four readings warm up, and a round takes two."""
    seconds = {"a": 0.5, "b": 1.0}
    with pytest.raises(error):
        measure(store, seconds, monkeypatch, stopwatch=FakeStopwatch(reads, error))
    complete = (reads - 4) // 2
    again = CellStore.open(store.folder, store.header)
    assert Speeds.from_cells(again.values, 8).rounds == complete
    stopwatch = measure(again, seconds, monkeypatch)
    assert stopwatch.calls == {"a": 2 + 4 - complete, "b": 2 + 4 - complete}
    assert Speeds.from_cells(again.values, 8).rounds == 4
    assert measure(again, seconds, monkeypatch).calls == {}, "no round is missing"


def test_network_out_of_memory_is_recorded_and_the_others_continue(store, monkeypatch):
    measure(store, {"a": 0.5, "b": None, "c": 1.0}, monkeypatch)
    found = Speeds.from_cells(store.values, 8)
    assert found.images_per_second("b") == OUT_OF_MEMORY
    assert found.ratio("b", "a") is None
    assert found.ratio("a", "c").median == 2.0
    assert "can't allocate memory" in found.failures["b"]
    assert Speeds.from_cells(CellStore.open(store.folder, store.header).values, 8).failures == found.failures


def test_continued_study_keeps_its_first_groups(store, monkeypatch):
    seconds = {"a": 0.5, "b": 1.0, "c": 2.0}
    with pytest.raises(KeyboardInterrupt):
        measure(store, seconds, monkeypatch, groups=[["a", "b"], ["a", "c"]], stopwatch=FakeStopwatch(4 + 8 + 5))
    measure(store, seconds, monkeypatch, groups=[["a", "b", "c"]])
    found = Speeds.from_cells(store.values, 8)
    assert [len(group) for group in found.groups] == [4, 4]
    assert found.ratio("c", "a").median == 0.25
    assert found.ratio("c", "b") is None, "no round holds both"


def test_seconds_of_the_helpers_follow_the_paper():
    assert SECONDS["resnet18"] / SECONDS["repvgg_a0"] == pytest.approx(1.33, abs=0.005)


def candidate(engine: str) -> Candidate:
    return Candidate("one", "one", "plain form", lambda: torch.nn.Conv2d(3, 4, 3), (3, 9, 9), engine)


@pytest.mark.parametrize(
    ("engine", "settings", "words"),
    [
        ("onnx", RunSettings(), "choose one of torch"),
        ("repvgg", RunSettings(dtype="bfloat16"), "in float32 on the CPU"),
    ],
)
def test_unknown_engine_or_unsupported_settings(engine, settings, words):
    with pytest.raises(UsageError, match=words):
        prepare([candidate(engine)], settings, lambda name, error: None)


RUNTIMES = ("openvino", "executorch", "ncnn")


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_the_same_outputs(engine):
    needs = {"repvgg": "llvmlite", "repvgg-searched": "llvmlite"} | {name: name for name in RUNTIMES}
    pytest.importorskip(needs.get(engine, "torch"))
    one = candidate(engine)
    model = one.make()
    run = ENGINES[engine].prepare(model, RunSettings(), one.image)
    for batch in (1, 3, 2):
        x = RunSettings().images(batch, one.image)
        with torch.inference_mode():
            out = torch.as_tensor(run(x))
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
