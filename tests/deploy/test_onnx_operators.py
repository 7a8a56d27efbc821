"""Pooling and interpolation in ONNX files: few nodes, and exact in two runtimes."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.deploy.onnx_operators import pooling_matrix
from repvgg.models import PSPNetSpec
from repvgg.models.backbones import build_pspnet

BATCHES = (1, 3)


class Pools(nn.Module):
    """Adaptive pools to grids that do and do not divide the image, each interpolated to its size."""

    grids = (1, 2, 3, (6, 5), (None, 4), (7, 30))

    def forward(self, x):
        pooled = [F.adaptive_avg_pool2d(x, grid) for grid in self.grids]
        size = x.shape[-2:]
        corners = [F.interpolate(p, size, mode="bilinear", align_corners=True) for p in pooled]
        centres = [F.interpolate(p, size, mode="bilinear", align_corners=False) for p in pooled]
        return torch.cat([*corners, *centres, F.interpolate(x, scale_factor=1.5, mode="bilinear")[..., :24, :30]], 1)


def openvino_runner(path):
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def assert_file_equals(model, path, shape, runtime):
    run = OnnxRunner(path) if runtime == "onnxruntime" else openvino_runner(path)
    for batch in BATCHES:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model.double()(x.double())
        model.float()
        error = (run(x) - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max(), (batch, error)


@pytest.mark.parametrize(("size", "cells"), [(20, 6), (7, 7), (5, 8), (713 // 8 + 1, 6), (9, 1), (1, 3)])
def test_pooling_matrix_is_adaptive_pooling(size, cells):
    x = torch.randn(4, size, dtype=torch.float64)
    expected = F.adaptive_avg_pool1d(x, cells)
    torch.testing.assert_close(x @ torch.from_numpy(pooling_matrix(size, cells)).T, expected, rtol=0, atol=1e-14)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    model = Pools().eval()
    return model, export_onnx(model, tmp_path_factory.mktemp("pools") / "pools.onnx", (2, 24, 30))


def test_nodes_of_pools_and_interpolations(pools):
    _, export = pools
    # 2 and 3 divide both sides, and (6, 5) does; a column of (None, 4) and a row of (7, 30) need matrices.
    expected = {"Resize": 13, "MatMul": 4, "AveragePool": 3, "ReduceMean": 1, "Concat": 1, "Slice": 2}
    assert {name: count for name, count in export.operators.items() if name in expected} == expected
    assert not {"Gather", "GatherND", "Shape", "Add"} & export.operators.keys()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_pools_and_interpolations_are_exact(pools, runtime):
    model, export = pools
    assert_file_equals(model, export.path, (2, 24, 30), runtime)


def test_exporter_alone_gathers_the_pixels_of_each_cell(tmp_path, monkeypatch):
    model = nn.AdaptiveAvgPool2d(6)
    here = export_onnx(model, tmp_path / "here.onnx", (1, 20, 25)).operators
    monkeypatch.setattr("repvgg.deploy.onnx.translations", dict)
    alone = export_onnx(model, tmp_path / "alone.onnx", (1, 20, 25)).operators
    assert here == {"MatMul": 2}
    assert {"Gather", "GatherND"} & alone.keys()  # if this fails, the exporter has become better than it was


@pytest.fixture(scope="module", params=["dilated", pytest.param("by phases", marks=pytest.mark.slow)])
def pspnet(request, tmp_path_factory):
    """A plain PSPNet with feature maps of 19 x 21 pixels, which dilations of 2 and 4 do not divide, and its file."""
    torch.manual_seed(0)
    spec = PSPNetSpec("tiny", "repvgg_t0", head_channels=16, auxiliary_channels=8, output_stride=2)
    model = build_pspnet(spec, 5, plain=True).eval()
    network = model if request.param == "dilated" else repvgg.dilate_by_phases(model)[0]
    path = tmp_path_factory.mktemp("pspnet") / "pspnet.onnx"
    return model, export_onnx(network, path, (3, 37, 41)), request.param


def test_nodes_of_a_pspnet(pspnet):
    _, export, form = pspnet
    expected = Counter(MatMul=6, Resize=5, ReduceMean=1)
    assert {name: export.operators[name] for name in expected} == expected
    assert not {"Gather", "GatherND", "Shape", "Add"} & export.operators.keys()
    # Unequal phases are batches of their own: 3 more copies of 6 dilated layers at each of two dilations.
    assert export.operators["Conv"] == (13 if form == "dilated" else 25)
    assert export.plain_violations() == ()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_pspnet_is_exact(pspnet, runtime):
    model, export, _ = pspnet
    assert_file_equals(model, export.path, (3, 37, 41), runtime)
