"""Every target that runs here: equal to the source, and a changed file is caught.

Only ONNX Runtime and PyTorch are installed with '.[dev]'; the other targets are tested where their package is.
"""

import json
import struct
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.deploy import load_runner
from repvgg.deploy.comparison_images import border_images
from repvgg.deploy.file_target import FileSpec, compare
from repvgg.deploy.loading import run_in_parts
from repvgg.deploy.preprocessing import KEY, Preprocessing
from repvgg.deploy.targets import TARGETS, ExportRequest, check_files_beside, export, target_module
from repvgg.errors import EquivalenceError, ExportError, OutputExistsError, RepvggError, UnsupportedError, UsageError

SHAPE = (3, 17, 15)
STATISTICS = Preprocessing((0.4, 0.5, 0.3), (0.2, 0.25, 0.3), SHAPE[1:], tuple("abcde"))
RUN_HERE = [name for name, target in TARGETS.items() if target.runtime and target.suffix]


def targets(names=RUN_HERE, fast=("torchscript",)):
    """The targets as parameters; those that take seconds each are slow, and those without their package are skipped."""
    found = []
    for name in names:
        missing = TARGETS[name].missing_package()
        marks = [pytest.mark.skipif(missing is not None, reason=f"{missing} is not installed")]
        if name not in fast:
            marks.append(pytest.mark.slow)
        found.append(pytest.param(name, marks=marks))
    return found


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, 1, 2, dilation=2, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).eval()


def pixels():
    return 255 * torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))


def request(name, folder, **changed):
    images = pixels() if changed.get("with_preprocessing") else STATISTICS.apply(pixels())
    given = {
        "reference": network(),
        "plain": network(),
        "out": folder / f"model{TARGETS[name].suffix}",
        "input_shape": SHAPE,
        "images": [images],
        "notes": {"source": 'a test <&">'},
        "preprocessing": STATISTICS,
    }
    return ExportRequest(**{**given, **changed})


