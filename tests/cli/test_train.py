import contextlib
import csv
import io
import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from repvgg import is_plain, load
from repvgg.cli import main
from repvgg.errors import EquivalenceError
from repvgg.training import read_config, recipe_of
from tests.cli.helpers import contents

SMALL = (
    *("repvgg_t0", "--recipe", "quickstart", "--data", "fake:60x3", "--data.train-size", "8", "--epochs", "2"),
    *("--batch-size", "12", "--optim.warmup-epochs", "1", "--no-channels-last", "--seed", "5"),
)
FILES = {"config.yaml", "last.ckpt", "train.safetensors", "plain.safetensors", "best.safetensors", "report.json"}
FILES |= {"log.csv", "curve.png", "report.html", "tensorboard"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs: its folder and its output."""
    folder, said = tmp_path_factory.mktemp("train") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["train", *SMALL, "--optim.lr", "0.05", "--out", str(folder)]) == 0
    return folder, said.getvalue()


def test_leaves_whole_files(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES
    train, plain, best = (load(folder / f"{name}.safetensors") for name in ("train", "plain", "best"))
    assert [one.metadata.form for one in (train, plain, best)] == ["train", "plain", "train"]
    assert is_plain(plain.model)
    assert train.metadata.classes == ("0", "1", "2")
    assert train.metadata.input_size == 8
    assert train.metadata.recipe["optim"]["lr"] == 0.05
    report = json.loads((folder / "report.json").read_text())
    assert report["train_form"]["top1"] == train.metadata.metrics["held_out_accuracy"]
    assert report["plain_form"]["correct"] == report["train_form"]["correct"]
    assert sum(map(sum, report["plain_form"]["confusion"])) == 12
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    top = max(float(row["held_out_accuracy"]) for row in rows)
    assert best.metadata.metrics["held_out_accuracy"] == pytest.approx(top)
    first = next(row for row in rows if float(row["held_out_accuracy"]) == top)
    assert best.metadata.metrics["epoch"] == float(first["epoch"])


def test_says_what_decides_the_outcome(finished):
    folder, said = finished
    lines = [line.strip() for line in said.splitlines()]
    assert lines[:4] == [
        "Train repvgg_t0 on fake:60x3: 60 training images of 3x8x8 in 3 classes, 12 validation images",
        "global batch 12 (one device), learning rate 0.009375, scaled by 0.1875 with the batch, 2 epochs, "
        "decay policy 'paper'",
        "decay: 200,544 parameters in 15 tensors, weight decay 0.0005",
        "no decay: 1,923 parameters in 35 tensors",
    ]
    assert lines[4].startswith("dry run: loss ")
    assert "epoch 2/2" in said
    assert lines[-5].startswith("plain form: relative error ")
    assert lines[-4].startswith("train form  top-1 ")
    assert lines[-3].startswith("plain form  top-1 ")
    assert lines[-2] == f"wrote {folder}"
    assert lines[-1] == f"report: {folder / 'report.html'}"


def test_config_is_the_recipe_with_what_was_changed(finished):
    recipe = recipe_of("quickstart")
    expected = replace(
        recipe,
        model="repvgg_t0",
        epochs=2,
        batch_size=12,
        seed=5,
        channels_last=False,
        data=replace(recipe.data, uri="fake:60x3", train_size=8),
        optim=replace(recipe.optim, lr=0.05, warmup_epochs=1.0),
    )
    assert read_config(finished[0] / "config.yaml") == expected


def test_config_repeats_the_run(finished, repvgg, tmp_path):
    outcome = repvgg("train", "--config", finished[0] / "config.yaml", "--out", tmp_path / "again")
    assert (outcome.code, outcome.err) == (0, "")
    for name in ("train", "plain", "best"):
        assert digest(tmp_path / "again", name) == digest(finished[0], name)


def digest(folder, name):
    return {key: value.numpy().tobytes() for key, value in load_file(folder / f"{name}.safetensors").items()}


@pytest.fixture
def planned(monkeypatch):
    """What a command line would run, where, and how."""
    plans = []
    monkeypatch.setattr("repvgg.training.run", lambda config, folder, **how: plans.append((config, folder, how)))

    def plan(repvgg, *arguments):
        outcome = repvgg("train", *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return plans[-1]

    return plan


def test_every_kind_of_flag(repvgg, planned):
    config, folder, how = planned(
        repvgg,
        *("repvgg_a0", "--recipe=cifar", "--data=fake:50", "--optim.lr-batch", "None", "--no-channels-last"),
        *("--data.augment.flip", "0.25", "--data.mean", "0.5", "0.5", "0.5", "--optim.decay", "no-1d", "--compile"),
        *("--data.augment.crop-scale", "0.2", "0.9", "--init", "my.safetensors", "--precision", "bf16"),
    )
    assert config.model == "repvgg_a0"
    assert config.data.uri == "fake:50"
    assert config.optim.lr_batch is None
    assert (config.channels_last, config.compile) == (False, True)
    assert config.data.augment.flip == 0.25
    assert config.data.augment.crop_scale == (0.2, 0.9)
    assert config.data.mean == (0.5, 0.5, 0.5)
    assert config.optim.decay == "no-1d"
    assert (config.init, config.precision) == ("my.safetensors", "bf16")
    assert config.epochs == recipe_of("cifar").epochs
    assert str(folder) == "runs/repvgg_a0-cifar"
    assert how == {"resume": False, "overwrite": False}


def test_where_a_run_goes(repvgg, planned, finished):
    file = finished[0] / "config.yaml"
    assert str(planned(repvgg, "--config", file)[1]) == "runs/repvgg_t0-quickstart"
    assert planned(repvgg, "--config", file, "--resume")[1:] == (finished[0], {"resume": True, "overwrite": False})
    assert str(planned(repvgg, "--config", file, "--resume", "--out", "here")[1]) == "here"
    changed, _, how = planned(repvgg, "--config", file, "--epochs", "7", "--overwrite")
    assert (changed.epochs, how) == (7, {"resume": False, "overwrite": True})
    assert str(planned(repvgg, "--recipe", "finetune", "--init", "a/net.safetensors")[1]) == "runs/net-finetune"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Choose a recipe: --recipe paper-simple, or another one of"),
        (("repvgg_a0",), "Choose a recipe"),
        (("repvgg_a0", "--recipe", "nope"), "There is no recipe 'nope': choose one of paper-simple"),
        (("repvgg_a0", "--recipe"), "Choose a recipe"),
        (("nope", "--recipe", "quickstart"), "There is no model 'nope'"),
        (("--recipe", "quickstart", "--data", "nope:"), "'nope:' is not a dataset"),
        (("--recipe", "quickstart", "--data", "imagefolder:nowhere"), "nowhere"),
        (("--recipe", "quickstart", "--config", "a.yaml"), "give either --config or --recipe"),
        (("--config", "nowhere.yaml"), "The config 'nowhere.yaml' cannot be read"),
        (("--recipe", "quickstart", "--optim.lr", "-1"), "SGD needs lr > 0"),
        (("--recipe", "quickstart", "--devices", "2"), "torchrun --nproc-per-node"),
        (("--recipe", "quickstart", "--resume", "--overwrite"), "either resumed or started again"),
        (("--recipe", "quickstart", "--batch-size", "5000"), "1437 training images do not fill one batch of 5000"),
    ],
)
def test_refused_in_one_sentence(refused, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused("train", *arguments)


@pytest.mark.parametrize("arguments", [("--optim.lr", "x"), ("surplus",), ("--precision", "int8"), ("--epochs", "2.5")])
def test_what_cannot_be_parsed(repvgg, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    outcome = repvgg("train", "repvgg_t0", "--recipe", "quickstart", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    assert arguments[-1] in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(finished, repvgg):
    folder, _ = finished
    before = contents(folder)
    outcome = repvgg("train", *SMALL, "--out", folder)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {str(folder)!r} exists: add --resume or --overwrite, or choose another folder.\n"
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epochs", "3"), "epochs 2, not 3"),
        (("--optim.lr", "0.1"), "optim.lr 0.05, not 0.1"),
        (("--data.augment.flip", "0.5"), "data.augment.flip 0.0, not 0.5"),
        (("--data", "fake:61x3"), "data.uri 'fake:60x3', not 'fake:61x3'"),
    ],
)
def test_another_run_does_not_go_on_there(finished, repvgg, arguments, said):
    folder, _ = finished
    before = contents(folder)
    outcome = repvgg("train", "--config", folder / "config.yaml", *arguments, "--resume")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: The run in {str(folder)!r} has {said}: choose another folder.\n"
    assert contents(folder) == before


def test_overwrite_starts_again_and_leaves_other_files(repvgg, tmp_path):
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    for name in ("notes.txt", "best.safetensors", "last.ckpt", "tensorboard/events.old"):
        (folder / name).write_text("precious")
    (folder / ".repvgg-dead").mkdir()
    (folder / ".repvgg-dead" / "last.ckpt").write_text("half")
    outcome = repvgg("train", *SMALL, "--epochs", "1", "--optim.warmup-epochs", "0", "--out", folder, "--overwrite")
    assert (outcome.code, outcome.err) == (0, "")
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    assert (folder / "notes.txt").read_text() == "precious"
    assert not (folder / "tensorboard" / "events.old").exists()
    assert load(folder / "best.safetensors").metadata.metrics["epoch"] == 1.0


def test_a_folder_that_cannot_be_made(repvgg, tmp_path):
    (tmp_path / "file").write_text("precious")
    outcome = repvgg("train", *SMALL, "--out", tmp_path / "file" / "run")
    assert outcome.code == 2
    assert outcome.err.endswith("run' cannot be created: Not a directory.\n")


def test_a_collapse_that_fails_is_no_traceback(repvgg, monkeypatch, tmp_path):
    def fail(*_):
        raise EquivalenceError("The model would not collapse.")

    monkeypatch.setattr("repvgg.training.run_folder.perform_dry_run", fail)
    outcome = repvgg("train", *SMALL, "--out", tmp_path / "run")
    assert (outcome.code, outcome.err) == (2, "error: The model would not collapse.\n")
    assert not (tmp_path / "run").exists()
