import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest

from repvgg import is_plain, load
from repvgg.cli import main
from repvgg.data import ImageData
from repvgg.data.sources import open_source
from repvgg.data.splits import TensorSplit
from repvgg.errors import OutputError
from repvgg.measure import SpeedProtocol, compare
from repvgg.studies import quickstart as study
from repvgg.studies.report import schema as page
from repvgg.training import quickstart as recipe
from tests.cli.helpers import contents

FILES = {"train.safetensors", "plain.safetensors", "plain.onnx", "report.json", "report.html"}
STAGES = [
    "open_image_data",
    "_train",
    "_collapse",
    "_verify",
    "_save",
    "_export",
    "_check",
    "_time",
    "_build_report",
    "_write_report",
]


def few_digits(config, *, seed):
    """Open the first 100 images of each split."""
    source = open_source(config)
    few = [TensorSplit("few", p.pixels[:100], p.labels[:100], p.classes) for p in (source.train, source.val)]
    return ImageData(config, replace(source, train=few[0], val=few[1]), seed)


def one_epoch(seed):
    config = recipe(seed)
    return replace(config, epochs=1, optim=replace(config.optim, warmup_epochs=0.5))


def quick_compare(calls):
    return compare(calls, SpeedProtocol(rounds=3, warmup_seconds=0.0, min_round_seconds=1e-4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run once with few images, one epoch and three timing rounds; return the folder and the result of each stage."""
    home, returned = tmp_path_factory.mktemp("quickstart"), {}

    def recording(name, stage):
        def call(*arguments, **keywords):
            returned[name] = stage(*arguments, **keywords)
            return returned[name]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(study, "open_image_data", few_digits)
        patch.setattr(study, "quickstart", one_epoch)
        patch.setattr(study.measure, "compare", quick_compare)
        for name in ("_train", "_collapse", "_verify", "_export", "_check", "_time"):
            patch.setattr(study, name, recording(name, getattr(study, name)))
        assert main(["quickstart", "--seed", "3"]) == 0
    return home, returned


@pytest.fixture
def replayed(finished, tmp_path, monkeypatch):
    """Work in an empty folder with stages that return their earlier results."""
    home, returned = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "open_image_data", few_digits)
    for name, value in returned.items():
        monkeypatch.setattr(study, name, partial(lambda value, *arguments, **keywords: value, value))

    def export(folder, *arguments):
        shutil.copy(home / study.FOLDER / study.ONNX_FILE, folder)
        return returned["_export"]

    monkeypatch.setattr(study, "_export", export)
    return tmp_path


def test_files_are_complete(finished):
    home, _ = finished
    folder = home / "runs" / "quickstart"
    assert [path.name for path in (home / "runs").iterdir()] == ["quickstart"]
    assert {path.name for path in folder.iterdir()} == FILES
    train, plain = load(folder / "train.safetensors", "repvgg_t0"), load(folder / "plain.safetensors", "repvgg_t0")
    assert (train.metadata.form, plain.metadata.form) == ("train", "plain")
    assert is_plain(plain.model)
    assert not is_plain(train.model)
    assert plain.metadata.classes == tuple("0123456789")
    assert plain.metadata.recipe["seed"] == 3
    onnx.checker.check_model(str(folder / "plain.onnx"), full_check=True)
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_report_describes_the_run(finished):
    home, _ = finished
    report = page.Report.from_dict(json.loads((home / "runs/quickstart/report.json").read_text(encoding="utf-8")))
    assert report.passed
    assert report.seed == 3
    assert len(report.regions) == 7
    with_identity = {region.name: region.branches for region in report.regions}["stages.0.1.conv"]
    assert list(with_identity) == ["3x3 conv + BN", "1x1 conv + BN", "identity + BN"]
    assert all(check.agree == check.total for check in report.evidence)
    assert {timing.role for timing in report.timings} == {"train", "folded", "plain", "runtime"}
    metadata = load(home / "runs/quickstart/train.safetensors").metadata
    assert metadata.metrics == {"held_out_accuracy": report.training.accuracy}


def test_next_commands_work(finished, repvgg, monkeypatch):
    home, _ = finished
    monkeypatch.chdir(home)
    report = page.Report.from_dict(json.loads(Path("runs/quickstart/report.json").read_text(encoding="utf-8")))
    verify, convert, _ = (one.command.split() for one in report.next_commands)
    assert repvgg(*verify[1:]).code == 0
    assert repvgg(*convert[1:]).code == 0
    assert load(convert[-1]).metadata.form == "plain"


def test_prints_progress_and_the_files(replayed, repvgg):
    outcome = repvgg("quickstart", "--out", "here")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Try next:" in outcome.out
    assert "here/report.html" in outcome.out
    assert {path.name for path in (replayed / "here").iterdir()} == FILES


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OutputError("The disk is full."), OSError(28, "No space left")])
def test_a_failed_run_leaves_nothing(replayed, repvgg, monkeypatch, stage, error):
    def stop(*arguments, **keywords):
        raise error

    monkeypatch.setattr(study, stage, stop)
    outcome = repvgg("quickstart")
    assert outcome.code == (130 if error is KeyboardInterrupt else 2)
    messages = {
        KeyboardInterrupt: "interrupted; nothing was written; start again with: repvgg quickstart --seed 0\n",
        OSError: "error: 'runs/quickstart' could not be written: No space left.\n",
    }
    assert outcome.err == messages.get(
        error if error is KeyboardInterrupt else type(error), "error: The disk is full.\n"
    )
    left = {path for path in replayed.rglob("*") if path != replayed / "runs"}
    assert left == set()


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_keeps_the_previous_folder(replayed, repvgg, monkeypatch, stage):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    folder = replayed / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    before = contents(replayed)
    monkeypatch.setattr(study, stage, interrupt)
    assert repvgg("quickstart", "--out", folder, "--overwrite").code == 130
    assert contents(replayed) == before


def test_an_existing_folder_is_not_touched(replayed, repvgg):
    for name in ("quickstart", "quickstart-2", "quickstart-3"):
        before = contents(replayed)
        assert repvgg("quickstart").code == 0
        after = contents(replayed)
        assert before.items() <= after.items()
        assert {path.name for path in (replayed / "runs" / name).iterdir()} == FILES


def test_out_is_replaced_only_on_request(replayed, repvgg, refused):
    (replayed / "here").mkdir()
    (replayed / "here" / "notes.txt").write_text("precious")
    assert "'here' exists" in refused("quickstart", "--out", "here")
    assert repvgg("quickstart", "--out", "here", "--overwrite").code == 0
    assert {path.name for path in (replayed / "here").iterdir()} == FILES
    assert [path.name for path in replayed.iterdir()] == ["here"]


def test_out_that_is_a_file(replayed, refused):
    (replayed / "here").write_text("precious")
    assert "exists" in refused("quickstart", "--out", "here", "--overwrite")
    assert "cannot be created" in refused("quickstart", "--out", "here/below")
