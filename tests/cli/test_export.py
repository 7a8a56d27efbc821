import json
import typing
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from repvgg import engine
from repvgg.cli.export import export
from repvgg.deploy.file_target import compare
from repvgg.deploy.preprocessing import preprocessing_of
from repvgg.deploy.targets import TARGETS
from repvgg.engine.library.build import find_linker
from repvgg.engine.library.targets import CPU_TARGETS, NATIVE, cpu_target
from repvgg.errors import EquivalenceError
from repvgg.models import load
from repvgg.quantization.images import open_evaluation_images


def photographs(folder):
    """Write three files of images, of another size than the network takes."""
    (folder / "images").mkdir()
    for number in range(3):
        Image.effect_noise((20, 17), 60 + number).save(folder / "images" / f"{number}.png")
    return folder / "images"


@pytest.mark.skipif(find_linker(cpu_target("native")) is None, reason="no linker")
def test_a_train_form_becomes_a_library(repvgg, files, tmp_path):
    folder, images = tmp_path / "model", photographs(tmp_path)
    options = "--max-batch", "2", "--threads", "1", "--images", images
    outcome = repvgg("export", files.train, folder, "--to", "c", *options)
    assert (outcome.code, outcome.err) == (0, "")
    folded, equal, tolerance, ran, wrote = outcome.out.splitlines()
    assert folded == "the network was made plain first: 7 regions folded"
    assert equal.startswith("the export is equal: relative error ")
    assert equal.endswith("; 6 of 6 predictions agree, on border images and 3 photographs")
    assert tolerance.startswith("tolerance: ")
    assert "roundings" in tolerance
    assert ran == "libmodel.so was loaded and run on this machine."
    assert wrote.startswith(f"wrote {folder}: a library for {cpu_target('native').name}, ")
    assert wrote.endswith("with the weights, up to 2 images of 1 x 16 x 16 at once")
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(engine.load(folder)(images), files.model(images), rtol=1e-4, atol=1e-5)
    readme = (folder / "README.md").read_text()
    assert "Output k is the logit of class k: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in readme


