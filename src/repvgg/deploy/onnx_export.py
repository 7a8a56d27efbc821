"""Export to ONNX: one checked file, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg._files import atomic_write, check_output
from repvgg.deploy import onnx_graph
from repvgg.deploy.exporting import check_image_shape, example_input, first_line, silence
from repvgg.errors import ExportError, require

INPUT = "image"
OUTPUT = "logits"
_LARGEST = 2**31 - 2**20  # bytes: a protobuf message ends at 2 GiB, and the graph around the weights needs a little


@final
@dataclass(frozen=True)
class OnnxExport:
    """An ONNX file that was written and checked.

    Attributes:
        path: the file.
        opset: version of the default operator set.
        operators: number of nodes of each type, the most frequent first.
        violations: what :meth:`plain_violations` returns.
    """

    path: Path
    opset: int
    operators: Mapping[str, int]
    violations: tuple[str, ...] = field(repr=False)

    def plain_violations(self) -> tuple[str, ...]:
        """The nodes that a plain network does not have: batch norms and sums of two activations; empty if plain."""
        return self.violations


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    *,
    overwrite: bool = False,
    dynamic_batch: bool = True,
) -> OnnxExport:
    """Write ``model``, as it computes in eval mode, to one ONNX file from ``image`` (N, C, H, W) to ``logits``.

    The file is checked (``onnx.checker``, with shape inference) under a temporary name and then renamed: whatever
    happens, there is a whole file at ``path`` or none. The model comes back as it was, in its modes
    too. The exporter folds each batch norm that follows a convolution into it; one on a branch of its own stays.

    Args:
        model: any module from one tensor to one tensor that ``torch.export`` can capture.
        path: where to write; its folder must exist.
        input_shape: (C, H, W) of one image. Height and width are fixed in the file.
        overwrite: replace a file at ``path``.
        dynamic_batch: leave N open; otherwise it is 1.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is not set.
        OutputError: no such folder, or the file cannot be written.
        UsageError: ``input_shape`` is not three positive numbers.
        ExportError: a model that cannot be captured, one of 2 GiB or more, or a file that fails its check.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    target = check_output(path, overwrite=overwrite)
    _check_model(model, input_shape)
    checker = require("onnx").checker
    proto = _capture(model, example_input(model, input_shape, 2 if dynamic_batch else 1), dynamic_batch)
    with atomic_write(target, overwrite=overwrite) as part:
        part.write_bytes(proto.SerializeToString())
        try:
            checker.check_model(str(part), full_check=True)
        except checker.ValidationError as error:
            raise ExportError(f"The exported graph is not valid ONNX: {first_line(error)}") from error
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    return OnnxExport(target, opset, onnx_graph.operators(proto.graph), onnx_graph.plain_violations(proto.graph))


def _check_model(model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    check_image_shape(input_shape)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > _LARGEST:
        raise ExportError(f"The model holds {size / 2**30:.1f} GiB, and one ONNX file holds less than 2 GiB.")


def _capture(model: nn.Module, example: Tensor, dynamic_batch: bool) -> Any:
    """The model as an ``onnx.ModelProto``."""
    require("onnxscript")
    try:
        with eval_mode(model), silence():
            program = torch.onnx.export(
                model,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: "batch"},) if dynamic_batch else None,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ExportError(
            f"The model cannot be exported for an image of {tuple(example.shape[1:])}: {reason}"
        ) from error
    assert program is not None
    outputs = len(program.model_proto.graph.output)
    if outputs != 1:
        raise ExportError(f"The model returns {outputs} tensors: only models that return one can be exported.")
    return program.model_proto
