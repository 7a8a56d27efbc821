"""Images with masks from training to masks of new images, by the commands."""

import contextlib
import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from repvgg import load, reparameterize
from repvgg.cli import main
from repvgg.cli._predict_masks import compiled
from repvgg.models import SPECS, create_model, describe_model, registry, save
from repvgg.training import read_config
from tests.training.masks import CLASSES, SPEC, make_masks

SMALL = (
    *("pspnet_tiny", "--recipe", "pspnet-small", "--epochs", "5", "--batch-size", "2", "--data.train-size", "33"),
    *("--optim.lr", "0.02", "--optim.lr-batch", "None", "--precision", "float32", "--threads", "1"),
    *("--accelerator", "cpu", "--no-channels-last"),
)
FILES = {"config.yaml", "last.ckpt", "train.safetensors", "plain.safetensors", "best.safetensors", "report.json"}
FILES |= {"log.csv", "curve.png", "report.html", "tensorboard", "samples"}


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    """Register a network that is small enough for tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.PSPNETS, SPEC.name, SPEC)
        patch.setitem(registry.ARCHITECTURES, SPEC.name, SPEC)
        yield


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return make_masks(tmp_path_factory.mktemp("data") / "shapes", train=24)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, uri):
    """A run of five epochs that starts from a plain classifier: its folder and its output."""
    folder, said = tmp_path_factory.mktemp("run"), io.StringIO()
    plain, _ = reparameterize(create_model("repvgg_t0", 10).eval())
    save(folder / "a.safetensors", plain, describe_model(plain, "plain"))
    arguments = ["train", *SMALL, "--data", uri, "--init", folder / "a.safetensors", "--out", folder / "run"]
    with contextlib.redirect_stdout(said):
        assert main([str(argument) for argument in arguments]) == 0
    return folder / "run", said.getvalue()


def test_a_run_leaves_both_forms(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES
    train, plain = (load(folder / f"{name}.safetensors") for name in ("train", "plain"))
    assert (train.metadata.form, plain.metadata.form) == ("train", "plain")
    assert train.metadata.classes == CLASSES
    assert train.metadata.input_size == 33
    assert len(train.metadata.palette) == 3
    report = json.loads((folder / "report.json").read_text())
    assert report["train_form"]["miou"] == train.metadata.metrics["held_out_miou"] > 0.5  # one class alone: 0.24
    assert report["plain_form"]["confusion"] == report["train_form"]["confusion"]
    assert report["mask_agreement"] == {"same": 3 * 41 * 36, "pixels": 3 * 41 * 36, "different_in_float64": None}
    assert len(report["samples"]) == 3
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert len(rows) == 5
    best = max(float(row["held_out_miou"]) for row in rows)
    assert load(folder / "best.safetensors").metadata.metrics["held_out_miou"] == pytest.approx(best)
    assert read_config(folder / "config.yaml").optim.schedule == "poly"


def test_a_run_says_what_decides_the_outcome(finished):
    folder, said = finished
    lines = [line.strip() for line in said.splitlines()]
    init = folder.parent / "a.safetensors"
    assert lines[1] == f"the backbone starts from {init}, repvgg_t0 in the plain form; the heads are new"
    assert lines[2].startswith("expanded 7 convolutions into branches")
    assert lines[3].endswith("5 epochs, poly schedule, decay policy 'paper'")
    assert [line.partition(":")[0] for line in lines[4:8]] == [
        "backbone, decay",
        "backbone, no decay",
        "heads, decay",
        "heads, no decay",
    ]
    assert lines[4].endswith("learning rate 0.02")
    assert lines[6].endswith("10 times the learning rate, learning rate 0.2")
    assert "validation mIoU" in said
    assert lines[-3] == f"train form and plain form: the same class in all {3 * 41 * 36:,} pixels"


def test_the_page_of_a_run(finished):
    html = (finished[0] / "report.html").read_text()
    for words in ("Validation mIoU by epoch", "Images, truth, prediction and errors", "Which classes are confused?"):
        assert words in html
    assert html.count("<figure><img") == 4 * 3
    assert "the same class in all 4,428 pixels" in html


def test_eval_prints_iou_by_class(finished, repvgg, uri, tmp_path):
    folder, _ = finished
    page = tmp_path / "eval.html"
    outcome = repvgg("eval", folder / "train.safetensors", "--data", uri, "--report", page)
    assert (outcome.code, outcome.err) == (0, "")
    assert "train form and plain form: the same class in all 4,428 pixels" in outcome.out
    assert "absent classes: every class occurs" in outcome.out
    report = json.loads((folder / "report.json").read_text())["plain_form"]
    row = next(line.split() for line in outcome.out.splitlines() if line.startswith("ground"))
    assert row[-1] == f"{100 * report['iou'][0]:.2f}"
    assert "evaluated on the validation images" in page.read_text().lower()
    again = repvgg("eval", folder / "train.safetensors", "--data", uri, "--report", page)
    assert again.code == 2
    assert "exists" in again.err


def test_eval_with_windows_flips_and_scales(finished, repvgg, uri):
    plain = finished[0] / "plain.safetensors"
    found = {}
    for name, options in {
        "one": (),
        "windows": ("--window", 33, "--stride", 8),
        "all": ("--window", 33, "--tta"),
    }.items():
        outcome = repvgg("eval", plain, "--data", uri, "--json", *options)
        assert outcome.code == 0
        found[name] = json.loads(outcome.out)
    assert found["windows"]["inference"] == "windows of 33 pixels at stride 8"
    assert found["all"]["inference"].endswith("scales 0.5, 0.75, 1, 1.25, 1.5, 1.75")
    confusions = [one["plain form"]["confusion"] for one in found.values()]
    assert confusions[0] != confusions[1] != confusions[2]
    assert len({sum(map(sum, matrix)) for matrix in confusions}) == 1
    assert set(found["one"]["plain form"]["iou_by_class"]) == set(CLASSES)


def test_predict_writes_masks_and_overlays(finished, repvgg, uri, tmp_path):
    images = uri.removeprefix("masks:") + "/val/images"
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    out = tmp_path / "masks"
    outcome = repvgg("predict", finished[0] / "train.safetensors", images, bad, "--out", out, "--engine", "torch")
    assert outcome.code == 1  # one file of four
    assert "bad.png" in outcome.err
    assert sorted(path.name for path in out.iterdir()) == sorted(
        name for number in range(3) for name in (f"{number}.png", f"{number}-overlay.jpg")
    )
    loaded = load(finished[0] / "plain.safetensors")
    about = loaded.metadata
    with Image.open(out / "1.png") as mask, Image.open(f"{images}/1.png") as image:
        assert mask.mode == "P"
        assert tuple(mask.getpalette()[:3]) == about.palette[0]
        found, pixels = np.asarray(mask), np.asarray(image)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (about.mean, about.std))
    x = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        expected = loaded.model(x).argmax(1)[0].numpy()
    assert (found == expected).mean() > 0.999  # ties may round differently
    with Image.open(out / "1-overlay.jpg") as overlay:
        assert overlay.width == 41
        assert overlay.height > 36  # the legend
    again = repvgg("predict", finished[0] / "train.safetensors", images, "--out", out)
    assert again.code == 2
    assert "exists" in again.err


def test_an_exported_network_predicts_in_windows_of_its_size(finished, repvgg, refused, uri, tmp_path):
    images, plain, out = uri.removeprefix("masks:") + "/val/images", finished[0] / "plain.safetensors", "a.torchscript"
    exported = repvgg("export", plain, tmp_path / out, "--to", "torchscript")
    assert exported.code == 0, exported.err
    by_windows = ("--window", "33", "--json", "--engine", "torch")
    found, expected = (
        json.loads(repvgg("predict", file, images, *options).out)
        for file, options in ((tmp_path / out, ("--json",)), (plain, by_windows))
    )
    assert found["engine"] == "torch"
    assert found["model"] == expected["model"]
    assert len(found["images"]) == len(expected["images"]) > 0
    for ours, theirs in zip(found["images"], expected["images"], strict=True):
        assert ours["shares"] == pytest.approx(theirs["shares"], abs=2e-3)  # a pixel or two at a tie
    assert "33 pixels, which are its windows" in refused("predict", tmp_path / out, images, "--window", "41")


def test_masks_of_a_network_without_a_palette(finished, repvgg, uri, tmp_path):
    """VOC's colours are chosen, as other tools choose them for unnamed classes."""
    loaded = load(finished[0] / "plain.safetensors")
    save(tmp_path / "unnamed.safetensors", loaded.model, replace(loaded.metadata, palette=(), classes=()))
    images = uri.removeprefix("masks:") + "/val/images"
    outcome = repvgg("predict", tmp_path / "unnamed.safetensors", images, "--out", tmp_path / "masks")
    assert outcome.code == 0
    with Image.open(tmp_path / "masks/1.png") as mask:
        assert mask.mode == "P"
        assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert set(np.unique(mask)) <= {0, 1, 2}


