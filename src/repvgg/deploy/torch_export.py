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
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repvgg._arguments import check_model, check_shape
from repvgg._calls import Call, Inputs, bind
from repvgg._contexts import eval_mode
from repvgg._files import atomic_write, check_output
from repvgg.deploy.flat import FlatModule
from repvgg.errors import ExportError, OutputError, UsageError, first_line

NOTES = "repvgg.json"  # name of the notes in a .pt2 file

ENGINE_OPERATOR = "repvgg.compiled_model.default"  # see repvgg.engine.operator
NOT_PORTABLE = "it calls a model of repvgg.engine, which only this process has; export the network that was compiled"


def check_image_shape(shape: tuple[int, int, int]) -> None:
    """Raise UsageError unless ``shape`` is (C, H, W)."""
    check_shape(shape, "(C, H, W)")


def example_input(model: nn.Module, input_shape: tuple[int, int, int], batch: int) -> Tensor:
    """Return zeros in the dtype and on the device of the model."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch, *input_shape, dtype=like.dtype, device=like.device)


def example_call(
    model: nn.Module, input_shape: tuple[int, int, int] | None, inputs: Inputs | Call | None, dynamic_batch: bool
) -> Call:
    """Return the call that is captured: the given inputs, or images of zeros.

    Raises:
        UsageError: neither or both are given, the shape is not (C, H, W), or the forward does not take the inputs.
    """
    if (input_shape is None) == (inputs is None):
        raise UsageError("Pass the shape of an image, (C, H, W), or inputs.")
    # Two images for a dynamic batch: torch.export specializes on sizes of 0 and 1.
    samples = 2 if dynamic_batch else 1
    if inputs is None:
        assert input_shape is not None
        check_image_shape(input_shape)
        return Call((example_input(model, input_shape, samples),))
    call = bind(model, inputs)
    first = call.tensors()[0]
    if first.dim() and len(first) == 1 and dynamic_batch:
        return call.map_tensors(lambda x: torch.cat([x, x]) if x.dim() and len(x) == 1 else x)
    return call


def batch_axes(call: Call, batch: Any) -> tuple[dict[int, Any], ...]:
    """Return the dynamic axes of each tensor: axis 0 is ``batch`` where it is as long as that of the first tensor."""
    tensors = call.tensors()
    number = len(tensors[0]) if tensors[0].dim() else None
    return tuple({0: batch} if x.dim() and len(x) == number else {} for x in tensors)


def text_of(call: Call, number: str = "an image") -> str:
    """Return what a model was exported for, in words."""
    if len(call.args) == 1 and isinstance(call.args[0], Tensor) and call.args[0].dim() == 4 and not call.kwargs:
        return f"{number} of {tuple(call.args[0].shape[1:])}"
    return repr(call)


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
    input_shape: tuple[int, int, int] | None = None,
    *,
    inputs: Inputs | Call | None = None,
    overwrite: bool = False,
    dynamic_batch: bool = True,
    notes: Mapping[str, str] | None = None,
) -> ProgramExport:
    """Write ``model``, as it computes in eval mode, to a file for ``torch.export.load``, atomically.

    Do not call it inside :func:`repvgg.verify.isolated_eval`: what PyTorch captures depends on the flags set there.

    Args:
        model: any module that ``torch.export`` can capture; it is not changed. The program takes the
            tensors of the inputs in order, and returns what the model does, with a dictionary in place of a dataclass
            or another object.
        path: the file; its folder must exist.
        input_shape: (C, H, W) of one image. Height and width are fixed in the file.
        inputs: instead, example inputs, as for :func:`repvgg.deploy.export_onnx`.
        overwrite: replace a file at ``path``.
        dynamic_batch: leave the batch size open; otherwise it is 1.
        notes: texts to store in the file by name; ``torch.export.load`` returns them as ``extra_files``.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        UsageError: ``input_shape`` is not three positive numbers, or the forward does not take the ``inputs``.
        ExportError: the model does not run on the inputs, or cannot be captured, or not for any batch size.
    """
    check_model(model, "export_program")
    target = check_output(path, overwrite=overwrite)
    program = _capture(model, example_call(model, input_shape, inputs, dynamic_batch), dynamic_batch)
    with atomic_write(target, overwrite=overwrite) as part:
        try:
            with silence():
                torch.export.save(program, part, extra_files=dict(notes or {}))
        except RuntimeError as error:  # PyTorch's archive writer turns an OSError into one
            raise OutputError(f"{str(target)!r} could not be written: {first_line(error)}.") from error
    return ProgramExport(target, dynamic_batch)


def _capture(model: nn.Module, call: Call, dynamic_batch: bool) -> ExportedProgram:
    axes = batch_axes(call, Dim("batch", min=1)) if dynamic_batch else None  # min=1: an empty batch need not work
    flat = FlatModule(model, call, structured=True)
    module, shapes = (model, axes) if flat.is_plain else (flat, axes and (axes,))
    try:
        with eval_mode(model), silence(), torch.no_grad():
            program = torch.export.export(module, tuple(call.tensors()), dynamic_shapes=shapes)
    except Exception as error:
        what = text_of(call, "any number of images" if dynamic_batch else "an image")
        raise ExportError(f"The model cannot be exported for {what}: {first_line(error)}.") from error
    if any(str(node.target) == ENGINE_OPERATOR for node in program.graph.nodes):
        raise ExportError(f"The model cannot be exported: {NOT_PORTABLE}.")
    return program


@final
class ProgramRunner:
    """A .pt2 file, loaded on the device on which it was exported: ``logits = runner(images)``.

    Several inputs are passed in order. Outputs have the structure that the model gave them, with a dictionary in place
    of a dataclass or another object.

    Such a file is a program: load only files that you trust.

    Attributes:
        path: the file.
        program: the result of ``torch.export.load``.
        module: the program as a module.
        input_shape: axes of the first input; None where the file leaves one open.
        dtype: of the first input.
        inputs: the axes of each input by name.
        outputs: the names of the outputs.
        notes: the text that is stored in the file under :data:`NOTES`, parsed; empty if there is none.

    Raises:
        ExportError: the file does not exist, or is not an exported program with an input.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.program, self.notes = _load(self.path)
        names = self.program.graph_signature.user_inputs
        if not names:
            raise ExportError(f"{str(path)!r} is not a program with an input.")
        values = {node.name: node.meta.get("val") for node in self.program.graph.nodes}
        like: Any = values[str(names[0])]
        self.inputs = {str(name): _axes(values.get(str(name))) for name in names}
        self.outputs = tuple(map(str, self.program.graph_signature.user_outputs))
        self.input_shape = _axes(like)
        self.dtype: torch.dtype = like.dtype
        self.module = self.program.module()

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output of the program; a shape for which it was not exported raises."""
        return self.module(*inputs)

    def __repr__(self) -> str:
        return f"ProgramRunner({str(self.path)!r})"


def _axes(value: Any) -> tuple[int | None, ...]:
    return tuple(axis if isinstance(axis, int) else None for axis in getattr(value, "shape", ()))


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
