"""ONNX files that fit TensorRT's strongly typed networks. TensorRT itself needs an NVIDIA GPU and is not run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.formats import onnx
from repvgg.deploy.onnx import OnnxRunner, graph_inventory
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.errors import ExportError, require

_MAX_OPSET = 22  # of TensorRT 10.7 and later
_OPTIMAL_IMAGES, _MOST_IMAGES = 8, 32  # of the command that builds an engine


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Write an ONNX file, and check that TensorRT takes it.

    Raises:
        ExportError: it does not fit.
    """
    written = onnx.write(model, path, spec)
    check_fit(path)
    return Written(written.inventory, None, remarks=(_command(path.name, spec),))


def convert_onnx(source: Path, path: Path, notes: Mapping[str, str]) -> Written:
    """Copy an ONNX file, float or quantized, that TensorRT takes; its metadata holds the notes.

    Raises:
        ExportError: it does not fit.
    """
    check_fit(source)
    shutil.copyfile(source, path)
    return Written(graph_inventory(require("onnx", "onnx").load(str(path)).graph), None)


def check_fit(path: Path) -> None:
    """Check what TensorRT requires of an ONNX file: operators, types, and symmetric quantization to int8.

    Raises:
        ExportError: the file does not fit; the text says why.
    """
    proto = require("onnx", "onnx").load(str(path))
    if problem := next(_problems(proto), None):
        raise ExportError(f"TensorRT does not take this file: {problem}.")


def _problems(proto: Any) -> Iterator[str]:
    onnx_package: Any = require("onnx", "onnx")
    types = onnx_package.TensorProto
    for opset in proto.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            yield f"it has operators of {opset.domain!r}, and only those of ONNX itself are taken"
        elif opset.version > _MAX_OPSET:
            yield f"its operator set is {opset.version}, and {_MAX_OPSET} is the newest that is taken"
    constants = {one.name: one for one in proto.graph.initializer}
    for one in constants.values():
        if one.data_type == types.DOUBLE:
            yield f"{one.name} is in float64: export a float32 network"
    for node in proto.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        zero_point = constants.get(node.input[2])
        if zero_point is None:
            yield f"the zero point of {node.name or node.output[0]} is not a constant"
        elif (
            zero_point.data_type not in (types.INT8, types.INT32)
            or onnx_package.numpy_helper.to_array(zero_point).any()
        ):
            yield (
                f"{node.name or node.output[0]} quantizes to unsigned or shifted integers, and TensorRT takes "
                "symmetric int8 only: export the float network and let TensorRT quantize, or take --to onnx for CPUs"
            )


def _command(name: str, spec: FileSpec) -> str:
    """Return how an engine is built, in a sentence."""
    command = f"trtexec --onnx={name} --stronglyTyped --saveEngine={Path(name).stem}.engine"
    if spec.dynamic_batch:
        size = "x".join(map(str, spec.shape))
        counts = {"min": 1, "opt": _OPTIMAL_IMAGES, "max": _MOST_IMAGES}
        command += "".join(f" --{which}Shapes=image:{count}x{size}" for which, count in counts.items())
    return f"build an engine on the machine that runs it: {command}"


def load(path: Path, threads: int | None = None) -> OnnxRunner:
    """Open a file in ONNX Runtime, which checks the graph but not TensorRT."""
    return OnnxRunner(path, threads)


def export(request: ExportRequest) -> Exported:
    """Export a network; the graph is compared in ONNX Runtime. See :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("tensorrt", request, write, load)
