"""Export an ONNX file, such as a quantized one (``repvgg quantize``), to the targets that read ONNX."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg._files import atomic_files
from repvgg.deploy.comparison_images import border_images, photographs, split_to
from repvgg.deploy.file_target import Written
from repvgg.deploy.onnx import OnnxRunner, graph_inventory
from repvgg.deploy.preprocessing import read_preprocessing
from repvgg.deploy.targets import Exported, Runner, export_target, target_module
from repvgg.errors import EquivalenceError, ExportError, MissingDependencyError, UsageError, first_line, require
from repvgg.quantization.quality import sqnr
from repvgg.verify import verify

#: The least signal-to-noise ratio, in decibels, of a quantized file in another runtime against the arithmetic of the
#: source. Integer kernels round ties in other ways, and without VNNI some saturate, which costs down to 17 dB; an
#: exchanged channel or a wrong scale leaves less than 10 dB.
MIN_SQNR = 15.0


def is_onnx_source(source: str) -> bool:
    """Return whether the SOURCE of an export is an ONNX file."""
    return source.endswith(".onnx") and Path(source).is_file()


def export_onnx_file(name: str, source: Path, out: Path, *, overwrite: bool = False) -> Exported:
    """Convert an ONNX file to a target, and keep the result if it computes the same.

    A float file is compared with ONNX Runtime without its optimizations, by the tolerance of float32. A quantized one
    is compared by its signal-to-noise ratio, which is at least :data:`MIN_SQNR`.

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
    exact = OnnxRunner(source, torch.get_num_threads(), optimize=False)
    shape = exact.input_shape
    if len(exact.inputs) != 1 or len(shape) != 4 or None in shape[1:]:
        raise ExportError(f"{str(source)!r} does not take one batch of images of a fixed size.")
    graph = require("onnx", "onnx").load(str(source)).graph
    quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
    module = target_module(name)
    with atomic_files(out, overwrite=overwrite) as part:
        try:
            written = _convert(name, module, source, part, graph, exact.notes)
        except (ExportError, MissingDependencyError):
            raise
        except Exception as error:  # each converter has its own exceptions
            raise ExportError(f"{str(source)!r} cannot be converted: {first_line(error)}.") from error
        result = _compare(exact, module.load(part), exact.notes, quantized=quantized)
    number = "one image at a time" if shape[0] == 1 else "any number of images"
    what = "quantized to 8 bits" if quantized else "float32"
    contents = f"{number} of {' x '.join(map(str, shape[1:]))}, {what}"
    remarks = [*written.remarks, result, *([] if target.runtime else [f"converted, not run: {target.why_not_run}."])]
    inputs = {one: ", ".join("N" if axis is None else str(axis) for axis in axes) for one, axes in exact.inputs.items()}
    return Exported(out, contents, None, tuple(remarks), None, inputs, exact.outputs, written.inventory)


def _convert(name: str, module: Any, source: Path, part: Path, graph: Any, notes: Mapping[str, str]) -> Written:
    if name in ("openvino", "ort"):
        converted: Written = (
            module.convert_onnx(source, part, notes) if name == "openvino" else module.convert_onnx(source, part)
        )
        return converted
    module.check_fit(source)
    shutil.copyfile(source, part)
    return Written(graph_inventory(graph), None)


def _compare(exact: OnnxRunner, candidate: Runner, notes: Mapping[str, str], *, quantized: bool) -> str:
    """Return how the two compare, in a sentence; raise EquivalenceError if they differ."""
    preprocessing = read_preprocessing(notes)
    channels, height, width = (axis or 1 for axis in exact.input_shape[1:])
    in_graph = preprocessing is not None and preprocessing.in_graph
    images = border_images((channels, height, width), preprocessing, pixels=in_graph)
    try:
        pixels = photographs((channels, height, width))
        images.append(pixels if in_graph or preprocessing is None else preprocessing.apply(pixels))
    except MissingDependencyError:
        pass
    images = split_to(images, exact.input_shape[0])
    if not quantized:
        evidence = verify(exact, candidate, images).raise_if_failed()
        return f"relative error {evidence.relative:.1e} against ONNX Runtime, {evidence.tolerance:.1e} allowed."
    expected, found = (torch.cat([_first(run(batch)).flatten(1) for batch in images]) for run in (exact, candidate))
    ratio = sqnr(expected, found)
    if ratio < MIN_SQNR:
        raise EquivalenceError(
            f"The file differs from its source by a noise of {ratio:.1f} dB, and {MIN_SQNR:.0f} dB are needed: "
            "its runtime computes something else."
        )
    return f"{ratio:.1f} dB against the source in float arithmetic, {MIN_SQNR:.0f} dB needed."


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else next(iter(output.values()))
    return found
