"""The table of export targets, and what each of them is given and returns.

A target is a module with ``export(request: ExportRequest) -> Exported``, imported when it is used. It writes under a
temporary name, compares what it wrote with the reference, and keeps it only if both are equal.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from repvgg.errors import UsageError, did_you_mean
from repvgg.verify import Evidence

Shape = tuple[int, int, int]


@final
@dataclass(frozen=True, eq=False)
class ExportRequest:
    """What to export, and where to.

    Attributes:
        reference: the network as it was loaded; the result is compared with it in float64.
        plain: its plain form, which is exported.
        out: a file or a folder, as the target wants.
        input_shape: (C, H, W) of an image.
        images: real images of that shape to compare on, beside those that reveal errors at borders; may be empty.
        overwrite: replace what exists.
        notes: texts about the network by name: source, weights, version, and the header of a checkpoint.
        options: of the target, by name.
    """

    reference: nn.Module
    plain: nn.Module
    out: Path
    input_shape: Shape
    images: Sequence[Tensor] = ()
    overwrite: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        contents: what it holds, in words.
        evidence: of the comparison with the reference; None if it was not run.
        remarks: what else a user should know, a sentence each: why it was not run, for example.
    """

    path: Path
    contents: str
    evidence: Evidence | None
    remarks: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class ExportTarget:
    """A format.

    Attributes:
        about: what it is, in a few words.
        module: has the function ``export``.
        suffix: of the file; "" for a folder.
        options: names that :attr:`ExportRequest.options` may have.
        replaceable: a pattern of files; a folder that has one may be replaced.
    """

    about: str
    module: str
    suffix: str
    options: tuple[str, ...] = ()
    replaceable: str = ""


TARGETS: dict[str, ExportTarget] = {
    "c": ExportTarget(
        "a C library",
        "repvgg.deploy.c_library",
        "",
        ("target", "max_batch", "threads", "packed_weights", "name", "precision"),
        "lib*.a",
    ),
    "onnx": ExportTarget("an ONNX file", "repvgg.deploy.shipping", ".onnx"),
    "pt2": ExportTarget("a program of torch.export", "repvgg.deploy.shipping", ".pt2"),
    "web": ExportTarget(
        "a page for browsers",
        "repvgg.deploy.web",
        "",
        options=("onnxruntime_web", "single_file", "crop_fraction", "interpolation"),
        replaceable="model.json",
    ),
}


def export_target(name: str) -> ExportTarget:
    """Return a target of the table.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        advice = did_you_mean(name, TARGETS, f"choose one of {', '.join(TARGETS)}.")
        raise UsageError(f"There is no export target {name!r}: {advice}")
    return TARGETS[name]


def check_request(name: str, out: Path, options: Mapping[str, Any]) -> None:
    """Check the name of the output and the options of a target, before the work begins.

    Raises:
        UsageError: the target is unknown, the name has another suffix, or the target has no such option.
    """
    target = export_target(name)
    if target.suffix and out.suffix != target.suffix:
        raise UsageError(f"--to {name} writes {target.about}: end {str(out)!r} in {target.suffix}.")
    for option in options:
        if option not in target.options:
            raise UsageError(f"--{option.replace('_', '-')} is not an option of --to {name}.")


def export(name: str, request: ExportRequest) -> Exported:
    """Export a network to a target. Raises what the target does, and as :func:`check_request`."""
    check_request(name, request.out, request.options)
    exported: Exported = importlib.import_module(export_target(name).module).export(request)
    return exported
