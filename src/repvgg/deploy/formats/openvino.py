"""OpenVINO IR: a description (.xml), and the weights in a file of the same name (.bin)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.formats import onnx
from repvgg.deploy.inventory import Inventory, Kinds, Operation, take_inventory
from repvgg.deploy.openvino import compile_for_cpu, openvino_core
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.errors import ExportError, UsageError, first_line, require

_NOTES = "repvgg"  # section of the runtime information with the notes
_KINDS = Kinds(norms={"BatchNormInference"}, sums={"Add"}, shapes={"ShapeOf"})
_NO_OPERATORS = ("Constant", "Parameter", "Result", "Convert")


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Write a model through ONNX; in float16, the weights are stored so and the CPU computes in float32."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        # Not spec.in_precision(): OpenVINO rounds the weights itself, and leaves activations to the device.
        onnx.write(model, source, FileSpec(spec.shape, spec.dynamic_batch))
        return convert_onnx(source, path, spec.notes, half=spec.precision == "float16")


def convert_onnx(source: Path, path: Path, notes: Mapping[str, str], *, half: bool = False) -> Written:
    """Convert an ONNX file, float or quantized; the notes become runtime information."""
    graph = openvino_core().read_model(str(source))
    for name, text in notes.items():
        graph.set_rt_info(text, [_NOTES, name])
    require("openvino", "openvino").save_model(graph, str(path), compress_to_fp16=half)
    return Written(_inventory(graph), None)


def _inventory(graph: Any) -> Inventory:
    operations = [
        Operation(
            node.get_type_name(),
            node.get_friendly_name(),
            [value.get_source_output().get_node().get_name() for value in node.inputs()],
            [node.get_name()],
        )
        for node in graph.get_ordered_ops()
    ]
    inputs = [node.get_name() for node in graph.get_parameters()]
    found = take_inventory(operations, inputs, _KINDS)
    counted = {kind: count for kind, count in found.operators.items() if kind not in _NO_OPERATORS}
    return Inventory(counted, found.norms, found.sums)


@final
class OpenVinoRunner:
    """An IR file on the CPU, in float32: ``logits = runner(images)``, several outputs as a dictionary.

    See :class:`repvgg.deploy.OnnxRunner` for the attributes.

    Raises:
        ExportError: the file does not exist, or OpenVINO cannot load it.
        MissingDependencyError: openvino is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        core = openvino_core()
        if not path.is_file():
            raise ExportError(f"There is no file {str(path)!r}: export the model first.")
        try:
            graph = core.read_model(str(path))
            self.notes = _read_notes(graph)
            self.inputs = {
                one.get_any_name(): tuple(
                    axis.get_length() if axis.is_static else None for axis in one.get_partial_shape()
                )
                for one in graph.inputs
            }
            self.outputs = tuple(one.get_any_name() for one in graph.outputs)
            self._request = compile_for_cpu(core, graph, threads)
        except RuntimeError as error:
            raise ExportError(f"{str(path)!r} cannot be loaded by OpenVINO: {first_line(error)}.") from error
        self.input_shape = next(iter(self.inputs.values()))
        self.dtype = torch.float32

    def __call__(self, *args: Tensor) -> Any:
        """Return the outputs on the CPU."""
        if len(args) != len(self.inputs):
            raise UsageError(f"{str(self.path)!r} takes {', '.join(self.inputs)}, not {len(args)} inputs.")
        found = self._request.infer([x.detach().contiguous().numpy() for x in args])
        values = [torch.from_numpy(found[index].copy()) for index in range(len(self.outputs))]
        return values[0] if len(values) == 1 else dict(zip(self.outputs, values, strict=True))


def _read_notes(graph: Any) -> dict[str, str]:
    if not graph.has_rt_info([_NOTES]):
        return {}
    return {name: str(value.astype(str)) for name, value in graph.get_rt_info([_NOTES]).astype(dict).items()}


def load(path: Path, threads: int | None = None) -> OpenVinoRunner:
    """Open a file."""
    return OpenVinoRunner(path, threads)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("openvino", request, write, load)
