"""Exported programs of ``torch.export`` (.pt2): write a file, and load it as a function from tensor to tensor."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repvgg._contexts import eval_mode
from repvgg._files import atomic_write, check_output
from repvgg.errors import ExportError, OutputError, UsageError, first_line

NOTES = "repvgg.json"  # name of the notes in a .pt2 file


def check_image_shape(shape: tuple[int, int, int]) -> None:
    """Raise UsageError unless ``shape`` is (C, H, W)."""
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"The shape of an image must be (C, H, W), three positive numbers, got {shape}.")


def example_input(model: nn.Module, input_shape: tuple[int, int, int], batch: int) -> Tensor:
    """Return zeros in the dtype and on the device of the model."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch, *input_shape, dtype=like.dtype, device=like.device)


@contextmanager
def silence() -> Iterator[None]:
    """Suppress the exporter's output about its internals, in every channel it uses; its result is checked instead."""
    disabled = logging.root.manager.disable  # the exporter logs through several loggers: disable all, then restore
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@final
@dataclass(frozen=True)
class ProgramExport:
    """A .pt2 file that was written.

    Attributes:
        path: the file.
        dynamic_batch: whether it takes any batch size; otherwise 1.
    """

    path: Path
    dynamic_batch: bool


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    *,
    overwrite: bool = False,
    dynamic_batch: bool = True,
    notes: Mapping[str, str] | None = None,
) -> ProgramExport:
    """Write ``model``, as it computes in eval mode, to a file for ``torch.export.load``, atomically.

    Do not call it inside :func:`repvgg.verify.isolated_eval`: what PyTorch captures depends on the flags set there.

    Args:
        model: any module that takes one tensor and that ``torch.export`` can capture; it is not changed.
        path: the file; its folder must exist.
        input_shape: (C, H, W) of one image. Height and width are fixed in the file.
        overwrite: replace a file at ``path``.
        dynamic_batch: leave the batch size open; otherwise it is 1.
        notes: texts to store in the file by name; ``torch.export.load`` returns them as ``extra_files``.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        UsageError: ``input_shape`` is not three positive numbers.
        ExportError: the model cannot be captured, or not for any batch size.
    """
    target = check_output(path, overwrite=overwrite)
    check_image_shape(input_shape)
    # Two images for a dynamic batch: torch.export specializes on sizes of 0 and 1.
    program = _capture(model, example_input(model, input_shape, 2 if dynamic_batch else 1), dynamic_batch)
    with atomic_write(target, overwrite=overwrite) as part:
        try:
            with silence():
                torch.export.save(program, part, extra_files=dict(notes or {}))
        except RuntimeError as error:  # PyTorch's archive writer turns an OSError into one
            raise OutputError(f"{str(target)!r} could not be written: {first_line(error)}.") from error
    return ProgramExport(target, dynamic_batch)


def _capture(model: nn.Module, example: Tensor, dynamic_batch: bool) -> ExportedProgram:
    shapes = ({0: Dim("batch", min=1)},) if dynamic_batch else None  # min=1: an empty batch need not work
    try:
        with eval_mode(model), silence(), torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=shapes)
    except Exception as error:
        number = "any number of images" if dynamic_batch else "an image"
        shape = tuple(example.shape[1:])
        raise ExportError(f"The model cannot be exported for {number} of {shape}: {first_line(error)}.") from error


@final
class ProgramRunner:
    """A .pt2 file with one input, loaded on the device on which it was exported: ``logits = runner(images)``.

    Such a file is a program: load only files that you trust.

    Attributes:
        path: the file.
        program: the result of ``torch.export.load``.
        module: the program as a module.
        input_shape: axes of the input; None where the file leaves one open.
        notes: the text that is stored in the file under :data:`NOTES`, parsed; empty if there is none.

    Raises:
        ExportError: the file does not exist, or is not an exported program with one input.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.program, self.notes = _load(self.path)
        if len(self.program.graph_signature.user_inputs) != 1:
            raise ExportError(f"{str(path)!r} is not a program with one input.")
        (name,) = self.program.graph_signature.user_inputs
        axes = next(node.meta["val"].shape for node in self.program.graph.nodes if node.name == name)
        self.input_shape = tuple(axis if isinstance(axis, int) else None for axis in axes)
        self.module = self.program.module()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the program on ``x``; a shape for which it was not exported raises."""
        out: Tensor = self.module(x)
        return out

    def __repr__(self) -> str:
        return f"ProgramRunner({str(self.path)!r})"


def _load(path: Path) -> tuple[ExportedProgram, dict[str, str]]:
    if not path.is_file():
        raise ExportError(f"There is no file {str(path)!r}: export the model first.")
    if not zipfile.is_zipfile(path):  # PyTorch's own error names internals of its archive reader
        raise ExportError(f"{str(path)!r} is not an exported program.")
    try:
        with silence():
            texts = {NOTES: ""}  # filled by torch.export.load
            program = torch.export.load(path, extra_files=texts)
            notes = json.loads(texts[NOTES]) if texts[NOTES] else {}
            return program, {name: str(text) for name, text in notes.items()}
    except Exception as error:
        raise ExportError(f"{str(path)!r} cannot be loaded as an exported program: {first_line(error)}.") from error
