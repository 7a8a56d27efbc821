"""ONNX, run in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.onnx import OnnxRunner, export_onnx
from repvgg.deploy.targets import Exported, ExportRequest


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Write a model; the notes become ``metadata_props``."""
    done = export_onnx(
        spec.in_precision(model),
        path,
        inputs=spec.example,
        overwrite=True,
        dynamic_batch=spec.dynamic_batch,
        notes=spec.notes,
    )
    return Written(done.inventory, None)


def load(path: Path, threads: int | None = None) -> OnnxRunner:
    """Open a file."""
    return OnnxRunner(path, threads)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("onnx", request, write, load)