def test_to_torchscript_with_images_and_preprocessing(repvgg, files, tmp_path):
    out = tmp_path / "plain.torchscript"
    images = photographs(tmp_path)
    options = "--images", images, "--with-preprocessing"
    outcome = repvgg("export", files.train, out, "--to", "torchscript", *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert "of 1 x 16 x 16 as pixels in [0, 255], float32" in outcome.out
    # 'predict' reads in the file that it takes pixels.
    probabilities = [predicted(repvgg, file, images) for file in (out, files.plain)]
    assert_close(*probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [(), ("--with-preprocessing",)], ids=["normalized", "pixels"])
def test_to_torchscript_with_the_images_of_a_data_set(repvgg, files, tmp_path, options, monkeypatch):
    seen = []

    def see(reference, run, batches, *rest):
        seen.append(torch.cat(batches))
        return compare(reference, run, batches, *rest)

    monkeypatch.setattr("repvgg.deploy.file_target.compare", see)
    out = tmp_path / "plain.torchscript"
    outcome = repvgg("export", files.plain, out, "--to", "torchscript", "--data", "digits:", *options)
    assert (outcome.code, outcome.err) == (0, "")
    assert "; 16 of 16 predictions agree, on 16 photographs" in outcome.out
    # They are those of the validation split, as 'repvgg quantize' chooses them.
    loaded = load(files.plain)
    config = replace(loaded.metadata.data_config(uri="digits:"), mean=(0.0,), std=(1.0,))
    pixels = 255 * torch.cat([images for images, _ in open_evaluation_images(config, (1, 16, 16), 16)])
    expected = pixels if options else preprocessing_of(loaded.model, loaded.metadata, (1, 16, 16)).apply(pixels)
    assert_close(seen[1], expected, rtol=1e-5, atol=1e-4)


def predicted(repvgg, file, images):
    outcome = repvgg("predict", file, images, "--json", "--engine", "torch")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["images"]
    return torch.tensor([[one["probability"] for one in sorted(row["top"], key=lambda x: x["index"])] for row in rows])


@pytest.mark.slow
def test_to_onnx_with_images(repvgg, files, tmp_path):
    out = tmp_path / "plain.onnx"
    outcome = repvgg("export", files.plain, out, "--to", "onnx", "--images", photographs(tmp_path))
    assert (outcome.code, outcome.err) == (0, "")
    plain, borders, photos, tolerance, names, operators, wrote = outcome.out.splitlines()
    assert plain == "the network is plain: it was exported as it is"
    assert borders.endswith("; 9 of 9 predictions agree, on border images")
    assert photos.endswith("; 3 of 3 predictions agree, on 3 photographs")
    assert "roundings" in tolerance
    assert names == "inputs: image (N, 1, 16, 16); outputs: logits"
    assert operators.endswith("no batch norm, no sum of branches")
    assert wrote == f"wrote {out}: any number of images of 1 x 16 x 16, float32"


def test_refusals(refused, files, tmp_path):
    folder = tmp_path / "model"
    assert "end '" in refused("export", files.plain, folder, "--to", "onnx")
    out = tmp_path / "plain.pt2"
    assert "--max-batch is not an option of --to pt2" in refused(
        "export", files.plain, out, "--to", "pt2", "--max-batch", "2"
    )
    folder.mkdir()
    assert "add --overwrite" in refused("export", files.plain, folder, "--to", "c")
    (folder / "precious").write_text("x")
    assert "other files than an export" in refused("export", files.plain, folder, "--to", "c", "--overwrite")
    assert "at least 1" in refused("export", files.plain, tmp_path / "m", "--to", "c", "--input-size", "0", "5")
    assert "There is no file" in refused("export", files.plain, tmp_path / "m", "--to", "c", "--images", "none.png")
    both = "--images", "none.png", "--data", "digits:"
    assert "give one of them" in refused("export", files.plain, tmp_path / "m", "--to", "c", *both)
    sized = "--data", "digits:", "--input-size", "16", "24"
    assert "set --input-size N N" in refused("export", files.plain, tmp_path / "m", "--to", "c", *sized)


def test_refusals_of_exports_to_files(refused, files, tmp_path):
    out = tmp_path / "plain.onnx"
    assert "--json and --rounds are options of --to all" in refused(
        "export", files.plain, out, "--to", "onnx", "--json"
    )
    assert "--threads is not an option of --to all" in refused(
        "export", files.plain, tmp_path / "all", "--to", "all", "--threads", "1"
    )
    assert "float32 only" in refused("export", files.plain, tmp_path / "m", "--to", "c", "--precision", "float16")
    assert "requires an older PyTorch" in refused("export", files.plain, tmp_path / "a.tflite", "--to", "litert")
    (tmp_path / "int8.onnx").write_bytes(b"nothing")
    assert "takes a network, not an ONNX file" in refused("export", tmp_path / "int8.onnx", out, "--to", "onnx")
    assert "An ONNX file has few targets" in refused("export", tmp_path / "int8.onnx", tmp_path / "all", "--to", "all")
    assert "exported as it is" in refused(
        "export", tmp_path / "int8.onnx", tmp_path / "a.ort", "--to", "ort", "--precision", "float16"
    )


def test_never_replaces_its_source(refused, tmp_path, files):
    source = tmp_path / "train.onnx"
    source.write_bytes(files.train.read_bytes())
    assert "would replace the trained weights" in refused("export", source, source, "--to", "onnx", "--overwrite")


def test_a_library_that_differs_is_not_kept(refused, files, tmp_path, monkeypatch):
    def differs(*arguments):
        raise EquivalenceError("The library differs.")

    monkeypatch.setattr("repvgg.deploy.c_library.compare_library", differs)
    assert "The library differs." in refused("export", files.plain, tmp_path / "model", "--to", "c")


def test_the_options_are_those_of_the_tables():
    hints = typing.get_type_hints(export, include_extras=False)
    assert set(typing.get_args(hints["to"])) == {*TARGETS, "all"}
    assert set(typing.get_args(typing.get_args(hints["target"])[0])) == {*CPU_TARGETS, NATIVE}
