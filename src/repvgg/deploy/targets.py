"""The table of export targets, and what each of them is given and returns.

A target is a module with ``export(request: ExportRequest) -> Exported``, imported when it is used. It writes under a
temporary name, compares what it wrote with the reference, and keeps it only if both are equal. If the format runs here,
the module also has ``load(path, threads) -> Runner``, with which :mod:`repvgg.deploy.loading` opens its files.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from repvgg._files import check_output
from repvgg.deploy.inventory import Inventory
from repvgg.deploy.preprocessing import Preprocessing
from repvgg.errors import MissingDependencyError, OutputExistsError, UsageError, did_you_mean
from repvgg.verify import Evidence

Shape = tuple[int, int, int]
FloatPrecision = Literal["float32", "float16"]


class Runner(Protocol):
    """An exported file in its runtime: ``logits = runner(images)``, several outputs as a dictionary.

    Attributes:
        input_shape: axes of the first input; None where the file leaves one open.
        dtype: of the first input.
        inputs: the axes of each input by name.
        outputs: the names of the outputs.
        notes: the texts that are stored in the file, or in the JSON file next to it, by name.
    """

    @property
    def input_shape(self) -> tuple[int | None, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def inputs(self) -> Mapping[str, tuple[int | None, ...]]: ...
    @property
    def outputs(self) -> Sequence[str]: ...
    @property
    def notes(self) -> Mapping[str, str]: ...

    def __call__(self, *args: Tensor) -> Any:
        """Return the output for inputs in order."""


@final
@dataclass(frozen=True, eq=False)
class ExportRequest:
    """What to export, and where to.

    Attributes:
        reference: the network as it was loaded; the result is compared with it in float64.
        plain: its plain form, which is exported.
        out: a file or a folder, as the target wants.
        input_shape: (C, H, W) of an image.
        images: batches of photographs of that shape to compare on, beside images that reveal errors at borders; as the
            exported file takes them. May be empty.
        overwrite: replace what exists.
        notes: texts about the network by name: source, weights, version, and the header of a checkpoint.
        options: of the target, by name.
        preprocessing: how pixels become inputs; None leaves it out of the file.
        with_preprocessing: put it into the graph: the file then takes pixels in [0, 255].
        precision: of weights and arithmetic.
        reference_runs: outputs of the reference in float64, which requests for several targets share.
    """

    reference: nn.Module
    plain: nn.Module
    out: Path
    input_shape: Shape
    images: Sequence[Tensor] = ()
    overwrite: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    with_preprocessing: bool = False
    precision: FloatPrecision = "float32"
    reference_runs: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        contents: what it holds, in words.
        evidence: of the comparison with the reference on images that reveal errors at borders; None if it was not run.
        remarks: what else a user should know, a sentence each: why it was not run, for example.
        photographs: evidence of the comparison on photographs; None if there were none, or it was not run.
        inputs: the shape of each input by name, in words.
        outputs: the names of the outputs.
        inventory: the operators of the file; None if they are not known.
    """

    path: Path
    contents: str
    evidence: Evidence | None
    remarks: tuple[str, ...] = ()
    photographs: Evidence | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    inventory: Inventory | None = None


