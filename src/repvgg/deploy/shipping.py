"""From a plain network to the file that is shipped: the suffix says which kind, and the file itself is judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from repvgg._files import atomic_write, check_output
from repvgg.deploy.exporting import first_line
from repvgg.deploy.onnx_export import export_onnx
from repvgg.deploy.onnx_runner import OnnxRunner
from repvgg.deploy.program import ProgramRunner, export_program
from repvgg.deploy.weights_file import export_weights
from repvgg.errors import ExportError, RepvggError, UsageError
from repvgg.verify import Evidence, border_inputs, judging, verify

SUFFIXES = (".pt2", ".onnx", ".safetensors")
NOTES = "repvgg.json"  # in a .pt2 file
_SIZES = 3
_BATCH = 2

Shape = tuple[int, int, int]


@final
@dataclass(frozen=True)
class Shipped:
    """A file that was written, read back and judged.

    Attributes:
        path: the file.
        dynamic_batch: whether it takes any number of images; None where it holds weights alone.
        evidence: of the file against the reference; None where it was compared bit for bit instead.
    """

    path: Path
    dynamic_batch: bool | None = None
    evidence: Evidence | None = None


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a network can be shipped to ``path``, before the work begins.

    Raises:
        UsageError: the suffix is none of :data:`SUFFIXES`.
        OutputExistsError: something is in the way.
        OutputError: there is no such folder.
    """
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(f"The suffix says what to write: end {str(path)!r} in one of {', '.join(SUFFIXES)}.")
    return check_output(path, overwrite=overwrite)


def ship(
    reference: nn.Module,
    plain: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Shape,
    *,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Shipped:
    """Write ``plain`` to ``path``, load the file back, and let it have that name only if it equals ``reference``.

    A ``.pt2`` or ``.onnx`` file is run on border-making images and judged against the reference in float64; it takes
    any number of images where the model can be captured so, and one otherwise. A ``.safetensors`` file holds the
    weights alone and is compared bit for bit.

    Raises:
        UsageError: another suffix, or a shape that makes no sense.
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        ExportError: the model cannot be exported.
        EquivalenceError: the file computes something else.
    """
    target = check_target(path, overwrite=overwrite)
    with atomic_write(target, overwrite=overwrite) as part:
        if target.suffix == ".safetensors":
            export_weights(plain, part, input_shape, notes=notes)
            return Shipped(target)
        job = _Job(reference, plain, part, input_shape, notes or {})
        try:
            dynamic, evidence = True, job.done(dynamic=True)
        except ExportError:
            dynamic, evidence = False, job.done(dynamic=False)
    return Shipped(target, dynamic, evidence)


def images_for(model: nn.Module, input_shape: Shape) -> list[Tensor]:
    """Images to judge ``model`` on: of its own size, and of odd sizes where it takes those.

    Raises:
        UsageError: it does not run on its own size, or does not return one floating-point tensor.
    """
    if min(input_shape) < 1:
        raise UsageError(f"An image has at least one channel, row and column, not {input_shape}.")
    dtype = _dtype_of(model)
    first, *others = border_inputs((_BATCH, *input_shape), batches=_SIZES, dtype=dtype)
    out = _output(model, first)
    if isinstance(out, Exception):
        raise UsageError(f"The model cannot run on images of the shape {input_shape}: {first_line(out)}") from out
    if not isinstance(out, Tensor) or not out.is_floating_point():
        what = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else f"a value of type {type(out).__name__}"
        raise UsageError(f"The model returns {what}: wrap it in a module that returns one floating-point tensor.")
    return [first, *(images for images in others if isinstance(_output(model, images), Tensor))]


def _output(model: nn.Module, images: Tensor) -> object:
    """What the model returns, or the exception that it raises."""
    with judging(model):
        try:
            return model(images)
        except Exception as error:
            return error


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclass(frozen=True)
class _Job:
    """One file that is to be written, run and judged."""

    reference: nn.Module
    plain: nn.Module
    part: Path
    shape: Shape
    notes: Mapping[str, str]

    def done(self, *, dynamic: bool) -> Evidence:
        """Write the file for any number of images, or for one; judge it on other numbers than it was captured with."""
        run = self.written(dynamic)
        images = partial(border_inputs, batches=1, dtype=_dtype_of(self.plain))
        sizes = (3, 1) if dynamic else (1, 1)
        batches = [images((size, *self.shape), seed=seed)[0] for seed, size in enumerate(sizes)]
        return verify(self.reference, _complaining(run), batches).raise_if_failed()

    def written(self, dynamic: bool) -> Callable[[Tensor], Tensor]:
        """Write the file and load it."""
        if self.part.suffix == ".onnx":
            export_onnx(self.plain, self.part, self.shape, overwrite=True, dynamic_batch=dynamic)
            return OnnxRunner(self.part)
        export_program(
            self.plain, self.part, self.shape, overwrite=True, dynamic_batch=dynamic, notes={NOTES: dumps(self.notes)}
        )
        return ProgramRunner(self.part)


def _complaining(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, but whatever a runtime raises is an ExportError."""

    def call(x: Tensor) -> Tensor:
        try:
            return run(x)
        except RepvggError:
            raise
        except Exception as error:
            raise ExportError(f"The file that was written does not run: {first_line(error)}") from error

    return call
