"""Load an exported file or folder of any target that runs here, as a function of images with what is known about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg.checkpoints import Metadata
from repvgg.deploy.preprocessing import PIXEL_MAX, read_preprocessing
from repvgg.deploy.targets import TARGETS, Runner, axes_in_words, target_module
from repvgg.errors import ExportError, UsageError, first_line

#: Of files that run here. A C library is a folder.
PROGRAM_SUFFIXES = tuple(target.suffix for target in TARGETS.values() if target.runtime and target.suffix)


def target_of(path: str | os.PathLike[str]) -> str | None:
    """Return the name of the target that wrote ``path`` and runs here; None for a checkpoint or anything else."""
    file = Path(path)
    if file.suffix in PROGRAM_SUFFIXES:
        return next(name for name, target in TARGETS.items() if target.runtime and target.suffix == file.suffix)
    if file.suffix == ".so" and file.is_file():
        return "c"
    folders = {name: target.replaceable for name, target in TARGETS.items() if target.runtime and target.is_folder}
    return next((name for name, files in folders.items() if file.is_dir() and any(file.glob(files))), None)


def load_runner(path: str | os.PathLike[str], threads: int | None = None) -> Runner:
    """Open an exported file in its runtime, whatever its inputs and outputs are.

    Files ``.pt2``, ``.torchscript``, ``.pte`` and C libraries are programs: load only files that you trust.

    Raises:
        UsageError: ``path`` is of no target that runs here.
        ExportError: the file does not exist, or its runtime cannot load it.
        MissingDependencyError: the runtime is not installed.
    """
    name = target_of(path)
    if name is None:
        raise UsageError(f"{os.fspath(path)!r} is no exported file: its name ends in {', '.join(PROGRAM_SUFFIXES)}.")
    module = target_module(name)
    runner: Runner = module.load(Path(path), threads)
    return runner


def run_in_parts(runner: Runner, images: Tensor) -> Any:
    """Run images in batches of the size that a file takes, where that is fixed; the last one is filled with zeros."""
    batch = runner.input_shape[0]
    if batch is None or len(images) == batch:
        return runner(images)
    parts: list[Any] = []
    for part in torch.split(images, batch):
        missing = batch - len(part)
        full = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        found = runner(full)
        parts.append(found[: len(part)] if isinstance(found, Tensor) else {k: x[: len(part)] for k, x in found.items()})
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@final
class ExportedModule(nn.Module):
    """An exported file as a module without parameters, for any number of images.

    Attributes:
        runtime: what runs it.
        input_shape: (C, H, W) of an image.

    Raises:
        UsageError: the file does not take one batch of images of a fixed size.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        super().__init__()
        self._runner = load_runner(path, threads)
        name = target_of(path)
        assert name is not None
        self.runtime = _runtime(name)
        shape = self._runner.input_shape
        if len(self._runner.inputs) != 1 or len(shape) != 4 or None in shape[1:]:
            raise UsageError(f"{os.fspath(path)!r} does not take one batch of images of a fixed size.")
        self.input_shape: tuple[int, int, int] = (shape[1] or 0, shape[2] or 0, shape[3] or 0)

    def forward(self, images: Tensor) -> Any:
        return run_in_parts(self._runner, images)


@final
@dataclass(frozen=True, eq=False)
class LoadedProgram:
    """An exported network: float32 (N, C, H, W) → logits (N, K), or (N, K, H, W) of a segmentation network, for any N.

    Attributes:
        runner: the file in its runtime.
        runtime: its name: ``onnxruntime``, ``openvino``, ``torch``, ``executorch``, ``ncnn``, ``repvgg``.
        metadata: the header of the checkpoint that it was converted from, or what the shapes and its notes tell.
        segments: whether it returns the logits of each pixel.
    """

    runner: Runner
    runtime: str
    metadata: Metadata
    segments: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = run_in_parts(self.runner, images)
        return logits


def load_program(path: str | os.PathLike[str], *, threads: int | None = None) -> LoadedProgram:
    """Load an exported classifier or segmentation network of square images, written by this library or another one.

    Args:
        path: see :func:`load_runner`.
        threads: of its runtime; None leaves the number to it.

    Raises:
        ExportError: the file cannot be loaded, or does not map square images of 1 or 3 channels to logits.
        CheckpointError: its header is broken.
        UsageError, MissingDependencyError: as :func:`load_runner`.
    """
    file = Path(path)
    runner = load_runner(file, threads)
    shape = runner.input_shape
    channels, height, width = shape[1:] if len(shape) == 4 else (None,) * 3
    metadata = Metadata.from_header(dict(runner.notes), str(file))
    size = height or (metadata.input_size if metadata else None)
    if channels not in (1, 3) or size is None or height != width:
        raise ExportError(
            f"{str(file)!r} takes a tensor of shape ({axes_in_words(shape)}), not square images of 1 or 3 channels."
        )
    try:
        logits = runner(torch.zeros(shape[0] or 1, channels, size, size))
    except Exception as error:  # a program may have several inputs, or have been exported for another device
        raise ExportError(f"{str(file)!r} cannot run on images of {size} x {size}: {first_line(error)}.") from error
    segments = isinstance(logits, Tensor) and logits.ndim == 4 and logits.shape[2:] == (size, size)
    if not isinstance(logits, Tensor) or not (logits.ndim == 2 or segments):
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"{len(logits)} tensors"
        raise ExportError(f"{str(file)!r} returns {what}, not logits of classes.")
    known = metadata or _metadata_from_notes(file, runner, logits.shape[1], channels, size)
    if (known.num_classes, known.in_channels) != (logits.shape[1], channels):
        raise ExportError(f"{str(file)!r} has a header that does not fit the program: export it again.")
    name = target_of(file)
    assert name is not None
    return LoadedProgram(runner, _runtime(name), known, segments)


def _runtime(target: str) -> str:
    return TARGETS[target].runtime.lower().replace(" ", "")


def _metadata_from_notes(file: Path, runner: Runner, num_classes: int, channels: int, size: int) -> Metadata:
    """Return what the notes say of a network that was no checkpoint of this library."""
    more: dict[str, Any] = {}
    found = read_preprocessing(runner.notes)
    if found is not None and len(found.mean) == channels:
        more = {"mean": found.mean, "std": found.std}
        if found.in_graph:  # it takes pixels
            more = {"mean": (0.0,) * channels, "std": (1.0 / PIXEL_MAX,) * channels}
        if len(found.classes) == num_classes:
            more["classes"] = found.classes
    return Metadata(file.name, "plain", num_classes, channels, size, **more)
