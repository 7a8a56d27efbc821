"""ONNX Runtime's own format (.ort): an ONNX graph after the runtime's optimizations, for devices and browsers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.formats import onnx
from repvgg.deploy.onnx import OnnxRunner, graph_inventory
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.errors import require

# It rewrites weights into blocks as wide as the vectors of this CPU; another CPU would read them wrongly.
_NOT_PORTABLE = ["NchwcTransformer"]
_LOG_ERRORS = 3


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Write a model through ONNX; the notes stay in the file."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.write(model, source, spec)
        return convert_onnx(source, path, spec.notes)


def convert_onnx(source: Path, path: Path, notes: Mapping[str, str]) -> Written:
    """Convert an ONNX file, float or quantized; its metadata, which holds the notes, is kept."""
    _save_optimized(source, path, ort_format=True)
    with TemporaryDirectory() as folder:
        # The same graph as ONNX, to count its operators.
        optimized = Path(folder) / "optimized.onnx"
        _save_optimized(source, optimized, ort_format=False)
        proto = require("onnx", "onnx").load(str(optimized))
    return Written(graph_inventory(proto.graph), None)


def _save_optimized(source: Path, path: Path, *, ort_format: bool) -> None:
    runtime: Any = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.optimized_model_filepath = str(path)
    if ort_format:
        options.add_session_config_entry("session.save_model_format", "ORT")
    runtime.InferenceSession(
        str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=_NOT_PORTABLE
    )


def load(path: Path, threads: int | None = None) -> OnnxRunner:
    """Open a file."""
    return OnnxRunner(path, threads)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("ort", request, write, load)