@pytest.mark.parametrize("name", targets(fast=("onnx", "pt2", "torchscript")))
def test_is_equal_in_its_runtime_and_says_how_pixels_become_inputs(tmp_path, name):
    done = export(name, request(name, tmp_path))
    assert done.evidence.passed
    assert (done.evidence.samples, done.photographs.samples) == (9, 4)
    assert done.evidence.batches == (3 if TARGETS[name].dynamic_batch else 9)
    assert "roundings" in done.evidence.tolerance_origin
    assert done.inventory.violations == ()
    runner = load_runner(done.path)
    assert len(runner.inputs) == len(runner.outputs) == 1
    assert tuple(done.outputs) == tuple(runner.outputs)
    assert runner.input_shape == (None if TARGETS[name].dynamic_batch else 1, *SHAPE)
    assert runner.notes["source"] == 'a test <&">'
    about = json.loads(runner.notes[KEY])
    assert (about["mean"], about["std"]) == (list(STATISTICS.mean), list(STATISTICS.std))
    assert (about["size"], about["classes"], about["in_graph"]) == ([17, 15], list("abcde"), False)
    images = STATISTICS.apply(pixels())
    with torch.no_grad():
        assert_close(run_in_parts(runner, images), network()(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", targets())
def test_swapped_input_channels_are_caught(tmp_path, name):
    swapped = network()
    with torch.no_grad():
        swapped[0].weight.copy_(swapped[0].weight[:, [2, 1, 0]])
    with pytest.raises(EquivalenceError):
        export(name, request(name, tmp_path, plain=swapped))
    assert list(tmp_path.iterdir()) == []


def flip(folder, weight):
    """Flip the lowest bit of the exponent of a weight, wherever it is stored in the files; return whether it was."""
    stored = struct.pack("<f", weight)
    flipped = bytes([stored[0], stored[1], stored[2] ^ 0x80, stored[3]])
    found = False
    for file in folder.iterdir():
        content = file.read_bytes()
        if stored in content:
            file.write_bytes(content.replace(stored, flipped))
            found = True
    return found


@pytest.mark.parametrize("name", targets())
def test_a_flipped_bit_in_the_weights_is_caught(tmp_path, name):
    module, model = target_module(name), network()
    path = tmp_path / f"model{TARGETS[name].suffix}"
    spec = FileSpec(SHAPE, TARGETS[name].dynamic_batch)
    module.write(model, path, spec)
    images = torch.cat([*border_images(SHAPE, STATISTICS, pixels=False), STATISTICS.apply(pixels())])
    batches = [images] if spec.dynamic_batch else list(images.split(1))
    assert compare(model, module.load(path), batches, "float32").passed
    weight = float(model[6].weight.detach().flatten()[3])
    assert flip(tmp_path, weight)
    # Formats with a checksum refuse the file; the others compute something else.
    with pytest.raises((EquivalenceError, ExportError)):
        compare(model, module.load(path), batches, "float32")


@pytest.mark.parametrize("name", targets())
def test_preprocessing_in_the_graph_takes_pixels(tmp_path, name):
    done = export(name, request(name, tmp_path, with_preprocessing=True))
    assert done.photographs.passed
    runner = load_runner(done.path)
    about = json.loads(runner.notes[KEY])
    assert (about["in_graph"], about["mean"]) == (True, list(STATISTICS.mean))
    with torch.no_grad():
        expected = network()(STATISTICS.apply(pixels()))
    assert_close(run_in_parts(runner, pixels()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", targets())
def test_float16(tmp_path, name):
    done = export(name, request(name, tmp_path, precision="float16"))
    assert done.evidence.dtype == "float16"
    # Weights or activations are rounded: closer than float16 would mean that they are not.
    assert 1e-5 < done.evidence.relative < done.evidence.tolerance
    assert load_runner(done.path).dtype is torch.float32


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


@pytest.mark.parametrize("name", [*targets(), *targets(["coreml", "tensorrt"])])
def test_a_sum_of_branches_is_in_the_inventory(tmp_path, name):
    torch.manual_seed(0)
    model = Residual().eval()
    done = export(name, request(name, tmp_path, reference=model, plain=model))
    assert len(done.inventory.sums) == 1
    assert done.inventory.norms == ()


@pytest.mark.slow
@pytest.mark.skipif(TARGETS["coreml"].missing_package() is not None, reason="coremltools is not installed")
def test_core_ml_is_converted_and_its_weights_are_read_back(tmp_path, monkeypatch):
    done = export("coreml", request("coreml", tmp_path))
    assert (done.evidence, done.photographs) == (None, None)
    assert done.remarks[-1] == "converted, not run: Core ML predicts on macOS only."
    assert (done.path / "Manifest.json").is_file()
    other = network(1)
    found, total = target_module("coreml")._weights_in(done.path, other, torch.float32)
    assert (found, total) == (0, 2)
    tools = pytest.importorskip("coremltools")
    model = tools.models.MLModel(str(done.path), skip_model_load=True)
    assert json.loads(model.user_defined_metadata[f"repvgg.{KEY}"])["classes"] == list("abcde")


@pytest.mark.slow
def test_tensorrt_is_an_onnx_file_that_was_not_run_there(tmp_path):
    done = export("tensorrt", request("tensorrt", tmp_path))
    command, ran = done.remarks
    assert "trtexec --onnx=model.onnx --stronglyTyped" in command
    assert "--maxShapes=image:32x3x17x15" in command
    assert ran == "converted, not run: TensorRT needs an NVIDIA GPU."
    assert done.evidence.passed  # in ONNX Runtime


def test_litert_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UnsupportedError, match="requires an older PyTorch"):
        export("litert", request("litert", tmp_path))


class TakesOne(nn.Module):
    """A model that cannot be captured for any number of images."""

    def forward(self, x):
        if len(x) != 1:
            raise ValueError("one image only")
        return x.mean((2, 3))


def test_a_model_of_one_image_is_exported_so_and_the_reason_is_told(tmp_path):
    done = export("torchscript", request("torchscript", tmp_path, reference=TakesOne(), plain=TakesOne(), images=()))
    assert done.contents == "one image at a time of 3 x 17 x 15, float32"
    assert "one image only" in done.remarks[-1]
    assert done.evidence.batches == 9


def test_a_model_that_cannot_be_exported_leaves_no_file(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError):
        export("pt2", request("pt2", tmp_path, reference=Broken(), plain=Broken()))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("repvgg.deploy.targets.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RepvggError, match=r"needs 'openvino'|needs 'onnx'.*pip install 'repvgg\[openvino\]'"):
        export("openvino", request("openvino", tmp_path))


def test_files_of_nothing_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is no exported file"):
        load_runner(tmp_path / "model.safetensors")
    for suffix in (".pt2", ".torchscript", ".onnx", ".ort"):
        (tmp_path / f"a{suffix}").write_bytes(b"nothing")
        with pytest.raises(ExportError):
            load_runner(tmp_path / f"a{suffix}")


@pytest.mark.parametrize(("name", "other"), [("ncnn", "m.xml"), ("openvino", "m.param")])
def test_weights_of_another_export_are_not_replaced(tmp_path, monkeypatch, name, other):
    monkeypatch.setattr("repvgg.deploy.targets.importlib.util.find_spec", lambda name: object())
    out = tmp_path / f"m{TARGETS[name].suffix}"
    check_files_beside(name, out)
    weights = tmp_path / "m.bin"
    weights.write_bytes(b"weights")
    with pytest.raises(OutputExistsError, match="something else"):
        check_files_beside(name, out, overwrite=True)
    out.touch()
    with pytest.raises(OutputExistsError, match="add --overwrite"):
        check_files_beside(name, out)
    check_files_beside(name, out, overwrite=True)
    (tmp_path / other).touch()
    with pytest.raises(OutputExistsError, match=rf"weights of '{other}'.* such as 'm\.{name}\.") as raised:
        export(name, request(name, tmp_path, out=out, overwrite=True))
    assert str(raised.value).count(". ") == 0
    check_files_beside(name, tmp_path / f"m.{name}{out.suffix}")  # the name that it advises
    assert weights.read_bytes() == b"weights"


def test_the_table_imports_no_runtime():
    # In a process of its own: other tests import them.
    import subprocess

    code = (
        "import sys, repvgg.deploy.targets; print([m for m in ('onnxruntime', 'openvino', 'ncnn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