def test_predict_lists_shares_without_a_folder(finished, repvgg, uri):
    images = uri.removeprefix("masks:") + "/val/images"
    outcome = repvgg("predict", finished[0] / "plain.safetensors", images)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert len(lines) == 4
    shares = [float(part.split()[-1].rstrip("%")) for part in lines[0].partition(": ")[2].split(", ")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert "whole images, engine " in lines[-1]
    data = json.loads(repvgg("predict", finished[0] / "plain.safetensors", images, "--json").out)
    assert sum(data["images"][0]["shares"].values()) == pytest.approx(1)


def test_files_of_the_same_name_get_names_of_their_own(finished, repvgg, uri, tmp_path):
    root = uri.removeprefix("masks:")
    outcome = repvgg(
        *("predict", finished[0] / "plain.safetensors", f"{root}/val/images/0.png", f"{root}/train/images/0.png"),
        *("--out", tmp_path / "masks"),
    )
    assert outcome.code == 0
    assert len(list((tmp_path / "masks").iterdir())) == 4


def test_what_does_not_fit_is_refused_in_one_sentence(finished, refused, uri, files, tmp_path):
    folder, _ = finished
    plain = folder / "plain.safetensors"
    assert "has masks, but repvgg_t0 is a classifier" in refused("eval", files.train, "--data", uri)
    assert "is a segmentation network, but fake:20x3 has no masks" in refused("eval", plain, "--data", "fake:20x3")
    assert "--window is for images with masks" in refused("eval", files.train, "--data", "fake:20x10", "--window", 33)
    assert "take 25 or 33" in refused("eval", plain, "--data", uri, "--window", 32)
    assert "--tta sets the scales" in refused("eval", plain, "--data", uri, "--tta", "--scales", "0.5")
    assert "end 'page.txt' in .html" in refused("eval", plain, "--data", uri, "--report", "page.txt")
    assert "give a folder as --out" in refused("predict", plain, folder, "--out", tmp_path / "masks.csv")
    assert "for segmentation networks" in refused("predict", files.plain, folder, "--flip")
    other = make_masks(tmp_path / "other")
    (tmp_path / "other" / "classes.txt").write_text("ground\ndisc\nline\nmore\n")
    assert "The model has 3 classes, but" in refused("eval", plain, "--data", other)
    (tmp_path / "other" / "classes.txt").write_text("ground\ndisc\nline\n")
    assert "number 2 is 'bar' in the model and 'line' in the data" in refused("eval", plain, "--data", other)
    quick = ("--recipe", "quickstart", "--out", tmp_path / "run")
    assert "has masks, but repvgg_t0 is a classifier" in refused("train", "repvgg_t0", "--data", uri, *SMALL[1:])
    assert "has no masks" in refused("train", "pspnet_tiny", "--data", "fake:60x3", *quick)


def test_data_that_does_not_fit_is_refused_in_one_sentence(refused, tmp_path):
    uri = make_masks(tmp_path / "shapes")
    arguments = ("train", *SMALL, "--data", uri, "--out", tmp_path / "run")
    assert "A training crop has a side of 8k + 1 pixels, not 32" in refused(*arguments, "--data.train-size", 32)
    mask = tmp_path / "shapes" / "train" / "labels" / "3.png"
    Image.new("RGB", (41, 36)).save(mask)
    assert "has colours (mode RGB) in place of labels" in refused(*arguments)
    mask.unlink()
    assert "has no mask: add the mask, remove the image" in refused(*arguments)
    (tmp_path / "shapes" / "train" / "images" / "3.png").unlink()
    arguments = ("train", *SMALL, "--data", f"{uri}?ignore=11", "--out", tmp_path / "run")
    assert "holds label 255 in 144 pixels" in refused(*arguments)
    (tmp_path / "shapes" / "classes.txt").unlink()
    assert "hold label 255, which marks unlabelled pixels" in refused(*arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_a_segmentation_network(finished, repvgg, uri, tmp_path):
    init = finished[0] / "train.safetensors"
    arguments = ("--data", uri, "--init", init, "--epochs", 1, "--optim.warmup-epochs", 0, "--out", tmp_path / "run")
    outcome = repvgg("train", *SMALL, *arguments)
    assert outcome.code == 0
    assert f"starts from {init}, pspnet_tiny in the train form" in outcome.out
    assert "new classifier" not in outcome.out
    trained = load_file(tmp_path / "run" / "train.safetensors")
    assert trained.keys() == load_file(init).keys()


def test_a_plain_network_trains_without_a_second_form(finished, repvgg, uri, tmp_path):
    init = finished[0] / "plain.safetensors"
    arguments = ("--data", uri, "--init", init, "--epochs", 1, "--optim.warmup-epochs", 0, "--out", tmp_path / "run")
    # The rate of the others would undo what was learned, without batch norms.
    outcome = repvgg("train", *SMALL, "--optim.lr", "1e-4", *arguments)
    assert outcome.code == 0
    assert "warning: trains a plain model" in outcome.out
    assert not (tmp_path / "run" / "train.safetensors").exists()
    assert load(tmp_path / "run" / "plain.safetensors").metadata.form == "plain"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["mask_agreement"] is report["plain_form"] is None
    assert report["train_form"]["miou"] > 0.5
    assert len(report["samples"]) == 3


def test_a_backbone_that_does_not_fit_is_refused(refused, uri, tmp_path):
    spec = replace(SPECS["repvgg_t0"], name="wide", stem=replace(SPECS["repvgg_t0"].stem, channels=8))
    model = create_model(spec, 10)
    save(tmp_path / "wide.safetensors", model, describe_model(model, "train"))
    message = refused(
        "train", *SMALL, "--data", uri, "--init", tmp_path / "wide.safetensors", "--out", tmp_path / "run"
    )
    assert "is a checkpoint of wide, not of repvgg_t0" in message


@pytest.mark.parametrize("engine", ["auto", "repvgg"])
def test_the_engine_runs_images_of_several_sizes(engine):
    model = create_model(SPEC, 3, plain=True).eval()
    run, describe = compiled(model, engine)
    with torch.inference_mode():
        for size in ((33, 41), (41, 33), (33, 41)):  # the interpolation to the size of another map depends on it
            images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
            expected = model(images)
            assert (run(images) - expected).abs().max() < 1e-4 * expected.abs().max()
            assert describe() == "repvgg"


@pytest.mark.slow
def test_a_segmentation_network_is_quantized(finished, uri, repvgg, tmp_path):
    folder, _ = finished
    few = ("--calibration-images", "4", "--test-images", "3", "--granularity", "per_channel", "--rounding-sweeps", "0")
    options = ("--data", uri, *few, "--min-agreement", "0", "--input-size", "40", "48")
    outcome = repvgg("quantize", folder / "train.safetensors", tmp_path / "int8.onnx", *options)
    assert (outcome.code, outcome.err) == (0, "")
    line = next(one for one in outcome.out.splitlines() if one.startswith("ONNX Runtime: agreement "))
    assert "3 images, mIoU " in line
    assert "times as fast" in line


def test_labels_do_not_quantize_a_segmentation_network(finished, repvgg, tmp_path):
    folder, _ = finished
    options = ("--data", "digits:", "--calibration-images", "2", "--test-images", "2", "--input-size", "40", "40")
    outcome = repvgg("quantize", folder / "plain.safetensors", tmp_path / "int8.onnx", *options)
    assert outcome.code == 2
    assert "needs images with masks, but the data has labels" in outcome.err
