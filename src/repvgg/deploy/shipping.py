"""``ship``: write a plain network in the format that the suffix selects, and keep the file only if it is verified.

A ``.safetensors`` file holds weights alone and is compared bit for bit; the other formats are run and compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._calls import Call, Inputs, bind
from repvgg._files import atomic_write, check_output
from repvgg._structure import describe, tensors
from repvgg.checkpoints import read_checkpoint, save_tensors
from repvgg.deploy.onnx import OnnxRunner, export_onnx
from repvgg.deploy.torch_export import NOTES, ProgramRunner, export_program
from repvgg.errors import ExportError, RepvggError, UsageError, first_line
from repvgg.models import RepVGG, describe_model
from repvgg.verify import Evidence, border_inputs, isolated_eval, verify
from repvgg.verify.inputs import first_samples

SUFFIXES = (".pt2", ".onnx", ".safetensors")
HEADER = "repvgg.plain"  # name of the notes in the header of a .safetensors file
_SIZES = 3  # the given one and two odd ones
_BATCH = 2

Shape = tuple[int, int, int]


@final
@dataclass(frozen=True)
class Shipped:
    """A file that was written, read back and verified.

    Attributes:
        path: the file.
        dynamic_batch: whether it takes any batch size; None where it holds weights alone.
        evidence: of the file against the reference; None where it was compared bit for bit instead.
    """

    path: Path
    dynamic_batch: bool | None = None
    evidence: Evidence | None = None


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a network can be shipped to ``path``; call it before the work begins.

    Raises:
        UsageError: the suffix is none of :data:`SUFFIXES`.
        OutputError: the file exists and ``overwrite`` is not set, or it cannot be written there.
    """
    if Path(path).suffix not in SUFFIXES:
        raise UsageError(f"The suffix selects the file format: end {str(path)!r} in one of {', '.join(SUFFIXES)}.")
    return check_output(path, overwrite=overwrite)


def ship(
    reference: nn.Module,
    plain: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Shape,
    *,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
    inputs: Inputs | Call | None = None,
    images: Sequence[Tensor] = (),
) -> Shipped:
    """Write ``plain`` under a temporary name, load the file, and rename it to ``path`` if it equals ``reference``.

    A ``.pt2`` or ``.onnx`` file is run on border-exposing images and compared with the reference in float64. It takes
    any batch size where the model can be captured so, and one image otherwise. A ``.safetensors`` file holds the
    weights alone and is compared bit for bit. Outputs may have any structure; ``inputs`` are example inputs of a model
    that takes something else than one batch of images. ``images`` are more batches to compare on.

    Raises:
        UsageError: the suffix is none of :data:`SUFFIXES`, the shape is invalid, or the forward does not take the
            inputs.
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        ExportError: the model cannot be exported.
        EquivalenceError: the file computes a different function.
    """
    target = check_target(path, overwrite=overwrite)
    with atomic_write(target, overwrite=overwrite) as part:
        if target.suffix == ".safetensors":  # no program to run: the weights are compared bit for bit
            export_weights(plain, part, input_shape, notes=notes)
            return Shipped(target)

        def write_and_verify(dynamic_batch: bool) -> Shipped:
            run = _write_and_load(plain, part, input_shape, inputs, notes or {}, dynamic_batch=dynamic_batch)
            # Not 2, the batch size of the capture: a constant that it left in the graph would not show.
            sizes = (3, 1) if dynamic_batch else (1, 1)
            calls = _images(plain, input_shape, sizes) if inputs is None else _calls(reference, inputs, dynamic_batch)
            at_once = None if dynamic_batch else 1
            calls += [Call((part,)) for batch in images for part in torch.split(batch, at_once or len(batch))]
            return Shipped(target, dynamic_batch, _verify_file(reference, run, calls))

        try:
            return write_and_verify(dynamic_batch=True)
        except ExportError:
            # Some models capture a constant batch size, and some files fail only when they run on another one.
            return write_and_verify(dynamic_batch=False)


