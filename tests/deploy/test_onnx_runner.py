import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.testing import assert_close

from repvgg.deploy import OnnxRunner
from repvgg.errors import ExportError, UsageError


def write(path, inputs=("x",), kind=TensorProto.FLOAT, op="Relu"):
    """Write a graph of one node on inputs of shape (N, 2)."""
    values = [helper.make_tensor_value_info(name, kind, ["N", 2]) for name in inputs]
    out = helper.make_tensor_value_info("y", kind, ["N", 2])
    graph = helper.make_graph([helper.make_node(op, list(inputs), ["y"])], "graph", values, [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_runner_equals_torch(tmp_path):
    runner = OnnxRunner(write(tmp_path / "relu.onnx"))
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [0.5, -2.0]], requires_grad=True)
    assert_close(runner(x), x.detach().relu())
    assert_close(runner(x.detach().T[:, :2].T.contiguous().T), x.detach().T[:, :2].relu())
    assert_close(runner(x[:1]), x.detach()[:1].relu())
    assert repr(runner) == f"OnnxRunner({str(tmp_path / 'relu.onnx')!r})"


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64)])
def test_inputs_of_other_shape_or_dtype_are_rejected(tmp_path, x):
    with pytest.raises(UsageError, match=r"torch.float32 of shape \(N, 2\)"):
        OnnxRunner(write(tmp_path / "relu.onnx"))(x)


def test_invalid_files_are_rejected(tmp_path, capfd):
    (tmp_path / "text.onnx").write_text("not a network")
    (tmp_path / "empty.onnx").touch()
    complete = write(tmp_path / "complete.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(complete[: len(complete) // 2])
    for name in ("text", "empty", "cut"):
        with pytest.raises(ExportError, match=f"{name}.onnx' cannot be loaded"):
            OnnxRunner(tmp_path / f"{name}.onnx")
    for name in ("missing.onnx", "."):
        with pytest.raises(ExportError, match="There is no file"):
            OnnxRunner(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_several_inputs_in_order_and_by_name(tmp_path):
    runner = OnnxRunner(write(tmp_path / "two.onnx", inputs=("a", "b"), op="Sub"))
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -3.0]])
    assert runner.inputs == {"a": (None, 2), "b": (None, 2)}
    for found in (runner(a, b), runner(a, b=b), runner(b=b, a=a)):
        assert_close(found, a - b, rtol=0, atol=0)
    for args, kwargs in (((a,), {}), ((a, b, a), {}), ((a,), {"a": b}), ((a,), {"c": b})):
        with pytest.raises(UsageError, match="takes a, b, not"):
            runner(*args, **kwargs)
    with pytest.raises(UsageError, match=r"takes for b torch\.float32"):
        runner(a, b.double())


def test_inputs_that_are_no_numbers_are_rejected(tmp_path):
    with pytest.raises(ExportError, match="is not a network from tensors of numbers"):
        OnnxRunner(write(tmp_path / "text.onnx", kind=TensorProto.STRING, op="Identity"))


def test_invalid_threads_are_rejected(tmp_path):
    with pytest.raises(UsageError, match="threads must be at least 1, got 0"):
        OnnxRunner(write(tmp_path / "relu.onnx"), threads=0)
