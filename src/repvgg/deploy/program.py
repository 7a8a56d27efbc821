"""PyTorch's own file of an exported program (.pt2): written, and loaded back as a function from tensor to tensor."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repvgg._contexts import eval_mode
from repvgg._files import atomic_write, check_output
from repvgg.deploy.exporting import check_image_shape, example_input, first_line, silence
from repvgg.errors import ExportError, OutputError


@final
@dataclass(frozen=True)
class ProgramExport:
    """A .pt2 file that was written.

    Attributes:
        path: the file.
        dynamic_batch: whether it takes any number of images; otherwise one.
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
    """Write ``model``, as it computes in eval mode, to one file that ``torch.export.load`` reads, or to none.

    Not to be called inside :func:`repvgg.verify.judging`: what PyTorch captures there depends on the flags it sets.

    Args:
        model: any module that takes one tensor and that ``torch.export`` can capture; it comes back as it was.
        path: where to write; its folder must exist.
        input_shape: (C, H, W) of one image. Height and width are fixed in the file.
        overwrite: replace a file at ``path``.
        dynamic_batch: leave the number of images open; otherwise it is 1.
        notes: texts to store in the file by name; ``torch.export.load`` gives them back as ``extra_files``.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is not set.
        OutputError: no such folder, or the file cannot be written.
        UsageError: ``input_shape`` is not three positive numbers.
        ExportError: the model cannot be captured, or not for any number of images.
    """
    target = check_output(path, overwrite=overwrite)
    check_image_shape(input_shape)
    program = _captured(model, example_input(model, input_shape, 2 if dynamic_batch else 1), dynamic_batch)
    with atomic_write(target, overwrite=overwrite) as part:
        try:
            with silence():
                torch.export.save(program, part, extra_files=dict(notes or {}))
        except RuntimeError as error:  # PyTorch's archive writer makes one of an OSError
            raise OutputError(f"{str(target)!r} could not be written: {first_line(error)}.") from error
    return ProgramExport(target, dynamic_batch)


def _captured(model: nn.Module, example: Tensor, dynamic_batch: bool) -> ExportedProgram:
    shapes = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with eval_mode(model), silence(), torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=shapes)
    except Exception as error:
        number = "any number of images" if dynamic_batch else "an image"
        shape = tuple(example.shape[1:])
        raise ExportError(f"The model cannot be exported for {number} of {shape}: {first_line(error)}") from error


@final
class ProgramRunner:
    """A .pt2 file of one input, loaded on the device that it was exported on: ``logits = runner(images)``.

    Such a file is a program: load those that you trust.

    Attributes:
        path: the file.
        program: what ``torch.export.load`` makes of it.
        module: the program as a module.

    Raises:
        ExportError: no such file, or no exported program of one input.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.program = _loaded(self.path)
        if len(self.program.graph_signature.user_inputs) != 1:
            raise ExportError(f"{str(path)!r} is not a program of one input.")
        self.module = self.program.module()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the program on ``x``; another shape than it was exported for raises."""
        out: Tensor = self.module(x)
        return out

    def __repr__(self) -> str:
        return f"ProgramRunner({str(self.path)!r})"


def _loaded(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise ExportError(f"There is no file {str(path)!r}: export the model first.")
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{str(path)!r} is not an exported program.")
    try:
        with silence():
            return torch.export.load(path)
    except Exception as error:
        raise ExportError(f"{str(path)!r} cannot be loaded as an exported program: {first_line(error)}") from error
