import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from repvgg.data import DataConfig, open_data
from repvgg.errors import MissingDependencyError
from repvgg.models import create_model, describe_model, save
from tests.bn_statistics import trained_like


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Validation digits as files in another size than the model's, and a file that is no image."""
    folder = tmp_path_factory.mktemp("digits")
    data = open_data(DataConfig(uri="digits:", train_size=16, channels=1))
    images, _ = data.val_images(range(5))
    for at, image in enumerate(data.to_pixels(images)):
        pixels = (255 * image[0]).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{at}.png")
    (folder / "notes.txt").write_text("none of an image")
    return folder


@pytest.fixture(scope="module")
def truth(folder, files):
    """Probabilities of PyTorch for what is on the disk, with ImageNet's mean in the place of one channel's."""
    pixels = np.stack([np.asarray(Image.open(folder / f"{at}.png")) for at in range(5)])
    x = torch.from_numpy(pixels)[:, None].float() / 255
    mean, std = (sum(values) / 3 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return files.model.eval()((x - mean) / std).softmax(1)


@pytest.mark.parametrize("engine", ["auto", "torch", "repvgg"])
@pytest.mark.parametrize("form", ["train", "plain"])
def test_the_classes_of_a_folder(repvgg, files, folder, truth, engine, form):
    outcome = repvgg("predict", getattr(files, form), folder, "--engine", engine, "--top", 3, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert report["engine"] == ("torch" if engine == "torch" else "repvgg")
    assert [image["file"] for image in report["images"]] == [str(folder / f"{at}.png") for at in range(5)]
    for image, wanted in zip(report["images"], truth, strict=True):
        values, numbers = wanted.topk(3)
        assert [one["index"] for one in image["top"]] == numbers.tolist()
        assert [one["class"] for one in image["top"]] == [str(number) for number in numbers.tolist()]
        assert [one["probability"] for one in image["top"]] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-5)


def test_in_words(repvgg, files, folder, truth):
    outcome = repvgg("predict", files.plain, folder / "3.png", "--engine", "repvgg", "--top", 2)
    assert (outcome.code, outcome.err) == (0, "")
    name, first, second, setting = outcome.out.splitlines()
    values, numbers = truth[3].topk(2)
    assert name == str(folder / "3.png")
    for line, value, number in zip((first, second), values.tolist(), numbers.tolist(), strict=True):
        assert line.split()[0] == str(number)
        assert float(line.split()[1].rstrip("%")) == pytest.approx(100 * value, abs=0.02)
    assert setting == "repvgg_t0, plain form, 16 x 16, engine repvgg"


def test_more_images_than_a_batch_and_more_classes_than_there_are(repvgg, files, folder):
    several = [folder / f"{at % 5}.png" for at in range(18)]
    report = json.loads(repvgg("predict", files.plain, *several, "--top", 99, "--json").out)
    tops = [image["top"] for image in report["images"]]
    assert len(tops) == 18
    assert all(len(top) == 10 and sum(one["probability"] for one in top) == pytest.approx(1) for top in tops)
    for one, other in zip(tops[2], tops[17], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-4, abs=1e-7)


def test_colours_names_and_normalization_come_from_the_checkpoint(repvgg, tmp_path):
    model = trained_like(create_model("repvgg_t0", num_classes=3)).half()
    about = {"input_size": 24, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    save(tmp_path / "model.safetensors", model, describe_model(model, "train", **about))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        wanted = model.float().eval()((x - mean) / std).softmax(1)[0]
    out = repvgg("predict", tmp_path / "model.safetensors", tmp_path / "image.png", "--json").out
    found = {one["class"]: one["probability"] for one in json.loads(out)["images"][0]["top"]}
    for number, value in enumerate(wanted.tolist()):
        assert found[f"class {number}"] == pytest.approx(value, abs=1e-3)


def test_pytorch_runs_where_the_engine_is_not_installed(repvgg, refused, files, folder, monkeypatch):
    def missing(*arguments, **more):
        raise MissingDependencyError("This needs 'llvmlite'.")

    monkeypatch.setattr("repvgg.engine.compile", missing)
    outcome = repvgg("predict", files.plain, folder / "0.png")
    assert (outcome.code, outcome.out.splitlines()[-1].endswith("engine torch (This needs 'llvmlite')")) == (0, True)
    assert "This needs 'llvmlite'" in refused("predict", files.plain, folder / "0.png", "--engine", "repvgg")


def test_what_is_refused(refused, files, folder, tmp_path):
    image = folder / "0.png"
    said = refused("predict", files.plain, folder / "notes.txt").replace(f"{folder}/", "")
    assert "'notes.txt' is not an image" in said
    assert "There is no file" in refused("predict", files.plain, tmp_path / "nothing.png")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("predict", files.plain, tmp_path / "empty")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:-40])
    assert "is truncated" in refused("predict", files.plain, tmp_path / "cut.png")
    assert "at least 1" in refused("predict", files.plain, image, "--top", 0)
    assert "Give image files" in refused("predict", files.plain)
    refused("predict", tmp_path / "no.safetensors", image)


