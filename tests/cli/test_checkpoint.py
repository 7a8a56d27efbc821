"""``repvgg checkpoint``, and the other verbs on the files of other libraries."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from repvgg import create_model, is_plain, load, reparameterize
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage, describe_model, save
from tests.bn_statistics import trained_like

LAYOUTS = ["repvgg", "upstream", "timm", "mmpretrain"]


@pytest.fixture
def upstream(files, tmp_path):
    """The trained model as the authors' training script would have left it."""
    save(tmp_path / "bare.pth", files.model, describe_model(files.model, "train"), layout="upstream")
    tensors = torch.load(tmp_path / "bare.pth", weights_only=True)
    (tmp_path / "bare.pth").unlink()
    path = tmp_path / "upstream.pth"
    averaged = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": tensors, "model_ema": averaged, "optimizer": {"lr": 1}, "epoch": 7}, path)
    return path


def state(path):
    return load(path).model.state_dict()


def test_inspect_a_file_of_others(repvgg, upstream):
    outcome = repvgg("checkpoint", "inspect", upstream)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    for line in (
        *("names upstream", "section model_ema", "prefix module.", "model repvgg_t0", "form train", "num classes 10"),
        *("in channels 1", "input size 32", "parameters 203,050", "dtype float32", "header none"),
        "model is not used: another copy of the weights; model_ema was taken",
        "optimizer is not used: state of a training run, not of the model",
    ):
        assert line in lines


def test_inspect_as_json(repvgg, upstream, files):
    about = json.loads(repvgg("checkpoint", "inspect", upstream, "--json").out)
    assert about["names"] == "upstream"
    assert about["header"] is None
    assert about["used"] == len(files.model.state_dict())
    assert set(about["dropped"]) == {"model", "optimizer", "epoch"}
    own = json.loads(repvgg("checkpoint", "inspect", files.plain, "--json").out)
    assert (own["names"], own["form"], own["input_size"], own["dropped"]) == ("repvgg", "plain", 16, {})
    assert own["header"]["classes"] == list("0123456789")


def test_inspect_a_model_that_is_no_row(repvgg, tmp_path):
    gated = SqueezeExciteSpec("before_relu", 2)
    model = create_model(ModelSpec("mine", Stage(1, 8), (Stage(2, 8, 1), Stage(1, 12)), squeeze_excite=gated), 3)
    save(tmp_path / "a.pth", model, describe_model(model, "train"), layout="timm")
    out = repvgg("checkpoint", "inspect", tmp_path / "a.pth").out
    assert "note: not a registered model: the strides of stem, stages.1 are not in the file and assumed to be 2" in out
    save(tmp_path / "a.safetensors", model, describe_model(model, "train"), layout="timm")
    out = repvgg("checkpoint", "inspect", tmp_path / "a.safetensors").out
    assert "note:" not in out
    assert "header.spec" in out
    assert " mine\n" in out


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"# A README\n", "is not a checkpoint."),
        (b"PK\x03\x04 and no more", "is not a checkpoint, or is damaged"),
        (b"\x40\0\0\0\0\0\0\0{" + bytes(90), "is damaged"),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "convert"])
def test_files_that_are_no_checkpoints(refused, tmp_path, verb, content, text):
    (tmp_path / "file").write_bytes(content)
    out = [tmp_path / "out.safetensors"] if verb == "convert" else []
    assert text in refused("checkpoint", verb, tmp_path / "file", *out)


def test_no_file(refused, tmp_path):
    assert "There is no file at" in refused("checkpoint", "inspect", tmp_path / "nothing")
    assert "neither a folder nor a repository" in refused("checkpoint", "inspect", "hub:nothing")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("form", ["train", "plain"])
def test_convert_there_and_back(repvgg, files, tmp_path, to, form, suffix):
    source = files.train if form == "train" else files.plain
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.safetensors"
    outcome = repvgg("checkpoint", "convert", source, there, "--to", to)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"wrote {there}: repvgg_t0, {form} form, names of {to} instead of repvgg\n"
    assert load(there).account.layout == to
    assert repvgg("checkpoint", "convert", there, back).code == 0
    assert_close(state(back), state(source), rtol=0, atol=0)
    if suffix == ".safetensors" or to == "repvgg":  # what has a header keeps it
        assert load(back).metadata == load(source).metadata


