"""Export an ONNX file, such as a quantized one (``repvgg quantize``), to the targets that read ONNX."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from repvgg._files import atomic_files
from repvgg.deploy.comparison_images import border_images, photographs, split_to
from repvgg.deploy.file_target import Written
from repvgg.deploy.loading import run_in_parts
from repvgg.deploy.onnx import OnnxRunner
from repvgg.deploy.preprocessing import PIXEL_MAX, read_preprocessing
from repvgg.deploy.targets import Exported, Runner, axes_in_words, check_files_beside, export_target, target_module
from repvgg.errors import EquivalenceError, ExportError, MissingDependencyError, UsageError, first_line, require
from repvgg.quantization.calibration import first_tensor
from repvgg.verify import verify

#: The outputs of a quantized file in another runtime may differ from the source's by so many times the error (root mean
#: square) that rounding its activations to 8 bits makes: integer kernels round ties in other ways, and some saturate on
#: CPUs without VNNI.
QUANTIZATION_FACTOR = 4.0


def is_onnx_source(source: str) -> bool:
    """Return whether the SOURCE of an export is an ONNX file."""
    return source.endswith(".onnx") and Path(source).is_file()


def export_onnx_file(name: str, source: Path, out: Path, *, overwrite: bool = False) -> Exported:
    """Convert an ONNX file to a target, and keep the result if it computes the same.

    A float file is compared with ONNX Runtime without its optimizations, by the tolerance of float32. A quantized one
    may differ by :data:`QUANTIZATION_FACTOR` times the error of its own rounding.

    Args:
        name: of a target that reads ONNX.
        source: the file; it takes one batch of images.
        out: the file to write.
        overwrite: replace it if it exists.

    Raises:
        UsageError: the target reads no ONNX files.
        ExportError: the file cannot be read, converted or run.
        EquivalenceError: the result computes something else.
        OutputError: it cannot be written.
    """
    target = export_target(name)
    if not target.reads_qdq:
        raise UsageError(f"--to {name} takes a network, not an ONNX file: name the checkpoint that it was made of.")
    target.check_packages()
    check_files_beside(name, out, overwrite=overwrite)
    exact = OnnxRunner(source, torch.get_num_threads(), optimize=False)
    shape = exact.input_shape
    if len(exact.inputs) != 1 or len(shape) != 4 or None in shape[1:]:
        raise ExportError(f"{str(source)!r} does not take one batch of images of a fixed size.")
    graph = require("onnx", "onnx").load(str(source)).graph
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
    module = target_module(name)
    with atomic_files(out, overwrite=overwrite) as part:
        try:
            written: Written = module.convert_onnx(source, part, exact.notes)
        except (ExportError, MissingDependencyError):
            raise
        except Exception as error:  # each converter has its own exceptions
            raise ExportError(f"{str(source)!r} cannot be converted: {first_line(error)}.") from error
        result = _compare(exact, module.load(part), quantized=quantized)
    number = "one image at a time" if shape[0] == 1 else "any number of images"
    what = "quantized to 8 bits" if quantized else "float32"
    contents = f"{number} of {' x '.join(map(str, shape[1:]))}, {what}"
    remarks = [*written.remarks, result, *([] if target.runtime else [f"converted, not run: {target.why_not_run}."])]
    inputs = {one: axes_in_words(axes) for one, axes in exact.inputs.items()}
    return Exported(out, contents, None, tuple(remarks), None, inputs, exact.outputs, written.inventory)


def _compare(exact: OnnxRunner, candidate: Runner, *, quantized: bool) -> str:
    """Return how the two compare, in a sentence; raise EquivalenceError if they differ."""
    images = _images(exact, photographs_only=quantized)
    if not quantized:
        evidence = verify(exact, candidate, images).raise_if_failed()
        return f"relative error {evidence.relative:.1e} against ONNX Runtime, {evidence.tolerance:.1e} allowed."
    with TemporaryDirectory() as folder:
        unrounded = Path(folder) / "unrounded.onnx"
        write_without_rounding(exact.path, unrounded)
        runs: tuple[Runner, ...] = exact, OnnxRunner(unrounded, torch.get_num_threads()), candidate
        source, rounded, found = (
            torch.cat([first_tensor(run_in_parts(run, x)) for x in images]).double() for run in runs
        )
    allowed = QUANTIZATION_FACTOR * _rms(rounded - source)
    error, size = _rms(found - source), _rms(source)
    if not error <= allowed:
        raise EquivalenceError(
            f"The file differs from its source by {error / size:.1e} of the outputs, and {allowed / size:.1e} is "
            f"allowed, {QUANTIZATION_FACTOR:g} times the error of its own rounding to 8 bits: its runtime computes "
            "something else."
        )
    return (
        f"differs from the float arithmetic of the source by {error / size:.1e} of the outputs (root mean squares), "
        f"{allowed / size:.1e} allowed: {QUANTIZATION_FACTOR:g} times the error of its own rounding to 8 bits."
    )


def _images(exact: OnnxRunner, *, photographs_only: bool) -> list[Tensor]:
    """Return border images and photographs as the file takes them, or only the latter if there are any.

    A quantized file clips what border images lead to, and the error of that would hide all others.
    """
    preprocessing = read_preprocessing(exact.notes)
    channels, height, width = (axis or 1 for axis in exact.input_shape[1:])
    in_graph = preprocessing is not None and preprocessing.in_graph
    images = border_images((channels, height, width), preprocessing, pixels=in_graph)
    with suppress(MissingDependencyError):
        pixels = photographs((channels, height, width))
        if not in_graph:
            pixels = pixels / PIXEL_MAX if preprocessing is None else preprocessing.apply(pixels)
        images = [pixels] if photographs_only else [*images, pixels]
    return split_to(images, exact.input_shape[0])


def write_without_rounding(source: Path, path: Path) -> None:
    """Write a quantized ONNX file again without the nodes that round activations; weights stay as they are."""
    onnx: Any = require("onnx", "onnx")
    proto = onnx.load(str(source))
    rounded = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    unrounded = {
        node.output[0]: rounded[node.input[0]]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded
    }
    kept = [node for node in proto.graph.node if node.op_type != "QuantizeLinear" and node.output[0] not in unrounded]
    for node in kept:
        for index, name in enumerate(node.input):
            while name in unrounded:  # rounded twice in a row
                name = unrounded[name]
            node.input[index] = name
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    onnx.save(proto, str(path))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
