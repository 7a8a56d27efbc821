"""Rounds as cells, groups, ratios; with seconds that the test gives."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from repvgg.errors import UsageError
from repvgg.measure import INTERLEAVED, RunSettings
from repvgg.studies import speeds as module
from repvgg.studies.candidates import Candidate
from repvgg.studies.cells import Cells, Header
from repvgg.studies.engines import ENGINES
from repvgg.studies.speeds import OUT_OF_MEMORY, Speeds, fit_together, measure_rounds, planned_groups
from repvgg.studies.sweep import prepare
from tests.studies.helpers import SECONDS, Stopwatch, Tiny

ROUNDS = replace(INTERLEAVED, rounds=4, warmup_seconds=0.0)
PAIRS = [("a", "b"), ("c", "d")]


@pytest.fixture
def cells(tmp_path):
    return Cells.open(tmp_path / "study", Header("s", {}, {}))


def measure(cells, seconds, monkeypatch, *, groups=None, stopwatch=None, progress=lambda done, total: None):
    stopwatch = stopwatch or Stopwatch()
    monkeypatch.setattr(RunSettings, "stopwatch", lambda setting, batch: stopwatch)

    def make_calls(names, on_failure):

        return {name: partial(Tiny(seconds[name], name), torch.ones(1)) for name in names}

    measure_rounds(groups or [list(seconds)], make_calls, cells, RunSettings(), ROUNDS, 8, progress)
    return stopwatch


def test_one_group_where_all_fit_and_pairs_with_the_baseline_where_not():
    assert planned_groups(list("abcde"), PAIRS, "e", True) == [list("abcde")]
    assert planned_groups(list("abcde"), PAIRS, "e", False) == [list("eab"), list("ecd"), ["e"]]
    assert planned_groups(list("abce"), PAIRS, "a", False) == [["a", "b"], ["a", "c"], ["a", "e"]]
    assert planned_groups(list("bc"), PAIRS, "a", False) == [["b"], ["c"]]


def test_all_fit_into_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda device: 800)
    assert fit_together(100, RunSettings())
    assert not fit_together(101, RunSettings())
    assert fit_together(200, RunSettings(dtype="bfloat16"))
    monkeypatch.setattr(module, "available_memory", lambda device: None)
    assert fit_together(1e20, RunSettings())


def test_speeds_and_ratios(cells, monkeypatch):
    steps = []
    measure(cells, {"a": 0.5, "b": 1.0}, monkeypatch, progress=lambda *step: steps.append(step))
    found = Speeds.of(cells.values, 8)
    assert (found.images_per_second("a"), found.images_per_second("b")) == (16.0, 8.0)
    assert found.quartiles("a") == (16.0, 16.0)
    assert found.ratio("a", "b").median == 2.0
    assert found.rounds == 4
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.images_per_second("c") is None
    assert found.quartiles("c") == (None, None)
    assert found.ratio("a", "c") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("reads", [4, 5, 7, 8])
def test_what_was_interrupted_goes_on_where_it_stopped(cells, monkeypatch, error, reads):
    """Four reads to warm up, two a round."""
    seconds = {"a": 0.5, "b": 1.0}
    with pytest.raises(error):
        measure(cells, seconds, monkeypatch, stopwatch=Stopwatch(reads, error))
    complete = (reads - 4) // 2
    again = Cells.open(cells.folder, cells.header)
    assert Speeds.of(again.values, 8).rounds == complete
    stopwatch = measure(again, seconds, monkeypatch)
    assert stopwatch.calls == {"a": 2 + 4 - complete, "b": 2 + 4 - complete}
    assert Speeds.of(again.values, 8).rounds == 4
    assert measure(again, seconds, monkeypatch).calls == {}, "nothing is missing any more"


def test_what_runs_out_of_memory_is_recorded_and_the_rest_goes_on(cells, monkeypatch):
    measure(cells, {"a": 0.5, "b": None, "c": 1.0}, monkeypatch)
    found = Speeds.of(cells.values, 8)
    assert found.images_per_second("b") == OUT_OF_MEMORY
    assert found.ratio("b", "a") is None
    assert found.ratio("a", "c").median == 2.0
    assert "can't allocate memory" in found.lost["b"]
    assert Speeds.of(Cells.open(cells.folder, cells.header).values, 8).lost == found.lost


def test_groups_keep_the_plan_that_they_began_with(cells, monkeypatch):
    seconds = {"a": 0.5, "b": 1.0, "c": 2.0}
    with pytest.raises(KeyboardInterrupt):
        measure(cells, seconds, monkeypatch, groups=[["a", "b"], ["a", "c"]], stopwatch=Stopwatch(4 + 8 + 5))
    measure(cells, seconds, monkeypatch, groups=[["a", "b", "c"]])
    found = Speeds.of(cells.values, 8)
    assert [len(group) for group in found.groups] == [4, 4]
    assert found.ratio("c", "a").median == 0.25
    assert found.ratio("c", "b") is None, "they were in no round together"


def test_the_seconds_of_the_helpers_are_those_of_the_paper():
    assert SECONDS["resnet18"] / SECONDS["repvgg_a0"] == pytest.approx(1.33, abs=0.005)


def candidate(engine: str) -> Candidate:
    return Candidate("one", "one", "plain form", lambda: torch.nn.Conv2d(3, 4, 3), (3, 9, 9), engine)


@pytest.mark.parametrize(
    ("engine", "setting", "words"),
    [("onnx", RunSettings(), "there are torch"), ("repvgg", RunSettings(dtype="bfloat16"), "in float32 on the CPU")],
)
def test_an_engine_that_is_not_there_or_cannot(engine, setting, words):
    with pytest.raises(UsageError, match=words):
        prepare([candidate(engine)], setting, lambda name, error: None)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_computes_the_same(engine):
    needs = {"openvino": "openvino", "repvgg": "llvmlite", "repvgg-searched": "llvmlite"}
    pytest.importorskip(needs.get(engine, "torch"))
    one = candidate(engine)
    model = one.make()
    run = ENGINES[engine].prepare(model, RunSettings(), one.image)
    for batch in (1, 3, 2):
        x = RunSettings().images(batch, one.image)
        with torch.inference_mode():
            out = torch.as_tensor(run(x))
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
