import json
import threading
from functools import partial

import pytest
import torch

from repvgg.measure import compare

FORMS = ["train form", "batch norms folded", "plain form"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No warm-up: nobody reads these figures."""
    monkeypatch.setattr("repvgg.measure.compare", partial(compare, warmup_seconds=0.0, min_round_seconds=1e-4))


def test_table(repvgg, files):
    outcome = repvgg("bench", files.train, "--rounds", 3, "--batch", 2)
    assert (outcome.code, outcome.err) == (0, "")
    title, *rows = outcome.out.splitlines()
    assert title.split() == ["form", "median", "ms", "quartiles", "images/s", "speed-up", "quartiles"]
    assert [" ".join(row.split()[:-5]) for row in rows[:3]] == FORMS
    assert rows[0].split()[-2:] == ["1.00", "1.00-1.00"]
    assert "3 rounds" in rows
    assert f"{files.train}: batch 2, 16 x 16, float32, contiguous, {torch.get_num_threads()} threads" in rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json(repvgg, dtype):
    arguments = ("--rounds", 1, "--input-size", 9, "--threads", 2, "--dtype", dtype, "--channels-last", "--json")
    before = torch.get_num_threads()
    outcome = repvgg("bench", "repvgg_t0", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert [timing["name"] for timing in result["timings"]] == FORMS
    assert all(timing["rounds"] == 1 and timing["median_seconds"] > 0 for timing in result["timings"])
    settings = {"model": "repvgg_t0", "batch": 1, "input_size": 9, "dtype": dtype, "channels_last": True}
    assert result["settings"] == settings
    assert result["environment"]["threads"] == "2"
    assert torch.get_num_threads() == before


def test_says_so_when_there_is_no_speed_up(repvgg, files, monkeypatch):
    ticks = iter(range(10**9))
    monkeypatch.setattr(
        "repvgg.measure.compare", partial(compare, warmup_seconds=0.0, clock=lambda: float(next(ticks)))
    )
    out = repvgg("bench", files.train, "--rounds", 3).out
    assert "The plain form is not clearly faster than the train form here." in out.splitlines()


def test_a_name_wins_over_a_file_of_that_name(repvgg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repvgg_t0").write_text("no checkpoint")
    assert repvgg("bench", "repvgg_t0", "--rounds", 1, "--input-size", 8).code == 0


@pytest.mark.parametrize("flag", ["--batch", "--input-size", "--rounds", "--threads"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_that_make_no_sense(refused, flag, number):
    assert "at least 1" in refused("bench", "repvgg_t0", flag, number)


def test_models_that_cannot_be_timed(refused, files, tmp_path):
    assert "plain form already" in refused("bench", files.plain)
    assert "There is no file" in refused("bench", tmp_path / "missing.safetensors")
    assert "There is a folder" in refused("bench", tmp_path)
    assert "did you mean repvgg_a0" in refused("bench", "repvgg_a00")


@pytest.mark.parametrize("arguments", [("--batch", "x"), ("--dtype", "int8"), ("--rounds", "1.5")])
def test_values_that_do_not_parse(repvgg, arguments):
    outcome = repvgg("bench", "repvgg_t0", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert arguments[0] in outcome.err


def test_more_images_than_memory(refused):
    assert "not enough memory" in refused("bench", "repvgg_t0", "--batch", 10**12)


def test_the_bar_of_a_terminal_is_drawn_between_rounds_only(repvgg, files, monkeypatch):
    """A bar that a thread draws would take its time from what is being timed."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    seen = []

    def comparing(calls, *, rounds, on_progress):
        seen.append({thread.name for thread in threading.enumerate()})
        on_progress(1, rounds)
        return compare(calls, rounds=1, warmup_seconds=0.0, min_round_seconds=1e-4)

    before = {thread.name for thread in threading.enumerate()}
    monkeypatch.setattr("repvgg.measure.compare", comparing)
    outcome = repvgg("bench", files.train, "--rounds", 2)
    assert outcome.code == 0
    assert "rounds" in outcome.err
    assert seen == [before]
    assert outcome.out.startswith("form ")
