"""Export to a file: write it under a temporary name, run it, compare it with the reference, and keep it if it is equal.

The modules in :mod:`repvgg.deploy.formats` say how each format is written and run.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._calls import Call
from repvgg._files import atomic_files, atomic_folder
from repvgg._structure import tensors
from repvgg.deploy.comparison_images import border_images, split_to
from repvgg.deploy.inventory import Inventory
from repvgg.deploy.preprocessing import Preprocessed, ReferenceOfPixels, notes_of
from repvgg.deploy.targets import (
    Exported,
    ExportRequest,
    ExportTarget,
    FloatPrecision,
    Runner,
    Shape,
    axes_in_words,
    export_target,
)
from repvgg.errors import EquivalenceError, ExportError, RepvggError, first_line
from repvgg.verify import Evidence, isolated_eval
from repvgg.verify.comparison import Comparison

DTYPES: dict[FloatPrecision, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@final
@dataclass(frozen=True, eq=False)
class FileSpec:
    """What a file is to hold.

    Attributes:
        shape: (C, H, W) of an image.
        dynamic_batch: leave the number of images open; otherwise it is 1.
        precision: of weights and arithmetic; inputs and outputs are float32.
        notes: texts to store by name.
    """

    shape: Shape
    dynamic_batch: bool
    precision: FloatPrecision = "float32"
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def example(self) -> Call:
        """The call that is captured. Two images for a dynamic batch: torch.export specializes on sizes of 0 and 1."""
        return Call((torch.zeros(2 if self.dynamic_batch else 1, *self.shape),))

    def in_precision(self, model: nn.Module) -> nn.Module:
        """Return the model as it computes in this precision, with inputs and outputs in float32."""
        return InFloat16(model) if self.precision == "float16" else model


@final
@dataclass(frozen=True)
class Written:
    """What a writer knows about its file.

    Attributes:
        inventory: of its graph.
        most_images: of a call; None for any number.
        inputs: names of the inputs; needed only of formats that do not run here.
        outputs: names of the outputs; likewise.
        remarks: what a user should know, a sentence each.
    """

    inventory: Inventory
    most_images: int | None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@final
class InFloat16(nn.Module):
    """A model in float16, with inputs and outputs in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, x: Tensor) -> Any:
        out = self.model(x.half())
        return out.float() if isinstance(out, Tensor) else tuple(tensor.float() for tensor in tensors(out))


Write = Callable[[nn.Module, Path, FileSpec], Written]
Load = Callable[[Path, int | None], Runner]


def export_file(name: str, request: ExportRequest, write: Write, load: Load | None) -> Exported:
    """Write the file of a request, and keep it if it computes the same function as the reference.

    The file takes any number of images where the format and the model allow it, and one otherwise.

    Args:
        name: of the target.
        request: what to export.
        write: writes a model to a path that does not exist.
        load: opens a file that was written; None if the format does not run here.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        ExportError: the model cannot be exported, or the file does not run.
        EquivalenceError: the file computes another function.
        MissingDependencyError: a package is missing.
    """
    target = export_target(name)
    with _output(target, request) as part:
        problem: ExportError | None = None
        for dynamic_batch in (True, False) if target.dynamic_batch else (False,):
            _remove(part)
            try:
                return _written_and_compared(target, request, part, dynamic_batch, write, load, problem)
            except EquivalenceError:
                raise
            except ExportError as error:
                # Some models capture a constant batch size, and some files fail only when they run on another one.
                problem = problem or error
        assert problem is not None
        raise problem


def _output(target: ExportTarget, request: ExportRequest) -> AbstractContextManager[Path]:
    if target.is_folder:
        return atomic_folder(request.out, target.replaceable, overwrite=request.overwrite)
    return atomic_files(request.out, overwrite=request.overwrite)