@pytest.fixture
def mixed(folder, tmp_path):
    """A folder of two digits, an empty file, a page that is called an image, and half a digit."""
    for at in (0, 1):
        (tmp_path / f"{at}.png").write_bytes((folder / f"{at}.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((folder / "2.png").read_bytes()[:-40])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    return tmp_path


def test_bad_files_do_not_lose_the_others(repvgg, files, mixed, folder, truth):
    paths = [mixed, mixed / "nowhere.png", folder / "3.png"]
    outcome = repvgg("predict", files.plain, *paths, "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 1
    assert [image["file"] for image in report["images"]] == [
        str(path) for path in (mixed / "0.png", mixed / "1.png", folder / "3.png")
    ]
    for image, at in zip(report["images"], (0, 1, 3), strict=True):
        assert image["top"][0]["index"] == int(truth[at].argmax())
    failures = {one["file"]: one["reason"] for one in report["failures"]}
    assert failures.keys() == {str(mixed / name) for name in ("nowhere.png", "cut.png", "empty.png", "page.jpg")}
    assert failures[str(mixed / "nowhere.png")] == "does not exist"
    assert "truncated" in failures[str(mixed / "cut.png")]
    assert all(name in outcome.err for name in ("nowhere.png", "cut.png", "empty.png", "page.jpg"))
    assert outcome.err.endswith("warning: 4 of 7 files could not be read\n")


def test_only_bad_files(refused, files, mixed):
    said = refused("predict", files.plain, mixed / "empty.png", mixed / "page.jpg", mixed / "nowhere.png")
    assert "nowhere.png' does not exist, and 2 more could not be read" in said
    assert "nowhere.png' does not exist, and 1 more" in refused(
        "predict", files.plain, *[mixed / "nowhere.png", mixed / "no.png"]
    )


def test_a_table(repvgg, refused, files, mixed, truth):
    table = mixed / "predictions.csv"
    outcome = repvgg("predict", files.plain, mixed, "--top", 2, "--out", table)
    assert (outcome.code, outcome.out.splitlines()[-1]) == (1, f"wrote {table}: 2 images")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [row["file"] for row in rows] == [
        str(mixed / f"{name}") for name in ("0.png", "1.png", "cut.png", "empty.png", "page.jpg")
    ]
    for at, row in enumerate(rows[:2]):
        values, numbers = truth[at].topk(2)
        assert [row["class_1"], row["class_2"]] == [str(number) for number in numbers.tolist()]
        assert float(row["probability_1"]) == pytest.approx(values[0].item(), abs=1e-5)
        assert row["error"] == ""
    assert [row["class_1"] for row in rows[2:]] == ["", "", ""]
    assert all(row["error"] for row in rows[2:])
    assert "exists" in refused("predict", files.plain, mixed, "--out", table)
    assert "end 'a.txt' in .csv" in refused("predict", files.plain, mixed, "--out", "a.txt")
    assert repvgg("predict", files.plain, mixed, "--out", table, "--overwrite").code == 1


def test_names_of_several_lines_and_images_that_are_too_large(repvgg, folder, files, tmp_path):
    model = trained_like(create_model("repvgg_t0", num_classes=2, in_channels=1))
    path = tmp_path / "model.safetensors"
    save(path, model, replace(describe_model(model, "train"), classes=("a\nb", "\x1b[31mred")))
    (tmp_path / "x\ny.png").write_bytes((folder / "0.png").read_bytes())
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    outcome = repvgg("predict", path, tmp_path / "x\ny.png", tmp_path / "large.png", "--engine", "torch")
    assert outcome.code == 1
    name, *classes, _ = outcome.out.splitlines()
    assert name.endswith("x\\ny.png")
    assert sorted(line.split()[0] for line in classes) == ["\\x1b[31mred", "a\\nb"]
    bad, count = outcome.err.splitlines()  # and nothing by PIL
    assert "large.png' has more than 89,478,485 pixels" in bad
    assert "1 of 2 files" in count


def test_names_of_classes_from_a_file(repvgg, refused, files, folder, truth, tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    out = repvgg("predict", files.plain, folder / "3.png", "--classes", tmp_path / "names.txt", "--json").out
    assert json.loads(out)["images"][0]["top"][0]["class"] == names[int(truth[3].argmax())]
    (tmp_path / "names.txt").write_text("\n".join(names[1:]))
    said = refused("predict", files.plain, folder / "3.png", "--classes", tmp_path / "names.txt")
    assert "names 9 classes, but the model has 10" in said
    assert "cannot be read" in refused("predict", files.plain, folder / "3.png", "--classes", tmp_path / "no.txt")


def test_images_are_turned_upright(repvgg, files, folder, tmp_path):
    upright = Image.open(folder / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif.tobytes())
    straight, turned = (
        json.loads(repvgg("predict", files.plain, path, "--json").out)["images"][0]["top"]
        for path in (folder / "3.png", tmp_path / "turned.png")
    )
    assert straight == turned


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("form", ["train", "plain"])
def test_an_exported_file(repvgg, refused, files, folder, truth, tmp_path, suffix, form):
    """It knows classes and normalization; the plain form is exported as well."""
    exported = tmp_path / f"model{suffix}"
    assert repvgg("convert", getattr(files, form), exported).code == 0
    outcome = repvgg("predict", exported, folder, "--top", 3, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert (report["engine"], report["model"]) == ("onnxruntime" if suffix == ".onnx" else "torch", "repvgg_t0")
    for image, wanted in zip(report["images"], truth, strict=True):
        values, numbers = wanted.topk(3)
        assert [one["class"] for one in image["top"]] == [str(number) for number in numbers.tolist()]
        assert [one["probability"] for one in image["top"]] == pytest.approx(values.tolist(), rel=1e-3, abs=1e-5)
    assert "leave out --engine" in refused("predict", exported, folder, "--engine", "repvgg")
    assert "takes images of 16 pixels" in refused("predict", exported, folder, "--input-size", 20)


def test_broken_weights(refused, folder, tmp_path):
    model = create_model("repvgg_t0", num_classes=3, plain=True)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    save(tmp_path / "model.safetensors", model, describe_model(model, "plain"))
    assert "not finite" in refused("predict", tmp_path / "model.safetensors", folder / "0.png")
