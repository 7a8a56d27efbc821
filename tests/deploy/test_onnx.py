import copy
import stat

import onnx
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.errors import ExportError, OutputError, OutputExistsError, UsageError
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage, create_model
from tests.bn_statistics import trained_like

TINY = ModelSpec("tiny", Stage(1, 4), (Stage(2, 8),), auxiliary=(0,))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the plain model of the quickstart and its ONNX file."""
    torch.manual_seed(0)
    model = create_model("repvgg_t0", num_classes=10, in_channels=1, plain=True)
    return model, export_onnx(model, tmp_path_factory.mktemp("plain") / "plain.onnx", (1, 32, 32))


def test_plain_graph_has_no_violations(plain):
    _, export = plain
    assert export.operators == {"Conv": 7, "Relu": 7, "ReduceMean": 1, "Reshape": 1, "Gemm": 1}
    assert list(export.operators.values()) == [7, 7, 1, 1, 1]
    assert export.plain_violations() == ()


def test_file_matches_its_description(plain):
    _, export = plain
    proto = onnx.load(export.path)
    onnx.checker.check_model(proto, full_check=True)
    assert [value.name for value in proto.graph.input] == ["image"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.opset_import[0].version == export.opset
    assert [path.name for path in export.path.parent.iterdir()] == ["plain.onnx"]  # no external weights
    assert stat.S_IMODE(export.path.stat().st_mode) & 0o400


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [None, 1])
def test_output_equals_torch(plain, batch, threads):
    model, export = plain
    runner = OnnxRunner(export.path, threads)
    assert runner.input_shape == (None, 1, 32, 32)
    assert runner.dtype == torch.float32
    x = torch.randn(batch, 1, 32, 32)
    with torch.no_grad():
        assert_close(runner(x), model.eval()(x), atol=1e-5, rtol=1e-4)


def test_branches_of_the_train_form_are_violations(tmp_path):
    torch.manual_seed(0)
    model = trained_like(create_model("repvgg_t0", num_classes=10, in_channels=1))
    export = export_onnx(model, tmp_path / "train.onnx", (1, 32, 32))
    found = export.plain_violations()
    assert sum("is a batch norm" in text for text in found) == export.operators["BatchNormalization"] == 3
    assert sum(" sums " in text for text in found) == export.operators["Add"] == 10
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        assert_close(OnnxRunner(export.path)(x), model.eval()(x), atol=1e-4, rtol=1e-4)


def test_squeeze_excite_is_no_violation(tmp_path):
    spec = ModelSpec("gated", Stage(1, 4), (Stage(1, 8),), squeeze_excite=SqueezeExciteSpec("after_relu", 2))
    model = create_model(spec, num_classes=3, plain=True)
    assert export_onnx(model, tmp_path / "gated.onnx", (3, 8, 8)).plain_violations() == ()


def test_adding_a_constant_is_no_violation(tmp_path):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x):
            return x + self.shift

    class Residual(nn.Module):
        def forward(self, x):
            return x.relu() + x

    shifted = export_onnx(Shifted(), tmp_path / "shifted.onnx", (3, 4, 4))
    assert (dict(shifted.operators), shifted.plain_violations()) == ({"Add": 1}, ())
    residual = export_onnx(Residual(), tmp_path / "residual.onnx", (3, 4, 4))
    assert residual.plain_violations() == ("Add node_add sums relu and image",)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_odd_sizes_fixed_batch_and_dtypes(tmp_path, dtype, tolerance):
    model = trained_like(create_model(TINY, num_classes=3, in_channels=2)).to(dtype).eval()
    export = export_onnx(model, tmp_path / "tiny.onnx", (2, 11, 7), dynamic_batch=False)
    runner = OnnxRunner(export.path)
    assert (runner.input_shape, runner.dtype) == ((1, 2, 11, 7), dtype)
    x = torch.randn(1, 2, 11, 7, dtype=dtype)
    assert_close(runner(x), model(x).detach(), atol=tolerance, rtol=tolerance)
    with pytest.raises(UsageError, match=r"\(1, 2, 11, 7\)"):
        runner(torch.randn(2, 2, 11, 7, dtype=dtype))


def test_unsupported_operator_is_one_sentence(tmp_path):
    export = export_onnx(nn.Conv2d(1, 1, 1).double(), tmp_path / "double.onnx", (1, 4, 4))
    with pytest.raises(ExportError, match="Could not find an implementation for Conv"):
        OnnxRunner(export.path)


def test_model_and_random_state_are_unchanged(tmp_path, capfd):
    model = create_model(TINY, num_classes=3).train()
    model.stem.eval()
    modes, before = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    export_onnx(model, tmp_path / "tiny.onnx", (3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_existing_file_is_replaced_only_with_overwrite(tmp_path):
    path, model = tmp_path / "model.onnx", create_model(TINY, num_classes=3, plain=True)
    path.write_text("precious")
    with pytest.raises(OutputExistsError, match=r"model\.onnx"):
        export_onnx(model, path, (3, 8, 8))
    assert path.read_text() == "precious"
    export_onnx(model, path, (3, 8, 8), overwrite=True)
    assert OnnxRunner(path).input_shape == (None, 3, 8, 8)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError])
def test_failed_export_leaves_no_files(tmp_path, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    path = tmp_path / "model.onnx"
    path.write_text("precious")
    monkeypatch.setattr("onnx.checker.check_model", fail)
    model = create_model(TINY, num_classes=3, plain=True)
    with pytest.raises(OutputError if isinstance(failure, OSError) else failure):
        export_onnx(model, path, (3, 8, 8), overwrite=True)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"model.onnx": "precious"}
    assert model.training


def test_invalid_graph_is_rejected(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise onnx.checker.ValidationError("node without output\nand more")

    monkeypatch.setattr("onnx.checker.check_model", fail)
    with pytest.raises(ExportError, match=r"node without output\.$"):
        export_onnx(create_model(TINY, 3, plain=True), tmp_path / "model.onnx", (3, 8, 8))
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_unsupported_models_are_rejected(tmp_path, capfd):
    with pytest.raises(ExportError, match="cannot be exported"):
        export_onnx(Branching(), tmp_path / "model.onnx", (3, 8, 8))
    with pytest.raises(ExportError, match="expected input"):
        export_onnx(create_model(TINY, 3, plain=True), tmp_path / "model.onnx", (4, 8, 8))
    with pytest.raises(ExportError, match=r"4\.0 GiB"):
        export_onnx(nn.Linear(2**15, 2**15, device="meta"), tmp_path / "model.onnx", (3, 8, 8))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_unwritable_paths_are_rejected(tmp_path):
    model = create_model(TINY, 3, plain=True)
    with pytest.raises(OutputError, match="no folder"):
        export_onnx(model, tmp_path / "missing" / "model.onnx", (3, 8, 8))
    with pytest.raises(OutputExistsError, match="is a folder"):
        export_onnx(model, tmp_path, (3, 8, 8), overwrite=True)


@pytest.mark.parametrize("shape", [(3, 8), (3, 0, 8)])
def test_invalid_shapes_are_rejected(tmp_path, shape):
    with pytest.raises(UsageError, match="C, H, W"):
        export_onnx(create_model(TINY, 3, plain=True), tmp_path / "model.onnx", shape)
