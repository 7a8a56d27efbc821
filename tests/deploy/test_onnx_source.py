import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.deploy import OnnxRunner, export_onnx, load_runner
from repvgg.deploy.onnx_source import _compare, export_onnx_file, write_without_rounding
from repvgg.deploy.preprocessing import KEY
from repvgg.deploy.qdq import export_qdq
from repvgg.errors import EquivalenceError, ExportError, UsageError, require
from tests.deploy.test_targets import SHAPE, STATISTICS, network


@pytest.fixture(scope="module")
def images():
    return STATISTICS.apply(255 * torch.rand(32, *SHAPE, generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    export_qdq(repvgg.quantize(network(), images)[0], path, SHAPE, notes={KEY: STATISTICS.note()})
    return path


def test_without_rounding_it_is_the_network_with_rounded_weights(tmp_path, quantized, images):
    write_without_rounding(quantized, tmp_path / "float.onnx")
    graph = require("onnx", "onnx").load(str(tmp_path / "float.onnx")).graph
    assert not any(node.op_type == "QuantizeLinear" for node in graph.node)
    rounded, exact = (OnnxRunner(path)(images) for path in (tmp_path / "float.onnx", quantized))
    with torch.no_grad():
        expected = network()(images)
    assert_close(rounded, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    assert not torch.equal(rounded, exact)


def test_a_quantized_file_becomes_ort(tmp_path, quantized, images):
    done = export_onnx_file("ort", quantized, tmp_path / "int8.ort")
    assert done.contents == "any number of images of 3 x 17 x 15, quantized to 8 bits"
    assert "4 times the error of its own rounding" in done.remarks[-1]
    runner = load_runner(tmp_path / "int8.ort")
    assert runner.notes[KEY] == STATISTICS.note()
    assert_close(runner(images), OnnxRunner(quantized)(images), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_another_network_is_caught(tmp_path, quantized, images):
    swapped = copy.deepcopy(network())
    with torch.no_grad():
        swapped[0].weight.copy_(-swapped[0].weight)
    export_qdq(repvgg.quantize(swapped, images)[0], tmp_path / "other.onnx", SHAPE)
    with pytest.raises(EquivalenceError, match="times the error of its own rounding"):
        _compare(OnnxRunner(quantized, optimize=False), OnnxRunner(tmp_path / "other.onnx"), quantized=True)


@pytest.mark.slow
def test_tensorrt_takes_float_files_and_refuses_unsigned_integers(tmp_path, quantized):
    with pytest.raises(ExportError, match="symmetric int8 only"):
        export_onnx_file("tensorrt", quantized, tmp_path / "trt.onnx")
    export_onnx(network(), tmp_path / "float.onnx", SHAPE)
    done = export_onnx_file("tensorrt", tmp_path / "float.onnx", tmp_path / "trt.onnx")
    assert done.remarks[-1] == "converted, not run: TensorRT needs an NVIDIA GPU."


@pytest.mark.slow
def test_other_targets_take_no_onnx_file(tmp_path, quantized):
    with pytest.raises(UsageError, match="takes a network, not an ONNX file"):
        export_onnx_file("pt2", quantized, tmp_path / "a.pt2")
    double = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    export_onnx(double, tmp_path / "flat.onnx", inputs=torch.zeros(2, 4))
    with pytest.raises(ExportError, match="does not take one batch of images"):
        export_onnx_file("ort", tmp_path / "flat.onnx", tmp_path / "a.ort")
    assert not (tmp_path / "a.ort").exists()