def _remove(part: Path) -> None:
    """Remove what a failed attempt left."""
    folder = part if part.is_dir() else part.parent
    for file in folder.iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def _written_and_compared(
    target: ExportTarget,
    request: ExportRequest,
    part: Path,
    dynamic_batch: bool,
    write: Write,
    load: Load | None,
    problem: ExportError | None,
) -> Exported:
    model, reference, preprocessing = copy.deepcopy(request.plain).float(), request.reference, request.preprocessing
    if request.with_preprocessing:
        assert preprocessing is not None
        preprocessing = replace(preprocessing, in_graph=True)
        model, reference = Preprocessed(model, preprocessing), ReferenceOfPixels(reference, preprocessing)
    notes = notes_of(request.notes, preprocessing)
    spec = FileSpec(request.input_shape, dynamic_batch, request.precision, notes)
    written = _write(target, write, model.eval(), part, spec)
    evidence = seen = None
    inputs, outputs = (
        dict.fromkeys(written.inputs, axes_in_words((None if dynamic_batch else 1, *spec.shape))),
        written.outputs,
    )
    if load is not None:
        runner = load(part, None)
        inputs = {name: axes_in_words(axes) for name, axes in runner.inputs.items()}
        outputs = tuple(runner.outputs)
        at_once = None if dynamic_batch else 1
        borders = border_images(spec.shape, preprocessing, pixels=request.with_preprocessing)
        runs = request.reference_runs
        evidence = compare(reference, runner, split_to(borders, at_once), request.precision, runs, f"borders {at_once}")
        if request.images:
            seen = compare(
                reference, runner, split_to(request.images, at_once), request.precision, runs, f"photographs {at_once}"
            )
    remarks = [*written.remarks]
    if not target.runtime:
        remarks.append(f"converted, not run: {target.why_not_run}.")
    if problem is not None:
        remarks.append(f"it takes one image at a time, because it cannot take any number: {first_line(problem)}.")
    number = "one image at a time" if not dynamic_batch else "any number of images"
    if written.most_images not in (None, 1):
        number = f"up to {written.most_images} images"
    size = " x ".join(map(str, request.input_shape))
    contents = (
        f"{number} of {size}{' as pixels in [0, 255]' if request.with_preprocessing else ''}, {request.precision}"
    )
    return Exported(request.out, contents, evidence, tuple(remarks), seen, inputs, outputs, written.inventory)


def _write(target: ExportTarget, write: Write, model: nn.Module, part: Path, spec: FileSpec) -> Written:
    try:
        return write(model, part, spec)
    except RepvggError:
        raise
    except Exception as error:  # each converter has its own exceptions
        raise ExportError(f"The model cannot be exported as {target.about}: {first_line(error)}.") from error


def compare(
    reference: nn.Module,
    run: Callable[..., Any],
    batches: list[Tensor],
    precision: FloatPrecision,
    runs: dict[str, Any] | None = None,
    key: str = "",
) -> Evidence:
    """Compare a file in its runtime with the reference in float64, as :func:`repvgg.verify.verify` does.

    Args:
        reference: the function as it should be.
        run: the file.
        batches: of images.
        precision: of the file, which decides about the tolerance.
        runs: outputs of the reference by key, of earlier calls with the same reference and batches; the new ones are
            added.
        key: of these batches.

    Raises:
        EquivalenceError: they differ.
        ExportError: the file does not run.
    """

    def candidate(x: Tensor) -> Any:
        try:
            return run(x.float())
        except RepvggError:
            raise
        except Exception as error:  # each runtime has its own exceptions
            raise ExportError(f"The written file does not run: {first_line(error)}.") from error

    calls = [Call((batch.to(DTYPES[precision]),)) for batch in batches]  # their dtype is that of the comparison
    comparison = Comparison(reference, candidate, calls)
    runs = {} if runs is None else runs
    with isolated_eval(*comparison.models):
        if key in runs:
            comparison.exact, comparison.own = runs[key]
        else:
            runs[key] = comparison.exact, comparison.own
        return comparison.evidence(None).raise_if_failed()
