"""ONNX: export a model to one checked file, count what its graph holds, and run it in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._arguments import check_model
from repvgg._calls import Call, Inputs
from repvgg._contexts import eval_mode
from repvgg._files import atomic_write, check_output
from repvgg.deploy.flat import FlatModule
from repvgg.deploy.inventory import Inventory, Kinds, Operation, take_inventory
from repvgg.deploy.onnx_operators import translations
from repvgg.deploy.qdq_operators import qdq_translations
from repvgg.deploy.targets import axes_in_words
from repvgg.deploy.torch_export import ENGINE_OPERATOR, NOT_PORTABLE, batch_axes, example_call, silence, text_of
from repvgg.errors import ExportError, UsageError, first_line, require

# Shape and Size depend on the shape of their input, not on its values: their results are constants.
# FusedConv of ONNX Runtime adds its fourth input, where it has one.
_KINDS = Kinds(norms={"BatchNormalization"}, sums={"Add", "Sum", "FusedConv"}, shapes={"Shape", "Size"})
_MAX_BYTES = 2**31 - 2**20  # a protobuf message is limited to 2 GiB; 1 MiB is left for the graph around the weights


@final
@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file that was written and checked.

    Attributes:
        path: the file.
        opset: version of the default operator set.
        inventory: of its graph.
    """

    path: Path
    opset: int
    inventory: Inventory = field(repr=False)

    @property
    def operators(self) -> Mapping[str, int]:
        """Number of nodes of each type, the most frequent first."""
        return self.inventory.operators

    def plain_violations(self) -> tuple[str, ...]:
        """Return the nodes that a plain network does not have: batch norms and sums of two activations."""
        return self.inventory.violations


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int] | None = None,
    *,
    inputs: Inputs | Call | None = None,
    overwrite: bool = False,
    dynamic_batch: bool = True,
    notes: Mapping[str, str] | None = None,
) -> OnnxExport:
    """Write ``model``, as it computes in eval mode, to one ONNX file from ``image`` (N, C, H, W) to ``logits``.

    A model with several inputs or outputs, in containers of any kind, becomes a graph from named tensors to named
    tensors: ``output['boxes'][0]`` is called ``boxes_0``, and an input after the parameter of the forward.

    The file is checked (``onnx.checker``, with shape inference) under a temporary name and then renamed, so a file at
    ``path`` is always complete and valid. The model is not changed. The exporter folds each batch norm that follows a
    convolution into it; a batch norm that is a branch by itself remains.

    Args:
        model: any module that ``torch.export`` can capture and that returns a tensor, or several.
        path: the file; its folder must exist.
        input_shape: (C, H, W) of one image. Height and width are fixed in the file.
        inputs: instead, example inputs: a tensor, arguments in order, or arguments by name. Axis 0 counts samples in
            the tensors whose axis 0 is as long as that of the first. All other sizes and arguments are fixed.
        overwrite: replace a file at ``path``.
        dynamic_batch: leave N open; otherwise it is 1.
        notes: texts to store in the file by name, as its ``metadata_props``.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        UsageError: ``input_shape`` is not three positive numbers, or the forward does not take the ``inputs``.
        ExportError: the model does not run on the inputs, cannot be captured or has 2 GiB or more, or the file fails
            its check.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    check_model(model, "export_onnx")
    target = check_output(path, overwrite=overwrite)
    call = example_call(model, input_shape, inputs, dynamic_batch)
    # Checked first: otherwise the serialization fails, after minutes of exporting.
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _MAX_BYTES:
        raise ExportError(f"The model has {size / 2**30:.1f} GiB, but one ONNX file holds less than 2 GiB.")
    checker = require("onnx", "onnx").checker
    proto = _capture(model, call, dynamic_batch)
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
    return OnnxExport(target, opset, graph_inventory(proto.graph))


def _capture(model: nn.Module, call: Call, dynamic_batch: bool) -> Any:
    """Return the model as an ``onnx.ModelProto``."""
    flat = FlatModule(model, call)
    examples = tuple(call.tensors())
    axes = batch_axes(call, "batch") if dynamic_batch else None
    try:
        with eval_mode(model), silence():
            program = torch.onnx.export(
                model if flat.is_plain else flat,
                examples,
                input_names=flat.inputs,
                output_names=flat.outputs,
                dynamic_shapes=axes if flat.is_plain or axes is None else (axes,),
                custom_translation_table=translations() | qdq_translations(),
                dynamo=True,  # through torch.export: the older exporter bakes data-dependent branches into the graph
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        reason = first_line(error.__cause__ or error)  # the outer error is a page of advice on reporting bugs
        reason = NOT_PORTABLE if ENGINE_OPERATOR in reason else reason
        raise ExportError(f"The model cannot be exported for {text_of(call)}: {reason}.") from error
    assert program is not None
    return program.model_proto


def graph_inventory(graph: Any) -> Inventory:
    """Return the operators of an ``onnx.GraphProto``; nodes in subgraphs (loops, conditions) are not examined."""
    operations = [
        Operation(node.op_type, node.name or node.output[0], list(node.input), list(node.output)) for node in graph.node
    ]
    inputs = {value.name for value in graph.input} - {value.name for value in graph.initializer}
    return take_inventory(operations, inputs, _KINDS)


_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
_LOG_ERRORS = 3  # severity levels of ONNX Runtime: 2 is warnings


@final
class OnnxRunner:
    """An ONNX file, loaded in ONNX Runtime on the CPU: ``logits = runner(images)``.

    A file with several inputs takes them in order or by name. One with several outputs returns a dictionary of them.

    Args:
        path: the file.
        threads: intra-op threads; None leaves the number to ONNX Runtime, which uses all physical cores.
        optimize: let the runtime replace nodes by faster ones; otherwise it runs the graph as the file has it.

    Attributes:
        path: the file.
        input_shape: axes of the first input; None where the file leaves one open.
        dtype: of the first input.
        inputs: the axes of each input by name.
        outputs: the names of the outputs.
        notes: the texts that are stored in the file, by name.

    Raises:
        ExportError: the file does not exist, is not valid ONNX, or takes something else than tensors of numbers.
        UsageError: ``threads`` below 1.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None, *, optimize: bool = True) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}.")
        self.path = Path(path)
        self._session = _session(self.path, threads, optimize=optimize)
        inputs = self._session.get_inputs()
        if not inputs or any(one.type not in _DTYPES for one in inputs):
            raise ExportError(f"{str(path)!r} is not a network from tensors of numbers to tensors.")
        self.outputs = tuple(one.name for one in self._session.get_outputs())
        self.inputs = {one.name: tuple(axis if isinstance(axis, int) else None for axis in one.shape) for one in inputs}
        self._dtypes = {one.name: _DTYPES[one.type] for one in inputs}
        self.input_shape = self.inputs[inputs[0].name]
        self.dtype = self._dtypes[inputs[0].name]
        self.notes: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Return the output of the network on the CPU: a tensor, or a dictionary where the file has several outputs.

        Raises:
            UsageError: other inputs than the file has, or one of another shape or dtype than it takes.
        """
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        if given.keys() != self.inputs.keys() or len(args) + len(kwargs) != len(self.inputs):
            raise UsageError(
                f"{str(self.path)!r} takes {', '.join(self.inputs)}, not {len(args) + len(kwargs)} inputs."
            )
        arrays = {name: self._array(name, x) for name, x in given.items()}
        found = [torch.from_numpy(array) for array in self._session.run(list(self.outputs), arrays)]
        return found[0] if len(found) == 1 else dict(zip(self.outputs, found, strict=True))

    def _array(self, name: str, x: Tensor) -> Any:
        shape, dtype = self.inputs[name], self._dtypes[name]
        fits = x.ndim == len(shape) and all(
            expected in (None, axis) for expected, axis in zip(shape, x.shape, strict=True)
        )
        if not fits or x.dtype != dtype:
            expected = axes_in_words(shape)
            which = f"for {name} " if len(self.inputs) > 1 else ""
            raise UsageError(
                f"{str(self.path)!r} takes {which}{dtype} of shape ({expected}), not {x.dtype} of shape "
                f"{tuple(x.shape)}."
            )
        return x.detach().cpu().contiguous().numpy()

    def __repr__(self) -> str:
        return f"OnnxRunner({str(self.path)!r})"


def _session(path: Path, threads: int | None, *, optimize: bool) -> Any:
    runtime = require("onnxruntime", "onnx")
    if not path.is_file():
        raise ExportError(f"There is no file {str(path)!r}: export the model first.")
    options = runtime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise ExportError(f"{str(path)!r} cannot be loaded by ONNX Runtime: {first_line(error)}.") from error