@final
@dataclass(frozen=True)
class ExportTarget:
    """A format.

    Attributes:
        about: what it is, in a few words.
        module: has the function ``export``.
        suffix: of the file; "" for a folder of any name.
        extra: of this library, that installs the packages.
        packages: what the target imports.
        options: names that :attr:`ExportRequest.options` may have.
        replaceable: a pattern of files; a folder that has one may be replaced.
        runtime: what runs the format on this machine; "" if nothing does.
        why_not_run: the reason, a clause, if nothing does.
        dynamic_batch: whether one file can take any number of images.
        precisions: that it can be written in.
        weights: suffix of the file of weights next to it, which has the same stem; "" if there is none.
        reads_qdq: whether it takes a quantized ONNX file (``repvgg quantize``) as its source.
    """

    about: str
    module: str
    suffix: str
    extra: str | None = None
    packages: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    replaceable: str = ""
    runtime: str = ""
    why_not_run: str = ""
    dynamic_batch: bool = True
    precisions: tuple[FloatPrecision, ...] = ("float32", "float16")
    weights: str = ""
    reads_qdq: bool = False

    @property
    def is_folder(self) -> bool:
        return bool(self.replaceable)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of all files that have the same stem."""
        return tuple(one for one in (self.suffix, self.weights) if one)

    def missing_package(self) -> str | None:
        """Return the first package that is not installed, or None."""
        return next((name for name in self.packages if importlib.util.find_spec(name) is None), None)

    def check_packages(self) -> None:
        """Raise MissingDependencyError, which names the extra, if a package is missing."""
        if missing := self.missing_package():
            raise MissingDependencyError(
                f"This needs {missing!r}, which is not installed: pip install 'repvgg[{self.extra}]'."
            )


_ONNX = ("onnx", "onnxscript", "onnxruntime")

TARGETS: dict[str, ExportTarget] = {
    "onnx": ExportTarget("an ONNX file", "repvgg.deploy.formats.onnx", ".onnx", "onnx", _ONNX, runtime="ONNX Runtime"),
    "ort": ExportTarget(
        "a file in ONNX Runtime's own format",
        "repvgg.deploy.formats.ort",
        ".ort",
        "onnx",
        _ONNX,
        runtime="ONNX Runtime",
        reads_qdq=True,
    ),
    "openvino": ExportTarget(
        "OpenVINO IR, a file of weights next to it",
        "repvgg.deploy.formats.openvino",
        ".xml",
        "openvino",
        (*_ONNX, "openvino"),
        runtime="OpenVINO",
        weights=".bin",
        reads_qdq=True,
    ),
    "pt2": ExportTarget("a program of torch.export", "repvgg.deploy.formats.pt2", ".pt2", runtime="torch"),
    "torchscript": ExportTarget(
        "a TorchScript file", "repvgg.deploy.formats.torchscript", ".torchscript", runtime="torch"
    ),
    "executorch": ExportTarget(
        "an ExecuTorch program for XNNPACK",
        "repvgg.deploy.formats.executorch",
        ".pte",
        "executorch",
        ("executorch",),
        runtime="ExecuTorch",
    ),
    "ncnn": ExportTarget(
        "an ncnn network, a file of weights next to it",
        "repvgg.deploy.formats.ncnn",
        ".param",
        "ncnn",
        ("ncnn", "pnnx"),
        runtime="ncnn",
        dynamic_batch=False,
        weights=".bin",
    ),
    "coreml": ExportTarget(
        "a Core ML package",
        "repvgg.deploy.formats.coreml",
        ".mlpackage",
        "coreml",
        ("coremltools",),
        replaceable="Manifest.json",
        why_not_run="Core ML predicts on macOS only",
        dynamic_batch=False,
    ),
    "tensorrt": ExportTarget(
        "an ONNX file for TensorRT",
        "repvgg.deploy.formats.tensorrt",
        ".onnx",
        "onnx",
        _ONNX,
        why_not_run="TensorRT needs an NVIDIA GPU",
        reads_qdq=True,
    ),
    "litert": ExportTarget(
        "a LiteRT file",
        "repvgg.deploy.formats.litert",
        ".tflite",
        why_not_run="litert-torch, which writes the files, requires an older PyTorch than this library is tested with",
    ),
    "c": ExportTarget(
        "a C library",
        "repvgg.deploy.c_library",
        "",
        "engine",
        ("llvmlite",),
        ("target", "max_batch", "threads", "packed_weights", "name", "precision"),
        "lib*.a",
        runtime="repvgg",
        dynamic_batch=False,
        precisions=("float32",),
    ),
    "web": ExportTarget(
        "a page for browsers",
        "repvgg.deploy.web",
        "",
        "onnx",
        _ONNX,
        ("onnxruntime_web", "single_file", "crop_fraction", "interpolation"),
        "repvgg-page.json",
        why_not_run="a page runs in a browser",
        precisions=("float32",),
    ),
}


def axes_in_words(axes: Iterable[int | None]) -> str:
    """Return the axes of a tensor separated by commas, an open one as N."""
    return ", ".join("N" if axis is None else str(axis) for axis in axes)


def export_target(name: str) -> ExportTarget:
    """Return a target of the table.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        advice = did_you_mean(name, TARGETS, f"choose one of {', '.join(TARGETS)}.")
        raise UsageError(f"There is no export target {name!r}: {advice}")
    return TARGETS[name]


def target_module(name: str) -> Any:
    """Import and return the module of a target.

    Raises:
        UsageError: there is none of that name.
    """
    # What it needs to export is checked with the request: to load a file takes fewer packages, which the loader names.
    return importlib.import_module(export_target(name).module)


def check_request(name: str, out: Path, options: Mapping[str, Any], precision: FloatPrecision = "float32") -> None:
    """Check the name of the output and the options of a target, before the work begins.

    Raises:
        UsageError: the target is unknown, the name has another suffix, or the target has no such option or precision.
        MissingDependencyError: a package that it needs is not installed.
    """
    target = export_target(name)
    if target.suffix and out.suffix != target.suffix:
        raise UsageError(f"--to {name} writes {target.about}: end {str(out)!r} in {target.suffix}.")
    for option in options:
        if option not in target.options:
            raise UsageError(f"--{option.replace('_', '-')} is not an option of --to {name}.")
    if precision not in target.precisions:
        raise UsageError(f"--to {name} writes {', '.join(target.precisions)} only: leave out --precision.")
    target.check_packages()


def check_files_beside(name: str, out: Path, *, overwrite: bool = False) -> None:
    """Check that the weights next to ``out`` may be written, and that they are not those of another export.

    Raises:
        OutputExistsError: they exist and ``overwrite`` is not set, or they belong to another file, which would lose
            them.
    """
    target = export_target(name)
    if not target.weights:
        return
    weights = out.with_suffix(target.weights)
    for other_name, other in TARGETS.items():
        another = out.with_suffix(other.suffix)
        if other_name != name and other.weights == target.weights and another.exists():
            raise OutputExistsError(
                f"{str(weights)!r} has the weights of {another.name!r}, and would have those of {out.name!r}: choose "
                f"another name, such as {f'{out.stem}.{name}{out.suffix}'!r}."
            )
    if weights.exists() and not out.exists():
        raise OutputExistsError(
            f"{str(weights)!r} exists without {out.name!r}, so that it is something else: move it, or choose another "
            "name."
        )
    check_output(weights, overwrite=overwrite)


def export(name: str, request: ExportRequest) -> Exported:
    """Export a network to a target. Raises what the target does, and as :func:`check_request`."""
    check_request(name, request.out, request.options, request.precision)
    check_files_beside(name, request.out, overwrite=request.overwrite)
    exported: Exported = target_module(name).export(request)
    return exported
