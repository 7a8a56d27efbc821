import json
import os
import subprocess
import sys
import tempfile

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from repvgg import is_plain, load, reparameterize
from repvgg.deploy import OnnxRunner, ProgramRunner
from repvgg.models import resolve
from repvgg.verify import isolated_eval, verify
from tests.bn_statistics import trained_like

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(self.dense(x) + self.pointwise(x) + self.norm(x))


class Net(nn.Sequential):
    def __init__(self, channels=3):
        super().__init__(
            nn.Conv2d(channels, 8, 3, 2, 1), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )


def make_model():
    return Net()


def no_output():
    class Silent(Net):
        def forward(self, x):
            super().forward(x)

    return Silent()


def one_size():
    class OneSize(Net):
        def forward(self, x):
            assert x.shape[-2:] == (16, 20), "other sizes are not for me"
            return super().forward(x)

    return OneSize()


def one_image():
    class OneImage(Net):
        def forward(self, x):
            return torch.cat([super(OneImage, self).forward(image[None]) for image in x.unbind()])

    return OneImage()


def structured():
    class Structured(Net):
        def forward(self, x):
            y = super().forward(x)
            return {"logits": y, "double": [2 * y]}

    return Structured()


def gray():
    return Net(1)


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(2))
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return f"{path}:make_model"


@pytest.fixture
def trained(source, tmp_path):
    """A model of that file with weights as training leaves them, and the file of these."""
    torch.manual_seed(0)
    model = trained_like(resolve(source).model)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def run(model, x):
    with isolated_eval(model):
        return model(x)


ELSEWHERE = """
import sys, torch
program = torch.export.load(sys.argv[1], extra_files=(notes := {"repvgg.json": ""}))
torch.save(program.module()(torch.load("x.pt")), "y.pt")
assert "repvgg" not in sys.modules
assert "net.py:make_model" in notes["repvgg.json"]
assert not any("norm" in str(node.target) for node in program.graph.nodes)
"""


