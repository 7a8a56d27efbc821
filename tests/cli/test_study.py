"""``repvgg study`` as a thin verb; what studies do is tested with them."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from repvgg.measure import RunSettings
from repvgg.studies import STUDY_MODULES, find_study, network_speed
from tests.cli.helpers import contents

TINY = ("--input-size", 8, "--rounds", 3, "--max-gmacs", 1.9, "--batch", 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Networks of one multiplication, and a stopwatch that gives a second; returns how to interrupt it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network_speed, "deployed", lambda name: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    monkeypatch.setattr(network_speed, "count_cell", lambda table, models: {})

    def after(reads):
        left = [reads]

        def stopwatch(call, calls):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            call()
            return float(calls)

        monkeypatch.setattr(RunSettings, "stopwatch", lambda setting, batch: stopwatch)

    after(-1)
    return after


def test_without_a_name_they_are_listed(repvgg):
    outcome = repvgg("study")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(STUDY_MODULES)]] == list(STUDY_MODULES)


@pytest.mark.parametrize("name", STUDY_MODULES)
def test_help_of_each(repvgg, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = repvgg("study", name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert find_study(name).title in outcome.out
    assert {"--out", "--overwrite", "--device", "--threads", "--batch"} <= set(outcome.out.split())
    assert max(map(len, outcome.out.splitlines()[1:])) <= 80
    shown = outcome.out.replace("│", "").split()
    assert not any(before == "(default:" and after in ("None)", ")") for before, after in pairwise(shown))


def test_tables_are_printed_and_the_page_is_named(repvgg, tmp_path):
    outcome = repvgg("study", "table4", *TINY)
    assert (outcome.code, outcome.err) == (0, "")
    assert "RepVGG-A0" in outcome.out
    assert outcome.out.splitlines()[-1] == "runs/studies/table4/report.html"
    data = json.loads((tmp_path / "runs/studies/table4/table4.json").read_text(encoding="utf-8"))
    assert data["command"] == "repvgg study table4 --input-size 8 --rounds 3 --max-gmacs 1.9 --batch 2"
    assert data["settings"]["threads"] is None
    assert data["environment"]["threads"] == str(torch.get_num_threads())


def test_interrupted_study_continues(repvgg, quick, tmp_path):
    quick(13)
    outcome = repvgg("study", "table4", *TINY, "--out", "here", "--overwrite")
    assert outcome.code == 130
    assert outcome.err.startswith("interrupted; continue with: repvgg study table4 ")
    assert "--overwrite" not in outcome.err
    assert "2 rounds" in outcome.out
    quick(-1)
    assert repvgg(*outcome.err.split("continue with: repvgg ")[1].split()).code == 0
    assert "3 rounds" in (tmp_path / "here" / "table4.md").read_text(encoding="utf-8")


def test_ctrl_c_at_once(repvgg, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(network_speed, "count_cell", interrupt)
    outcome = repvgg("study", "table4", *TINY)
    assert (outcome.code, outcome.out) == (130, "")
    assert outcome.err.startswith("interrupted; continue with: repvgg study table4 ")
    assert not list(tmp_path.iterdir())


def test_a_finished_study_is_replaced_only_on_request(repvgg, refused, tmp_path):
    assert repvgg("study", "table4", *TINY).code == 0
    assert "finished study" in refused("study", "table4", *TINY)
    assert "batch 2, not 3" in refused("study", "table4", *TINY[:-1], 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("precious")
    assert "holds no study" in refused("study", "table4", "--out", "notes", "--overwrite")
    before = contents(tmp_path / "runs")
    assert repvgg("study", "table4", *TINY, "--overwrite").code == 0
    assert contents(tmp_path / "runs").keys() == before.keys()


def test_what_is_refused(refused):
    assert "did you mean table4" in refused("study", "tabel4")
    assert "max_gmacs must be above 0" in refused("study", "table4", "--max-gmacs", -1)
    assert "batch must be at least 1" in refused("study", "figure3", "--batch", 0)
    assert "use --device cuda" in refused("study", "table1", "--dtype", "tf32")


def test_commands_as_data_need_permission(repvgg, tmp_path):
    effect = tmp_path / "effect"
    chosen = ("--data", f"webdataset:pipe:touch {effect}?classes=3", "--model", "repvgg_t0", "--part", "trainings")
    refused = repvgg("study", "table6", *chosen)
    assert refused.code == 2
    assert "runs the shell command 'touch" in refused.err
    assert "--allow-commands" in refused.err
    assert not effect.exists()
    allowed = repvgg("study", "table6", *chosen, "--allow-commands")  # continues; what is missing is a validation set
    assert allowed.code == 2
    assert "shell command" not in allowed.err
    assert "--val" in allowed.err


def test_flags_that_it_does_not_have(repvgg):
    outcome = repvgg("study", "table1", "--max-gmacs", 3)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--max-gmacs" in outcome.err


def test_trainings_are_shared_out(repvgg, refused, tmp_path):
    """Half of the trainings by one call, the others and the cost by the next; and a share that there is not."""
    small = ("--model", "repvgg_t0", "--data", "fake:32x4", "--input-size", 8, "--epochs", 1, "--batch", 16)
    chosen = (*small, "--seeds", 1, "--rounds", 1, "--threads", 1, "--device", "cpu", "--rows", "conv_bn", "repvgg")
    assert "no share 3/2" in refused("study", "table6", *chosen, "--cells", "3/2")
    assert "did you mean conv_bn" in refused("study", "table6", *chosen[:-2], "conv_b")
    assert not list(tmp_path.iterdir())
    half = repvgg("study", "table6", *chosen, "--cells", "1/2")
    assert half.code == 0
    assert "conv_bn-seed0: " in half.err
    assert "warning: 1 of 2 trainings are missing." in half.err
    rest = repvgg("study", "table6", *chosen)
    assert rest.code == 0
    assert "warning" not in rest.err
    data = json.loads((tmp_path / "runs/studies/table6/table6.json").read_text(encoding="utf-8"))
    assert [row["seeds"] for row in data["tables"]["table6"]["rows"]] == [1, 1]
    assert data["finished"]
