import json

import pytest
import torch

from repvgg import load
from repvgg.deploy import export_onnx, export_program
from repvgg.models import create_model, describe_model, save


@pytest.fixture(scope="module")
def perturbed(files, tmp_path_factory):
    """The plain form with one weight changed."""
    path, loaded = tmp_path_factory.mktemp("perturbed") / "plain.safetensors", load(files.plain)
    with torch.no_grad():
        loaded.model.stages[1][2].conv.weight[0, 0, 1, 1] += 0.05
    save(path, loaded.model, loaded.metadata)
    return path


@pytest.fixture(scope="module")
def onnx_file(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    export_onnx(load(files.plain).model, path, (1, 20, 16))
    return path


def test_equal(repvgg, files):
    outcome = repvgg("verify", files.train, files.plain)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("passed\n  relative error ")
    assert "12 samples in 3 batches" in outcome.out


def test_perturbed(repvgg, files, perturbed):
    outcome = repvgg("verify", files.train, perturbed)
    assert (outcome.code, outcome.err) == (1, "")
    assert outcome.out.startswith("FAILED: the relative error ")
    assert "the layer that adds the largest error is stages.1.2.conv" in outcome.out
    assert repvgg("verify", files.train, perturbed, "--tolerance", "1").code == 0


@pytest.mark.parametrize("equal", [True, False])
def test_json(repvgg, files, perturbed, equal):
    outcome = repvgg("verify", files.train, files.plain if equal else perturbed, "--json", "--batch", 2, "--batches", 1)
    assert outcome.code == (0 if equal else 1)
    evidence = json.loads(outcome.out)
    assert evidence["passed"] is equal
    assert (evidence["samples"], evidence["batches"]) == (2, 1)
    assert (evidence["relative"] <= evidence["tolerance"]) is equal


def test_seed_and_size_choose_the_images(repvgg, files):
    def error(*more):
        return json.loads(repvgg("verify", files.train, files.plain, "--json", "--batches", 1, *more).out)["relative"]

    by_default = error()
    assert by_default == error("--seed", 0, "--input-size", 16)
    assert len({by_default, error("--seed", 1), error("--input-size", 9)}) == 3


def test_onnx_file_as_the_candidate(repvgg, files, onnx_file):
    outcome = repvgg("verify", files.train, onnx_file, "--json")
    assert outcome.code == 0
    evidence = json.loads(outcome.out)
    assert (evidence["batches"], evidence["samples"]) == (1, 4)
    assert evidence["agreement"] == {"agreed": 4, "total": 4, "widest_margin": 0.0}


def test_onnx_file_of_a_fixed_batch_and_another_function(repvgg, files, perturbed, tmp_path):
    path = tmp_path / "other.onnx"
    export_onnx(load(perturbed).model, path, (1, 12, 12), dynamic_batch=False)
    outcome = repvgg("verify", files.train, path, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["samples"] == 1


def test_exported_program_as_the_candidate(repvgg, refused, files, perturbed, tmp_path):
    for source, code in ((files.plain, 0), (perturbed, 1)):
        path = tmp_path / f"{code}.pt2"
        export_program(load(source).model, path, (1, 16, 12))
        outcome = repvgg("verify", files.train, path, "--json")
        assert outcome.code == code
        assert json.loads(outcome.out)["samples"] == 4
    assert "The candidate does not run on" in refused("verify", files.train, path, "--input-size", 9)
    path.write_bytes(b"no program")
    assert "is not an exported program" in refused("verify", files.train, path)


def test_onnx_file_that_does_not_take_the_images(refused, files, onnx_file):
    assert "takes torch.float32 of shape (N, 1, 20, 16)" in refused("verify", files.train, onnx_file, "--input-size", 9)


@pytest.mark.parametrize(("classes", "channels"), [(9, 1), (10, 3)])
def test_other_classes_or_channels(refused, files, tmp_path, classes, channels):
    model = create_model("repvgg_t0", classes, channels)
    save(tmp_path / "other.safetensors", model, describe_model(model, "train"))
    text = refused("verify", files.train, tmp_path / "other.safetensors")
    assert f"maps {channels} channels to {classes} classes, and the reference 1 to 10" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--batch", "0"), "at least 1"),
        (("--batches", "0"), "batches must be at least 1, got 0"),
        (("--input-size", "0"), "at least 1"),
        (("--input-size", "-3"), "at least 1"),
        (("--tolerance", "-1"), "tolerance"),
        (("--tolerance", "nan"), "tolerance"),
        (("--seed", str(2**63)), "64 bits"),
        (("--input-size", str(10**7)), "not enough memory"),
    ],
)
def test_numbers_that_make_no_sense(refused, files, arguments, text):
    assert text in refused("verify", files.train, files.plain, *arguments)


def test_files_that_are_not_there(refused, files, tmp_path):
    for pair in ((tmp_path / "a", files.plain), (files.train, tmp_path / "a"), (files.train, tmp_path / "a.onnx")):
        assert "There is no file" in refused("verify", *pair)
    (tmp_path / "text.onnx").write_text("no protobuf")
    assert "cannot be loaded" in refused("verify", files.train, tmp_path / "text.onnx")