def _write_and_load(
    plain: nn.Module,
    path: Path,
    shape: Shape,
    inputs: Inputs | Call | None,
    notes: Mapping[str, str],
    *,
    dynamic_batch: bool,
) -> Callable[..., Any]:
    image = shape if inputs is None else None
    if path.suffix == ".onnx":
        export_onnx(plain, path, image, inputs=inputs, overwrite=True, dynamic_batch=dynamic_batch, notes=notes)
        return OnnxRunner(path)
    text = {NOTES: json.dumps(notes)}
    export_program(plain, path, image, inputs=inputs, overwrite=True, dynamic_batch=dynamic_batch, notes=text)
    return ProgramRunner(path)


def _images(plain: nn.Module, shape: Shape, sizes: Sequence[int]) -> list[Call]:
    dtype = _dtype_of(plain)
    return [
        Call((border_inputs((size, *shape), batches=1, seed=seed, dtype=dtype)[0],)) for seed, size in enumerate(sizes)
    ]


def _calls(reference: nn.Module, inputs: Inputs | Call, dynamic_batch: bool) -> list[Call]:
    call = bind(reference, inputs)
    return [call, first_samples(call, 1)] if dynamic_batch else [call]


def _verify_file(reference: nn.Module, run: Callable[..., Any], calls: Sequence[Call]) -> Evidence:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*tensors((args, kwargs)))
        except RepvggError:
            raise
        except Exception as error:  # each runtime has its own exceptions
            raise ExportError(f"The written file does not run: {first_line(error)}.") from error

    return verify(reference, call, calls).raise_if_failed()


def images_for(model: nn.Module, input_shape: Shape) -> list[Tensor]:
    """Return images to verify ``model`` on: of the given size, and of odd sizes where it accepts those.

    Raises:
        UsageError: it does not run on the given size, or returns no number.
    """
    if min(input_shape) < 1:
        raise UsageError(f"An image must have at least one channel, row and column, got {input_shape}.")
    first, *others = border_inputs((_BATCH, *input_shape), batches=_SIZES, dtype=_dtype_of(model))
    out = _output_or_error(model, first)
    if isinstance(out, Exception):
        raise UsageError(f"The model cannot run on images of the shape {input_shape}: {first_line(out)}.") from out
    if not any(tensor.is_floating_point() for tensor in tensors(out)):
        raise UsageError(f"The model returns {describe(out)}: there are no floating-point numbers to compare.")
    return [first, *(images for images in others if not isinstance(_output_or_error(model, images), Exception))]


def _output_or_error(model: nn.Module, images: Tensor) -> object:
    with isolated_eval(model):
        try:
            return model(images.clone())
        except Exception as error:
            return error


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def export_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: Shape,
    *,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write the ``state_dict`` of a plain model to a safetensors file, atomically and bit for bit.

    The header holds ``notes`` as JSON under :data:`HEADER`. A model of repvgg's registry also gets the header from
    which :func:`repvgg.load` rebuilds it.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        ExportError: the model has state that is not a tensor, or the file differs from it when it is read back.
        CheckpointError: a weight is not finite.
    """
    tensors = model.state_dict()
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"The model has state that is not a tensor, {odd[0]!r}: safetensors cannot store it.")
    header = {"format": "pt", HEADER: json.dumps({"form": "plain", **(notes or {})}, sort_keys=True)}
    _, height, width = input_shape
    if isinstance(model, RepVGG) and height == width:  # the header has room for one side only
        header |= describe_model(model, "plain", input_size=height).to_header()
    with atomic_write(path, overwrite=overwrite) as part:
        save_tensors(part, tensors, header)
        back = read_checkpoint(part).tensors  # before the rename: a file that differs never gets the name
        if unequal := [name for name in tensors.keys() | back.keys() if not _same(tensors.get(name), back.get(name))]:
            raise ExportError(f"The written file differs from the model in {min(unequal)!r}: please report this.")
    return Path(path)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # As bytes: torch.equal on floats takes -0.0 for 0.0, and NaN for different.
    ours, theirs = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(ours, theirs)
