import json

import pytest
import timm
import torch

from repvgg import load
from repvgg.data import DataConfig, open_data
from repvgg.models import describe_model, save
from tests.bn_statistics import trained_like

DATA = "digits:"


@pytest.fixture(scope="module")
def truth(files):
    """Predictions of the train form on the validation digits at 16x16, and the labels."""
    data = open_data(DataConfig(uri=DATA, train_size=16, channels=1))
    images, labels = data.val_images(range(360))
    with torch.no_grad():
        return files.model(images), labels


def test_both_forms_as_json(files, repvgg, truth):
    outcome = repvgg("eval", files.train, "--data", DATA, "--json", "--batch", "50")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert list(report) == ["train form", "plain form"]
    logits, labels = truth
    right = logits.argmax(1) == labels
    for numbers in report.values():
        assert numbers["correct"] == int(right.sum())
        assert numbers["images"] == 360
        assert numbers["top1"] == pytest.approx(float(right.double().mean()))
        assert numbers["top5"] == pytest.approx(
            float((logits.topk(5).indices == labels[:, None]).any(1).double().mean())
        )
        assert list(numbers["per_class"]) == list("0123456789")
        for label, name in enumerate("0123456789"):
            assert numbers["per_class"][name] == pytest.approx(float(right[labels == label].double().mean()))
        assert sum(map(sum, numbers["confusion"])) == 360


def test_table(files, repvgg, truth):
    outcome = repvgg("eval", files.train, "--data", DATA)
    assert (outcome.code, outcome.err) == (0, "")
    head, train, plain, _, classes, *rows, _, agree = outcome.out.splitlines()
    logits, labels = truth
    correct = int((logits.argmax(1) == labels).sum())
    assert head.split() == ["form", "top-1", "top-5", "class", "mean", "correct", "images"]
    for line, form in ((train, "train"), (plain, "plain")):
        assert line.split()[:3] == [form, "form", f"{100 * correct / 360:.2f}"]
        assert line.split()[-2:] == [str(correct), "360"]
    assert classes.split() == ["class", "images", "train", "form", "plain", "form"]
    assert [row.split()[0] for row in rows] == list("0123456789")
    assert [int(row.split()[1]) for row in rows] == labels.bincount().tolist()
    assert agree == "360 of 360 predictions agree"


@pytest.mark.parametrize(
    ("file", "form", "expected"),
    [
        ("train", "train", ["train form"]),
        ("train", "plain", ["plain form"]),
        ("plain", "both", ["plain form"]),
        ("plain", "plain", ["plain form"]),
    ],
)
def test_forms(files, repvgg, truth, file, form, expected):
    outcome = repvgg("eval", getattr(files, file), "--data", DATA, "--form", form, "--json")
    report = json.loads(outcome.out)
    assert list(report) == expected
    assert report[expected[0]]["correct"] == int((truth[0].argmax(1) == truth[1]).sum())
    assert "agree" not in repvgg("eval", getattr(files, file), "--data", DATA, "--form", form).out


def test_a_plain_file_has_no_train_form(files, refused):
    assert "cannot be evaluated in the train form" in refused("eval", files.plain, "--data", DATA, "--form", "train")


def test_classes_that_do_not_match(files, refused, tmp_path):
    assert "has 10 classes, but fake:40x4 has 4" in refused("eval", files.train, "--data", "fake:40x4")
    model = load(files.train).model
    names = ("zero", *"123456789")
    save(tmp_path / "words.safetensors", model, describe_model(model, "train", input_size=16, classes=names))
    said = refused("eval", tmp_path / "words.safetensors", "--data", DATA)
    assert "number 0 is 'zero' in the model and '0' in the data" in said


def test_files_and_data_that_are_not_there(refused, files, tmp_path):
    assert "nowhere" in refused("eval", tmp_path / "nowhere.safetensors", "--data", DATA)
    assert "'digit' is not a dataset" in refused("eval", files.train, "--data", "digit")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert "bad.safetensors" in refused("eval", tmp_path / "bad.safetensors", "--data", DATA)


def test_a_foreign_checkpoint(files, repvgg, truth, tmp_path):
    """Weights alone, as ``torch.save`` leaves them: the size is not in them, and has to be said."""
    torch.save(load(files.train).model.state_dict(), tmp_path / "foreign.pth")
    outcome = repvgg("eval", tmp_path / "foreign.pth", "--data", DATA, "--input-size", "16", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert [numbers["correct"] for numbers in report.values()] == 2 * [int((truth[0].argmax(1) == truth[1]).sum())]


def test_a_checkpoint_of_timm(repvgg, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = trained_like(timm.create_model("repvgg_a0", num_classes=4))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    data = open_data(DataConfig(uri="fake:40x4", train_size=32))
    images, labels = data.val_images(range(8))
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    outcome = repvgg("eval", tmp_path / "timm.pth", "--data", "fake:40x4", "--input-size", "32", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert {numbers["correct"] for numbers in json.loads(outcome.out).values()} == {right}
