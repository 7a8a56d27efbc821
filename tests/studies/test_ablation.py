"""Ablations with trainings of a second: shared between processes, interrupted, continued, never mixed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from repvgg import training
from repvgg.errors import DataError, OutputExistsError, TrainingError, UnknownModelError, UsageError
from repvgg.models import ModelSpec, Stage
from repvgg.studies import ablation, base, find_study, variants
from repvgg.studies.ablation import AblationSettings
from repvgg.studies.ablation_results import Results, Spread
from repvgg.studies.base import run_study
from repvgg.studies.report.charts import draw_accuracies
from repvgg.studies.variants import TABLE_6_VARIANTS
from repvgg.training import precision
from tests.studies.helpers import read_rows

TINY = ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(2, 8),))
QUICK = AblationSettings(
    data="fake:48x4", input_size=8, epochs=2, batch=16, seeds=2, rounds=2, threads=1, device="cpu", part="trainings"
)
RUN = """
import sys
from pathlib import Path
from rich.console import Console
from repvgg.models import ModelSpec, Stage
from repvgg.studies import ablation, find_study
from repvgg.studies.ablation import AblationSettings
from repvgg.studies.base import run_study
ablation.base_architecture = lambda name: ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(2, 8),))
"""


class Lines(Console):
    """A console that records what is printed."""

    def __init__(self):
        super().__init__(quiet=True)
        self.printed = []

    def print(self, *parts, **how):
        self.printed += parts


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(ablation, "base_architecture", lambda name: TINY)
    monkeypatch.setattr(base, "write_chart", lambda folder, chart: "<svg/>")


def run(folder, name="table6", console=None, **changes):
    return run_study(find_study(name), replace(QUICK, **changes), folder, command="again", console=console or Lines())


def rows_by_title(path):
    return {row["row"]: row for row in read_rows(path)}


def cell_of(folder, key):
    return json.loads((folder / "cells" / f"{key}.json").read_text(encoding="utf-8"))


def timeless(folder, key):
    """The part of a cell that does not depend on interruptions."""
    cell = cell_of(folder, key)
    return {name: cell[name] for name in ("row", "seed", "trained", "deployed", "loss", "epochs", "parameters")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Table 6, trained and its cost measured in one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "base_architecture", lambda name: TINY)
        folder = tmp_path_factory.mktemp("studies") / "whole"
        done = run(folder, part="all")
    return folder, done


def test_table6_has_the_paper_columns_next_to_ours(whole):
    folder, done = whole
    assert done.complete
    rows = rows_by_title(folder / "table6.csv")
    assert [row["paper_top1_percent"] for row in rows.values()] == ["72.39", "74.79", "73.15", "75.14"]
    for name, row in zip(
        ("conv_bn", "repvgg_no_pointwise", "repvgg_no_identity", "repvgg"), rows.values(), strict=True
    ):
        here = [cell_of(folder, f"{name}-seed{seed}")["trained"]["top1_percent"] for seed in (0, 1)]
        assert float(row["top1_percent"]) == pytest.approx(sum(here) / 2)
        assert float(row["top1_deviation"]) == pytest.approx(abs(here[0] - here[1]) / 2**0.5)
        assert row["seeds"] == "2"
    assert float(rows["RepVGG"]["difference"]) == 0
    assert (folder / "table6.svg").is_file()
    assert "in the paper −1.99" in done.outcome.lead


def test_collapsed_networks_give_the_same_answers(whole):
    folder, _ = whole
    for row in rows_by_title(folder / "table6.csv").values():
        assert row["deployed_top1_percent"] == row["top1_percent"]
        same, of, images = row["same_answers"].split()
        assert (same, of) == (images, "of")
        assert row["is_plain"] == "True"
    for seed in (0, 1):
        deployed = cell_of(folder, f"repvgg-seed{seed}")["deployed"]
        assert deployed["relative_error"] <= deployed["tolerance"]
        assert deployed["parameters"] < cell_of(folder, f"repvgg-seed{seed}")["parameters"]


def test_cost_of_a_training_step_is_in_a_table(whole):
    folder, _ = whole
    rows = rows_by_title(folder / "table6-cost.csv")
    assert all(float(row["images_per_second"]) > 0 and float(row["step_megabytes"]) > 0 for row in rows.values())
    assert float(rows["RepVGG"]["step_megabytes"]) > float(rows["conv-BN"]["step_megabytes"])
    assert float(rows["RepVGG"]["speed_up"]) == 1


def test_equal_trainings_are_copied_from_another_study(whole, tmp_path):
    folder, _ = whole
    lines = Lines()
    run(tmp_path / "t", "table7", console=lines, rows=("repvgg",), reuse=folder)
    assert lines.printed == [f"copied 2 trainings from {folder}"]
    assert cell_of(tmp_path / "t", "repvgg-seed1") == cell_of(folder, "repvgg-seed1")
    with pytest.raises(UsageError, match="has epochs 2, not 3"):
        run(tmp_path / "u", "table7", rows=("repvgg",), reuse=folder, epochs=3)
    with pytest.raises(DataError):
        run(tmp_path / "v", "table7", rows=("repvgg",), reuse=tmp_path)


def test_variant_that_does_not_collapse_has_a_reason(tmp_path):
    done = run(tmp_path / "t", "table7", rows=("repvgg_relu", "repvgg"), seeds=1)
    rows = rows_by_title(tmp_path / "t" / "table7.csv")
    assert rows["+ReLU in branch"]["is_plain"] == "False"
    assert rows["+ReLU in branch"]["same_answers"] == rows["Full-featured reparam"]["same_answers"]
    (note,) = (note for note in done.outcome.tables[0].notes if "+ReLU" in note)
    assert "relu is not a linear" in note


def test_layers_with_another_block_are_noted(tmp_path):
    done = run(tmp_path / "t", "blocks", rows=("repmixer", "orepa", "expand_cl"), seeds=1)
    notes = [note for note in done.outcome.tables[0].notes if "RepMixer" in note]
    assert [note.split(":")[:2] for note in notes] == [
        ["RepMixer", " 2 of 3 layers are 'conv_bn' in place of 'repmixer'"]
    ]
    for row in rows_by_title(tmp_path / "t" / "blocks.csv").values():
        assert row["same_answers"].split()[0] == row["same_answers"].split()[2]
        assert row["is_plain"] == "True"
        assert row["paper_top1_percent"] == ""


def test_finished_cells_are_not_trained_again(tmp_path, monkeypatch):
    trained = []
    real = variants.train_cell

    def count(training, folder):
        trained.append((training.variant.name, training.config.seed))
        return real(training, folder)

    monkeypatch.setattr(ablation, "train_cell", count)
    first = run(tmp_path / "t", cells="1/2", rows=("conv_bn", "repvgg"))
    assert trained == [("conv_bn", 0), ("conv_bn", 1)]
    assert not first.complete
    assert first.missing == "2 of 4 trainings are missing."
    assert run(tmp_path / "t", rows=("conv_bn", "repvgg"), part="tables").missing == first.missing
    second = run(tmp_path / "t", rows=("conv_bn", "repvgg"))
    assert trained[2:] == [("repvgg", 0), ("repvgg", 1)]
    assert "the same command with --part cost" in second.missing
    third = run(tmp_path / "t", rows=("conv_bn", "repvgg"), part="cost")
    assert third.complete
    assert len(trained) == 4
    with pytest.raises(OutputExistsError, match="finished study"):
        run(tmp_path / "t", rows=("conv_bn", "repvgg"))


def test_tables_of_a_missing_study_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"There is no study in .* yet"):
        run(tmp_path / "t", part="tables")
    assert not (tmp_path / "t").exists()


def test_interrupted_training_continues_bit_for_bit(tmp_path, monkeypatch):
    """Ctrl-C after the first epoch, then the same command again; compared with an uninterrupted training."""
    one = {"rows": ("repvgg",), "seeds": 1}
    real = training.write_log

    def interrupt(folder, history):
        real(folder, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_log", interrupt)
    interrupted = run(tmp_path / "t", **one)
    assert (interrupted.complete, interrupted.missing) == (False, "")
    assert interrupted.outcome.lead == "The full block is not trained yet."
    assert (tmp_path / "t" / "runs" / "repvgg-seed0" / "last.ckpt").is_file()
    assert not list((tmp_path / "t" / "runs").glob("*.lock"))
    seen = []
    monkeypatch.setattr(training, "write_log", lambda folder, history: seen.append(len(history)))
    run(tmp_path / "t", **one)
    assert seen == [2], "the first epoch comes from the checkpoint"
    assert not (tmp_path / "t" / "runs" / "repvgg-seed0" / "last.ckpt").exists()
    run(tmp_path / "u", **one)
    assert timeless(tmp_path / "t", "repvgg-seed0") == timeless(tmp_path / "u", "repvgg-seed0")


def test_cell_locked_by_another_process_is_skipped(tmp_path):
    runs = tmp_path / "t" / "runs"
    with pytest.raises(UsageError):
        run(tmp_path / "t", rows=("repvgg",), cells="2/1")
    run(tmp_path / "t", rows=("conv_bn", "repvgg"), seeds=1, cells="1/2")
    (runs / "repvgg-seed0.lock").write_text("7\nanother-machine\n")
    lines = Lines()
    done = run(tmp_path / "t", rows=("conv_bn", "repvgg"), seeds=1, console=lines)
    assert lines.printed == ["repvgg-seed0: left to process 7 on another-machine"]
    assert done.missing == "1 of 2 trainings are missing; at work: repvgg-seed0 by process 7 on another-machine."
    assert not done.complete


def test_cell_of_a_dead_process_is_taken_over(tmp_path):
    run(tmp_path / "t", rows=("conv_bn", "repvgg"), seeds=1, cells="1/2")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock = tmp_path / "t" / "runs" / "repvgg-seed0.lock"
    lock.write_text(f"{ended.pid}\n{os.uname().nodename}\n")
    os.utime(lock, (0, 0))
    lines = Lines()
    run(tmp_path / "t", rows=("conv_bn", "repvgg"), seeds=1, console=lines)
    assert f"repvgg-seed0: taken over from process {ended.pid}" in lines.printed[0]
    assert lines.printed[1].startswith("repvgg-seed0: ")
    assert not lock.exists()


@pytest.mark.slow
def test_two_processes_share_a_folder_and_one_is_killed(tmp_path):
    folder = tmp_path / "t"
    call = f"run_study(find_study('table6'), {replace(QUICK, epochs=4)!r}, Path({str(folder)!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", RUN + call], stderr=subprocess.PIPE) for _ in range(2)]
    while not (folder / "runs").is_dir() or not list((folder / "runs").glob("*/last.ckpt")):
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert processes[1].returncode == 0
    run(folder, epochs=4)
    run(tmp_path / "u", epochs=4, jobs=2)
    for key in (f"{row.name}-seed{seed}" for row in TABLE_6_VARIANTS for seed in (0, 1)):
        assert timeless(folder, key) == timeless(tmp_path / "u", key)


def test_other_settings_are_refused_and_other_machines_accepted(tmp_path, monkeypatch):
    one = {"rows": ("repvgg",), "seeds": 2}
    run(tmp_path / "t", cells="1/2", **one)
    with pytest.raises(UsageError, match="epochs 2, not 3"):
        run(tmp_path / "t", epochs=3, **one)
    header = json.loads((tmp_path / "t" / "study.json").read_text())
    header["environment"]["cpu"] = "another processor"
    (tmp_path / "t" / "study.json").write_text(json.dumps(header))
    run(tmp_path / "t", cells="2/2", **one)
    assert cell_of(tmp_path / "t", "repvgg-seed1")["environment"]["cpu"] != "another processor"
    cost = tmp_path / "t" / "cells" / "cost.json"
    cost.write_text(json.dumps({"cpu": "another processor"}))
    with pytest.raises(UsageError, match="measured on another machine, another processor"):
        run(tmp_path / "t", part="cost", **one)


def test_cost_is_measured_by_one_process_at_a_time(tmp_path):
    one = {"rows": ("repvgg",), "seeds": 1}
    run(tmp_path / "t", **one)
    lock = tmp_path / "t" / "runs" / "cost.lock"
    lock.write_text("7\nanother-machine\n")
    lines = Lines()
    done = run(tmp_path / "t", part="all", console=lines, **one)
    assert lines.printed == ["cost of a step: left to process 7 on another-machine"]
    assert "The cost of a training step is not measured" in done.missing
    lock.unlink()
    assert run(tmp_path / "t", part="all", **one).complete
    assert not lock.exists()


def test_diverged_loss_is_a_result(tmp_path, monkeypatch):
    def fail(training, folder):
        raise TrainingError("The loss of epoch 1 is nan: take a lower learning rate, or clip gradients.")

    monkeypatch.setattr(ablation, "train_cell", fail)
    done = run(tmp_path / "t", rows=("repvgg",), seeds=1)
    assert "RepVGG, seed 0: The loss of epoch 1 is nan" in " ".join(done.outcome.tables[0].notes)
    assert done.outcome.lead == "The full block is not trained yet."
    assert rows_by_title(tmp_path / "t" / "table6.csv")["RepVGG"]["seeds"] == "0"


@pytest.mark.parametrize("name", ["epochs", "batch", "input_size", "seeds", "threads", "rounds", "jobs"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(UsageError, match=name):
        AblationSettings(**{name: 0})


def test_names_are_checked_before_training(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UsageError, match="no row 'repvg'"):
        find_study("table7").resolve(AblationSettings(rows=("repvg",)))
    with pytest.raises(UnknownModelError):
        find_study("table7").resolve(AblationSettings(model="vgg"))
    with pytest.raises(UsageError, match="no recipe"):
        find_study("table7").resolve(AblationSettings(recipe="xyzzy"))


@pytest.mark.parametrize(("flags", "dtype"), [({"avx2", "avx512_bf16"}, "bfloat16"), ({"avx2"}, "float32")])
def test_recipe_provides_the_defaults(monkeypatch, flags, dtype):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    chosen = find_study("blocks").resolve(AblationSettings(device="cpu", epochs=3, lr=0.5))
    assert (chosen.batch, chosen.input_size, chosen.data) == (128, 32, "torchvision:CIFAR10:cifar10")
    config = chosen.config
    assert (config.optim.lr, config.optim.lr_batch) == (0.5, None)
    assert config.optim.warmup_epochs == pytest.approx(0.6), "a fifth of the epochs"
    assert (chosen.run.dtype, chosen.run.channels_last) == (dtype, True)


def test_chart_of_incomplete_results():
    rows = [("one", [50.0, 52.0], 70.0), ("two", [], 71.0), ("three", [51.0], None)]
    figure = Figure()
    draw_accuracies(figure, rows)
    here, paper = figure.axes
    assert [label.get_text() for label in here.get_yticklabels()] == ["one", "two", "three"]
    assert {text.get_text() for text in here.texts} == {"51.00"}, "the means"
    assert [text.get_text() for text in paper.texts] == ["70.00", "71.00"]
    dots = {float(x) for line in here.lines if line.get_marker() == "o" for x in line.get_xdata()}
    assert dots == {50.0, 51.0, 52.0}
    alone = Figure()
    draw_accuracies(alone, [("one", [], None)])
    assert len(alone.axes) == 1, "no panel for a paper that prints nothing"


def test_spread_by_hand():
    ours, full = Spread({0: 70.0, 1: 72.0, 2: 74.0}), Spread({0: 71.0, 1: 74.0})
    assert (ours.mean, ours.deviation) == (72.0, 2.0)
    assert ours.minus(full).values == {0: -1.0, 1: -2.0}
    assert str(ours) == "72.00 ± 2.00"
    assert str(Spread({0: 1.0})) == "1.00"
    assert (Spread({}).mean, Spread({}).deviation, str(Spread({}))) == (None, None, "nothing")


def test_variants_with_a_common_prefix_are_told_apart():
    cell = {"seed": 0, "trained": {"top1_percent": 50.0}}
    results = Results(TABLE_6_VARIANTS, {"repvgg-seed0": cell, "repvgg_no_identity-seed0": cell}, 1)
    assert [len(results.trained(row.name)) for row in TABLE_6_VARIANTS] == [0, 0, 1, 1]


def test_cells_of_an_older_version_are_read():
    """Literal cells of version 0.9: a training, a diverged one, a round of steps and their memory."""
    cells = {
        "plan": {"groups": [["conv_bn", "repvgg"]]},
        "round-00-0000": {"seconds": {"conv_bn": 0.5, "repvgg": 1.0}},
        "memory": {"conv_bn": 1_000_000, "repvgg": 2_000_000},
        "cost": {"cpu": "a processor"},
        "conv_bn-seed0": {"row": "conv_bn", "seed": 0, "failed": "The loss of epoch 1 is nan."},
        "repvgg-seed0": {
            "row": "repvgg",
            "seed": 0,
            "trained": {"correct": 40, "images": 50, "top1_percent": 80.0},
            "deployed": {
                "correct": 40,
                "images": 50,
                "top1_percent": 80.0,
                "same_answers": 50,
                "relative_error": 2.94e-07,
                "tolerance": 1.2e-05,
                "parameters": 900,
                "is_plain": True,
                "left": "",
            },
            "loss": 1.25,
            "epochs": 2,
            "seconds": 3.5,
            "images_per_second": 100.0,
            "peak_bytes": None,
            "parameters": 1000,
            "version": "0.9.0",
            "environment": {"cpu": "a processor"},
            "remarks": [],
        },
    }
    study = find_study("table6")
    settings = study.resolve(replace(QUICK, batch=4))
    tables = {table.name: table.to_dicts() for table in study.outcome(settings, cells).tables}
    assert "table6-epochs" not in tables, "older cells have no accuracies by epoch"
    accuracy, cost, trainings = (tables[name] for name in ("table6", "table6-cost", "table6-cells"))
    rows = {row["row"]: row for row in accuracy}
    assert (rows["RepVGG"]["top1_percent"], rows["RepVGG"]["same_answers"]) == (80.0, "50 of 50")
    assert rows["conv-BN"]["seeds"] == 0
    costs = {row["row"]: row for row in cost}
    assert (costs["RepVGG"]["images_per_second"], costs["conv-BN"]["speed_up"]) == (4.0, 2.0)
    assert (costs["RepVGG"]["step_megabytes"], costs["RepVGG"]["deployed_parameters"]) == (2.0, 900)
    assert [(row["seed"], row["relative_error"]) for row in trainings] == [(0, 2.9e-07)]
