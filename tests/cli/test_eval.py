import json

import pytest
import timm
import torch
from PIL import Image

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
        assert numbers["data"] == "the validation images of digits:"


def test_table(files, repvgg, truth):
    outcome = repvgg("eval", files.train, "--data", DATA)
    assert (outcome.code, outcome.err) == (0, "")
    what, _, head, train, plain, _, classes, *rows, _, agree = outcome.out.splitlines()
    assert what == "360 images: the validation images of digits:"
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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The first digits as files in folders of the classes: three quarters to train, a quarter to test."""
    root = tmp_path_factory.mktemp("photos")
    data = open_data(DataConfig(uri=DATA, train_size=16, channels=1))
    images, labels = data.val_images(range(120))
    for at, (image, label) in enumerate(zip(data.to_pixels(images), labels.tolist(), strict=True)):
        folder = root / ("test" if at % 4 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image[0]).round().to(torch.uint8).numpy()).save(folder / f"{at:03}.png")
    return root


@pytest.mark.parametrize(
    ("folder", "split", "number", "which"),
    [
        ("test", None, 30, "all images"),
        ("test", "all", 30, "all images"),
        ("train", "val", 11, "the validation images"),
        ("train", "train", 79, "the training images"),
        ("", None, 30, "the validation images"),
        ("", "val", 30, "the validation images"),
        ("", "train", 90, "the training images"),
        ("", "all", 120, "all training and validation images"),
    ],
)
def test_what_is_evaluated(repvgg, files, photos, folder, split, number, which):
    uri = f"imagefolder:{photos / folder}"
    options = ["--data", uri, *(["--split", split] if split else []), "--form", "plain"]
    first = repvgg("eval", files.train, *options).out.splitlines()[0]
    assert first == f"{number} images: {which} of {uri}"
    numbers = json.loads(repvgg("eval", files.train, *options, "--json").out)["plain form"]
    assert (numbers["images"], numbers["data"]) == (number, f"{which} of {uri}")


def test_a_whole_folder_gives_the_numbers_of_its_images(repvgg, files, photos):
    data = open_data(DataConfig(uri=f"imagefolder:{photos}", train_size=16, channels=1))
    images, labels = data.val_images(range(30))
    with torch.no_grad():
        right = int((files.model(images).argmax(1) == labels).sum())
    options = ["--data", f"imagefolder:{photos / 'test'}", "--json"]
    assert json.loads(repvgg("eval", files.train, *options).out)["train form"]["correct"] == right


def test_an_empty_folder(refused, files, tmp_path):
    said = refused("eval", files.train, "--data", f"imagefolder:{tmp_path}", "--split", "all")
    assert "contains no class folders" in said