def in_a_fresh_process(path, x):
    """What the program makes of ``x`` where this library is not imported."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(x, f"{folder}/x.pt")
        subprocess.run([sys.executable, "-c", ELSEWHERE, path], cwd=folder, check=True)
        return torch.load(f"{folder}/y.pt")


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_programs(repvgg, source, trained, tmp_path, suffix):
    model, weights = trained
    out, report = tmp_path / f"plain.{suffix}", tmp_path / "report.json"
    more = ("--input-size", 15, 18, "--report", report)
    outcome = repvgg("collapse", source, out, "--weights", weights, *more)
    assert (outcome.code, outcome.err) == (0, "")
    *_, folded, equal, wrote = outcome.out.splitlines()
    assert folded == "2 regions folded; 1,645 → 1,437 parameters"
    assert equal.startswith("plain form is equal: relative error ")
    assert equal.endswith("on images of 15x18, 17x21, 19x23")
    assert wrote.startswith(f"wrote {out}: any number of images of 3 x 15 x 18, loaded back and equal, ")
    runner = (ProgramRunner if suffix == "pt2" else OnnxRunner)(out)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 15, 18)
        assert_close(runner(x), run(model, x), rtol=1e-4, atol=1e-5)
        if suffix == "pt2" and batch == 5:
            assert_close(in_a_fresh_process(out, x), run(model, x), rtol=1e-4, atol=1e-5)
    content = json.loads(report.read_text())
    assert content["weights"] == "from weights.safetensors"
    assert [region["parameters_after"] for region in content["folded"]] == [584, 584]
    assert content["evidence"]["passed"]
    assert content["evidence_of_file"]["passed"]
    assert sorted(os.listdir(tmp_path)) == sorted(["net.py", out.name, report.name, weights.name])


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_outputs_in_a_dictionary_are_kept(repvgg, source, trained, tmp_path, suffix):
    model, weights = trained
    out = tmp_path / f"plain.{suffix}"
    source = source.replace("make_model", "structured")
    outcome = repvgg("collapse", source, out, "--weights", weights, "--input-size", 15, 18)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 regions folded; 1,645 → 1,437 parameters" in outcome.out
    assert "any number of images of 3 x 15 x 18, loaded back and equal" in outcome.out
    runner = (ProgramRunner if suffix == "pt2" else OnnxRunner)(out)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 15, 18)
        y = run(model, x)
        names = {"logits": y, "double": [2 * y]} if suffix == "pt2" else {"logits": y, "double_0": 2 * y}
        assert_close(runner(x), names, rtol=1e-4, atol=1e-5)
    packed = run(resolve(source, weights=weights).model, x)
    assert verify(lambda x: packed, runner, x).passed
    swapped = {"logits": packed["double"][0], "double": [packed["logits"]]}
    assert not verify(lambda x: swapped, runner, x).passed


def test_weights_alone(repvgg, source, trained, tmp_path):
    model, weights = trained
    out = tmp_path / "plain.safetensors"
    outcome = repvgg("collapse", source, out, "--weights", weights)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == f"wrote {out}: weights of the plain form, read back bit for bit"
    plain, _ = reparameterize(resolve(source).model)
    plain.load_state_dict(load_file(out))
    x = torch.randn(2, 3, 31, 33)
    assert_close(run(plain, x), run(model, x), rtol=1e-4, atol=1e-5)
    with safetensors.safe_open(out, "pt") as opened:
        notes = json.loads(opened.metadata()["repvgg.plain"])
    assert {"form": "plain", "source": source, "weights": "from weights.safetensors"}.items() <= notes.items()


def test_a_row_of_our_table_can_be_loaded(repvgg, files, tmp_path):
    out = tmp_path / "plain.safetensors"
    more = ("--num-classes", 10, "--input-shape", 1, 16, 16, "--weights", files.train)
    assert repvgg("collapse", "repvgg:repvgg_t0", out, *more).code == 0
    loaded = load(out)
    assert (loaded.metadata.form, loaded.metadata.input_size) == ("plain", 16)
    assert is_plain(loaded.model)
    x = torch.randn(2, 1, 16, 16)
    assert_close(run(loaded.model, x), run(files.model, x), rtol=1e-4, atol=1e-5)


def test_timm(repvgg, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = trained_like(timm.create_model("repghostnet_050", num_classes=7))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "run.pth")
    out = tmp_path / "plain.safetensors"
    more = ("--num-classes", 7, "--input-size", 64, 64, "--weights", tmp_path / "run.pth")
    outcome = repvgg("collapse", "timm:repghostnet_050", out, *more)
    assert (outcome.code, outcome.err) == (0, "")
    assert "80 regions folded" in outcome.out
    plain, _ = reparameterize(timm.create_model("repghostnet_050", num_classes=7).eval())
    plain.load_state_dict(load_file(out))
    x = torch.randn(2, 3, 64, 64)
    assert_close(run(plain, x), run(model, x), rtol=1e-3, atol=1e-4)


def test_random_weights_are_said_to_be_random(repvgg, source, tmp_path):
    out = tmp_path / "plain.safetensors"
    outcome = repvgg("collapse", "repvgg:repvgg_t0", out)
    assert outcome.err == "warning: no --weights were given: the weights of repvgg:repvgg_t0 are random\n"
    with safetensors.safe_open(out, "pt") as opened:
        assert json.loads(opened.metadata()["repvgg.plain"])["weights"] == "random"
    outcome = repvgg("collapse", source, out, "--overwrite")
    assert outcome.err.endswith("are set by make_model(), random unless it loads some\n")


def test_nothing_to_fold(repvgg, source, tmp_path):
    outcome = repvgg("collapse", source.replace("make_model", "plain"), tmp_path / "plain.safetensors")
    assert outcome.code == 0
    assert outcome.out.startswith("nothing to fold, a copy; 112 → 112 parameters\n")


def test_one_size_only(repvgg, refused, source, tmp_path):
    source, out = source.replace("make_model", "one_size"), tmp_path / "plain.safetensors"
    assert "on images of 16x20\n" in repvgg("collapse", source, out, "--input-size", 16, 20).out
    text = refused("collapse", source, tmp_path / "other.safetensors", "--input-size", 20, 16)
    assert "cannot run on images of the shape (3, 20, 16): other sizes are not for me" in text


def test_one_image_only(repvgg, source, tmp_path):
    out = tmp_path / "plain.pt2"
    outcome = repvgg("collapse", source.replace("make_model", "one_image"), out, "--input-size", 16, 16)
    assert outcome.code == 0
    assert f"wrote {out}: one image at a time of 3 x 16 x 16" in outcome.out
    assert ProgramRunner(out)(torch.randn(1, 3, 16, 16)).shape == (1, 5)


def test_channels(repvgg, refused, source, tmp_path):
    source, out = source.replace("make_model", "gray"), tmp_path / "plain.safetensors"
    assert "cannot run on images of the shape (3, 224, 224)" in refused("collapse", source, out)
    assert repvgg("collapse", source, out, "--input-shape", 1, 16, 16).code == 0


def test_the_table_is_cut_to_the_terminal_and_whole_in_a_pipe(repvgg, source, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    whole = repvgg("collapse", source, tmp_path / "a.safetensors").out
    assert "BatchNorm2d + 1x1 Conv2d" in whole
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    cut = repvgg("collapse", source, tmp_path / "b.safetensors").out
    assert "…" in cut


@pytest.mark.parametrize("name", ["plain.pt", "plain", "plain.onnx.gz"])
def test_suffixes_are_checked_before_any_work(refused, tmp_path, name):
    text = refused("collapse", "no such source", tmp_path / name)
    assert "in one of .pt2, .onnx, .safetensors" in text


def test_what_exists_stays(repvgg, refused, source, trained, tmp_path):
    out = tmp_path / "plain.safetensors"
    out.write_text("precious")
    assert "exists" in refused("collapse", source, out)
    other = ("collapse", source, tmp_path / "other.safetensors", "--report")
    assert "exists" in refused(*other, out)
    assert "two files" in refused(*other, tmp_path / "other.safetensors")
    weights = trained[1]
    assert "would be replaced" in refused("collapse", source, weights, "--weights", weights, "--overwrite")
    assert repvgg("collapse", source, out, "--overwrite").code == 0
    assert load_file(out)


def test_sizes_that_make_no_sense(refused, source, tmp_path):
    out = tmp_path / "plain.pt2"
    assert "not both" in refused("collapse", source, out, "--input-size", 8, 8, "--input-shape", 3, 8, 8)
    assert "at least 1" in refused("collapse", source, out, "--input-size", 0, 8)
    assert "at least one class" in refused("collapse", "repvgg:repvgg_t0", out, "--num-classes", 0)


def test_outputs_that_cannot_be_compared_are_refused(refused, source, tmp_path):
    source = source.replace("make_model", "no_output")
    assert "returns None: there are no floating-point numbers" in refused("collapse", source, tmp_path / "plain.pt2")


def test_weights_that_do_not_fit(refused, source, trained, tmp_path):
    tensors = load_file(trained[1])
    del tensors["0.weight"], tensors["0.bias"], tensors["1.norm.bias"]
    tensors |= {"5.bias": torch.zeros(3), "extra": torch.zeros(1)}
    save_file(tensors, tmp_path / "odd.safetensors")
    text = refused("collapse", source, tmp_path / "plain.pt2", "--weights", tmp_path / "odd.safetensors")
    assert "3 keys are missing ('0.weight', '0.bias', …)" in text
    assert "1 key is unexpected ('extra')" in text
    assert "1 key has another shape ('5.bias' (3,) instead of (5,))" in text


def test_what_is_not_equal_is_not_written(repvgg, source, trained, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        plain, report = reparameterize(*args, **kwargs)
        with torch.no_grad():
            next(m for m in plain.modules() if isinstance(m, nn.Conv2d)).bias[0] += 0.01
        return plain, report

    monkeypatch.setattr("repvgg.collapse.reparameterize", wrong)
    outcome = repvgg("collapse", source, tmp_path / "plain.pt2", "--weights", trained[1])
    assert outcome.code == 2
    assert outcome.err.startswith("error: The candidate is not equal to the reference")
    assert not (tmp_path / "plain.pt2").exists()


@pytest.mark.parametrize("place", ["torch.export.save", "repvgg.deploy.shipping.ProgramRunner"])
def test_interrupted_while_writing(repvgg, source, tmp_path, monkeypatch, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    outcome = repvgg("collapse", source, tmp_path / "plain.pt2", "--input-size", 8, 8)
    assert outcome.code == 130
    assert outcome.err.endswith("interrupted\n")
    assert os.listdir(tmp_path) == ["net.py"]


def test_sources_that_cannot_be(refused, tmp_path):
    out = tmp_path / "plain.pt2"
    assert "did you mean repvgg_a0" in refused("collapse", "repvgg:repvgg_a00", out)
    assert "There is no file" in refused("collapse", f"{tmp_path}/none.py:make", out)
