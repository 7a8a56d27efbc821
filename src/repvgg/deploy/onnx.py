"""ONNX: export a model to one checked file, count what its graph holds, and run it in ONNX Runtime."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg._files import atomic_write, check_output
from repvgg.deploy.torch_export import check_image_shape, example_input, silence
from repvgg.errors import ExportError, UsageError, first_line, require

INPUT = "image"
OUTPUT = "logits"
_MAX_BYTES = 2**31 - 2**20  # a protobuf message is limited to 2 GiB; 1 MiB is left for the graph around the weights


@final
@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file that was written and checked.

    Attributes:
        path: the file.
        opset: version of the default operator set.
        operators: number of nodes of each type, the most frequent first.
        violations: see :meth:`plain_violations`.
    """

    path: Path
    opset: int
    operators: Mapping[str, int]
    violations: tuple[str, ...] = field(repr=False)

    def plain_violations(self) -> tuple[str, ...]:
        """Return the nodes that a plain network does not have: batch norms and sums of two activations."""
        return self.violations


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    *,
    overwrite: bool = False,
    dynamic_batch: bool = True,
    notes: Mapping[str, str] | None = None,
) -> OnnxExport:
    """Write ``model``, as it computes in eval mode, to one ONNX file from ``image`` (N, C, H, W) to ``logits``.

    The file is checked (``onnx.checker``, with shape inference) under a temporary name and then renamed, so a file at
    ``path`` is always complete and valid. The model is not changed. The exporter folds each batch norm that follows a
    convolution into it; a batch norm that is a branch by itself remains.

    Args:
        model: any module from one tensor to one tensor that ``torch.export`` can capture.
        path: the file; its folder must exist.
        input_shape: (C, H, W) of one image. Height and width are fixed in the file.
        overwrite: replace a file at ``path``.
        dynamic_batch: leave N open; otherwise it is 1.
        notes: texts to store in the file by name, as its ``metadata_props``.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        UsageError: ``input_shape`` is not three positive numbers.
        ExportError: the model cannot be captured or has 2 GiB or more, or the file fails its check.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    target = check_output(path, overwrite=overwrite)
    check_image_shape(input_shape)
    # Checked first: otherwise the serialization fails, after minutes of exporting.
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _MAX_BYTES:
        raise ExportError(f"The model has {size / 2**30:.1f} GiB, but one ONNX file holds less than 2 GiB.")
    checker = require("onnx", "onnx").checker
    # Two images for a dynamic batch: torch.export specializes on sizes of 0 and 1.
    proto = _capture(model, example_input(model, input_shape, 2 if dynamic_batch else 1), dynamic_batch)
    for name, text in (notes or {}).items():
        proto.metadata_props.add(key=name, value=text)
    with atomic_write(target, overwrite=overwrite) as part:
        part.write_bytes(proto.SerializeToString())
        try:
            checker.check_model(str(part), full_check=True)
        except checker.ValidationError as error:
            raise ExportError(f"The exported graph is not valid ONNX: {first_line(error)}.") from error
    # The empty domain is that of the standard operators.
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    operators = MappingProxyType(dict(Counter(node.op_type for node in proto.graph.node).most_common()))
    return OnnxExport(target, opset, operators, _plain_violations(proto.graph))


def _capture(model: nn.Module, example: Tensor, dynamic_batch: bool) -> Any:
    """Return the model as an ``onnx.ModelProto``."""
    require("onnxscript", "onnx")  # torch.onnx imports it late and reports its absence in a traceback
    try:
        with eval_mode(model), silence():
            program = torch.onnx.export(
                model,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},) if dynamic_batch else None,
                dynamo=True,  # through torch.export: the older exporter bakes data-dependent branches into the graph
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        reason = first_line(error.__cause__ or error)  # the outer error is a page of advice on reporting bugs
        shape = tuple(example.shape[1:])
        raise ExportError(f"The model cannot be exported for an image of {shape}: {reason}.") from error
    assert program is not None
    outputs = len(program.model_proto.graph.output)
    if outputs != 1:
        raise ExportError(f"The model returns {outputs} tensors: only models that return one can be exported.")
    return program.model_proto


def _plain_violations(graph: Any) -> tuple[str, ...]:
    """Describe the nodes that a plain network does not have.

    These are batch norms, and sums of two activations, that is of two values that both depend on the input of the
    graph; adding a constant is allowed. Nodes in subgraphs (loops, conditions) are not examined.
    """
    activations = {value.name for value in graph.input} - {value.name for value in graph.initializer}
    found = []
    for node in graph.node:
        inputs = [name for name in node.input if name in activations]
        # Shape and Size depend on the shape of their input, not on its values: their results are constants.
        if inputs and node.op_type not in ("Shape", "Size"):
            activations.update(node.output)
        name = f"{node.op_type} {node.name or node.output[0]}"
        if node.op_type == "BatchNormalization":
            found.append(f"{name} is a batch norm")
        if node.op_type in ("Add", "Sum") and len(inputs) > 1:
            found.append(f"{name} sums {' and '.join(inputs)}")
    return tuple(found)


_DTYPES = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16}
_LOG_ERRORS = 3  # severity levels of ONNX Runtime: 2 is warnings


@final
class OnnxRunner:
    """An ONNX file with one input and one output, loaded in ONNX Runtime on the CPU: ``logits = runner(images)``.

    Args:
        path: the file.
        threads: intra-op threads; None leaves the number to ONNX Runtime, which uses all physical cores.

    Attributes:
        path: the file.
        input_shape: axes of the input; None where the file leaves one open.
        dtype: of the input.
        notes: the texts that are stored in the file, by name.

    Raises:
        ExportError: the file does not exist, is not valid ONNX, or has not one input and one output.
        UsageError: ``threads`` below 1.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}.")
        self.path = Path(path)
        self._session = _session(self.path, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type not in _DTYPES:
            raise ExportError(f"{str(path)!r} is not a network from one floating-point tensor to one tensor.")
        self._input, self._output = inputs[0].name, outputs[0].name
        self.input_shape = tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape)
        self.dtype = _DTYPES[inputs[0].type]
        self.notes: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the network on ``x``, on the CPU.

        Raises:
            UsageError: ``x`` has another shape or dtype than the file takes.
        """
        fits = x.ndim == len(self.input_shape) and all(
            expected in (None, axis) for expected, axis in zip(self.input_shape, x.shape, strict=True)
        )
        if not fits or x.dtype != self.dtype:
            expected = ", ".join("N" if axis is None else str(axis) for axis in self.input_shape)
            raise UsageError(
                f"{str(self.path)!r} takes {self.dtype} of shape ({expected}), not {x.dtype} of shape {tuple(x.shape)}."
            )
        (out,) = self._session.run([self._output], {self._input: x.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(out)

    def __repr__(self) -> str:
        return f"OnnxRunner({str(self.path)!r})"


def _session(path: Path, threads: int | None) -> Any:
    runtime = require("onnxruntime", "onnx")
    if not path.is_file():
        raise ExportError(f"There is no file {str(path)!r}: export the model first.")
    options = runtime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise ExportError(f"{str(path)!r} cannot be loaded by ONNX Runtime: {first_line(error)}.") from error