@pytest.mark.parametrize("to", LAYOUTS)
def test_convert_collapses_on_request(repvgg, files, upstream, tmp_path, to):
    out = tmp_path / "plain.pth"
    outcome = repvgg("checkpoint", "convert", upstream, out, "--to", to, "--form", "plain")
    assert (outcome.code, outcome.err) == (0, "")
    first, *_, last = outcome.out.splitlines()
    assert first.startswith("equal: relative error ")
    assert last == f"wrote {out}: repvgg_t0, plain form, names of {to} instead of upstream"
    plain = load(out).model
    assert is_plain(plain)
    images = torch.randn(2, 1, 17, 19)
    with torch.no_grad():
        assert_close(plain(images), files.model(images), rtol=1e-4, atol=1e-5)


def test_the_form_that_is_there_already(repvgg, files, tmp_path):
    for form, source in (("train", files.train), ("plain", files.plain)):
        out = tmp_path / f"{form}.safetensors"
        assert "equal" not in repvgg("checkpoint", "convert", source, out, "--form", form, "--to", "timm").out
        assert_close(state(out), state(source), rtol=0, atol=0)


def test_what_is_not_equal_is_not_written(refused, files, tmp_path, monkeypatch):
    def wrong(model):
        plain, report = reparameterize(model)
        with torch.no_grad():
            plain.stem.conv.bias[0] += 0.01
        return plain, report

    monkeypatch.setattr("repvgg.models.checkpoint.reparameterize", wrong)
    text = refused("checkpoint", "convert", files.train, tmp_path / "a.safetensors", "--form", "plain")
    assert "is not equal to the reference" in text


def test_conversions_that_are_refused(refused, repvgg, files, tmp_path):
    out = tmp_path / "out.safetensors"
    assert "repvgg.expand" in refused("checkpoint", "convert", files.plain, out, "--form", "train")
    assert "end '" in refused("checkpoint", "convert", files.train, tmp_path / "out.onnx")
    out.write_text("precious")
    assert "exists" in refused("checkpoint", "convert", files.train, out)
    assert repvgg("checkpoint", "convert", files.train, out, "--overwrite").code == 0
    assert "would replace its source" in refused("checkpoint", "convert", out, out, "--overwrite")
    outcome = repvgg("checkpoint", "convert", files.train, tmp_path / "b.pth", "--to", "keras")
    assert (outcome.code, outcome.out) == (2, "")


def test_leftovers_are_named(refused, files, tmp_path):
    tensors = {f"module.{name}": tensor for name, tensor in files.model.state_dict().items()}
    extra = {f"neck.{number}.weight": torch.zeros(1) for number in range(3)}
    save_file({**tensors, **extra}, tmp_path / "a.safetensors")
    text = refused("checkpoint", "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "3 keys are unexpected ('neck.0.weight', 'neck.1.weight', …)" in text


def test_the_other_verbs_take_the_files_of_others(repvgg, files, upstream, tmp_path):
    plain = tmp_path / "plain.safetensors"
    assert repvgg("convert", upstream, plain).code == 0
    assert repvgg("verify", upstream, plain).code == 0
    assert repvgg("checkpoint", "convert", files.plain, tmp_path / "plain-timm.pth", "--to", "timm").code == 0
    assert repvgg("verify", upstream, tmp_path / "plain-timm.pth", "--input-size", "16").code == 0
    outcome = repvgg("bench", upstream, "--rounds", "2", "--input-size", "16", "--json")
    assert len(json.loads(outcome.out)["timings"]) == 3


def test_weights_of_others_in_a_model_by_name(repvgg, tmp_path):
    torch.manual_seed(0)
    model = trained_like(create_model("repvgg_t0", 5))
    save(tmp_path / "a.pth", model, describe_model(model, "train"), layout="mmpretrain")
    out = tmp_path / "plain.safetensors"
    outcome = repvgg("collapse", "repvgg:repvgg_t0", out, "--weights", tmp_path / "a.pth", "--num-classes", "5")
    assert (outcome.code, outcome.err) == (0, "")
    assert_close(state(out), reparameterize(model)[0].state_dict(), rtol=0, atol=0)
