"""Load an exported file, .onnx or .pt2, as a function of images with what is known about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from repvgg.checkpoints import Metadata
from repvgg.deploy.onnx import OnnxRunner
from repvgg.deploy.torch_export import ProgramRunner
from repvgg.errors import ExportError, first_line

PROGRAM_SUFFIXES = (".onnx", ".pt2")


@final
@dataclass(frozen=True, eq=False)
class LoadedProgram:
    """An exported classifier: ``logits = program(images)``, float32 (N, C, H, W) → (N, K) for any N.

    Attributes:
        runner: the file in its runtime.
        runtime: ``onnxruntime`` or ``torch``.
        metadata: the header of the checkpoint that it was converted from, or what the shapes tell.
    """

    runner: OnnxRunner | ProgramRunner
    runtime: str
    metadata: Metadata

    def __call__(self, images: Tensor) -> Tensor:
        batch = self.runner.input_shape[0]
        if batch is None:
            logits: Tensor = self.runner(images)
            return logits
        # The file has a fixed batch size: fill the last batch with zeros.
        parts = []
        for part in torch.split(images, batch):
            missing = batch - len(part)
            full = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            parts.append(self.runner(full)[: len(part)])
        return torch.cat(parts)


def load_program(path: str | os.PathLike[str], *, threads: int | None = None) -> LoadedProgram:
    """Load an exported classifier of square images, written by this library or another one.

    A ``.pt2`` file is a program: load only files that you trust.

    Args:
        path: ends in .onnx or .pt2.
        threads: of ONNX Runtime; None leaves the number to it.

    Raises:
        ExportError: the file cannot be loaded, or is not a classifier of images with 1 or 3 channels, equal height and
            width.
        CheckpointError: its header is broken.
        MissingDependencyError: onnxruntime is not installed.
    """
    file = Path(path)
    is_onnx = file.suffix == ".onnx"
    runner = OnnxRunner(file, threads) if is_onnx else ProgramRunner(file)
    shape = runner.input_shape
    channels, height, width = shape[1:] if len(shape) == 4 else (None,) * 3
    metadata = Metadata.from_header(runner.notes, str(file))
    size = height or (metadata.input_size if metadata else None)
    if channels not in (1, 3) or size is None or height != width:
        axes = ", ".join("N" if axis is None else str(axis) for axis in shape)
        raise ExportError(f"{str(file)!r} takes a tensor of shape ({axes}), not square images of 1 or 3 channels.")
    images = torch.zeros(shape[0] or 1, channels, size, size)
    try:
        logits = runner(images)
    except Exception as error:  # a program may have several inputs, or have been exported for another device
        raise ExportError(f"{str(file)!r} cannot run on images of {size} x {size}: {first_line(error)}.") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"{len(logits)} tensors"
        raise ExportError(f"{str(file)!r} returns {what}, not logits of classes.")
    known = metadata or Metadata(file.name, "plain", logits.shape[1], channels, size)
    if (known.num_classes, known.in_channels) != (logits.shape[1], channels):
        raise ExportError(f"{str(file)!r} has a header that does not fit the program: export it again.")
    return LoadedProgram(runner, "onnxruntime" if is_onnx else "torch", known)
