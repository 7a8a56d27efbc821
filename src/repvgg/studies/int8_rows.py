"""The rows of ``repvgg study int8``: who quantizes a network, and how."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor, nn

from repvgg.deploy.int8 import RUNTIMES
from repvgg.deploy.onnx import export_onnx
from repvgg.deploy.qdq import export_qdq
from repvgg.quantization import QuantizationSettings, quantize, rescale_randomly
from repvgg.quantization.steps import NEAREST
from repvgg.studies.int8_libraries import NNCF_SETTINGS, ONNX_RUNTIME_SETTINGS, NncfSettings, OnnxRuntimeSettings

Family = Literal["float", "onnxruntime", "nncf", "ours", "trained"]
#: Channels of a rescaled network have random factors of up to this.
LARGEST_FACTOR = 1000.0


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """A network to quantize.

    Attributes:
        plain: in its plain form.
        float_file: the same as ONNX.
        calibration: images (N, C, H, W).
        trained_file: the file of integers that quantization-aware training left, if there is one.
    """

    plain: nn.Module
    float_file: Path
    calibration: Tensor
    trained_file: Path | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, channels, height, width = self.calibration.shape
        return channels, height, width

    @cached_property
    def rescaled(self) -> Subject:
        """The same function with channels whose scales are random."""
        plain = rescale_randomly(self.plain, self.calibration[:1], largest=LARGEST_FACTOR)
        file = self.float_file.with_name(f"rescaled-{self.float_file.name}")
        export_onnx(plain, file, self.shape, overwrite=True)
        return Subject(plain, file, self.calibration)


@final
@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        key: in files, and for ``--rows``.
        family: who quantizes.
        title: for readers.
        write: quantizes a network and writes a file.
        runtimes: that run the file.
        suffix: of the file.
        rescales: key of the row that quantizes the network as it is, where this one quantizes it with channels of
            random scales.
        source: file whose integers the row copies, for the family ``trained``.
    """

    key: str
    family: Family
    title: str
    write: Callable[[Subject, Path], None]
    runtimes: tuple[str, ...] = RUNTIMES
    suffix: str = ".onnx"
    rescales: str = ""
    source: Path | None = None


def as_key(text: str) -> str:
    """Return what is left of a text in the names of files and of ``--rows``; may be empty."""
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-._")


def trained_row(file: Path) -> Row:
    """Return the row of a file that a run of quantization-aware training left in its folder."""
    name = file.parent.name
    write = partial(_copy, lambda subject: file)
    return Row(f"trained-{as_key(name)}", "trained", f"quantization-aware training, {name}", write, source=file)


def _copy(file: Callable[[Subject], Path | None], subject: Subject, out: Path) -> None:
    source = file(subject)
    assert source is not None
    shutil.copyfile(source, out)


def _by_library(settings: OnnxRuntimeSettings | NncfSettings, subject: Subject, out: Path) -> None:
    settings.write(subject.float_file, subject.calibration, out)


def _by_us(settings: QuantizationSettings, subject: Subject, out: Path) -> None:
    quantized, _ = quantize(subject.plain, subject.calibration, settings)
    export_qdq(quantized, out, subject.shape)


def _rescaled(row: Row, title: str = "") -> Row:
    """Return the row that does the same to the network with channels of random scales."""

    def write(subject: Subject, out: Path) -> None:
        row.write(subject.rescaled, out)

    return replace(
        row, key=f"rescaled-{row.key}", title=title or f"rescaled channels; {row.title}", write=write, rescales=row.key
    )


def _our_rows() -> tuple[Row, ...]:
    """Return the steps, each one on top of those before it, and two alternatives to the last one."""
    added: dict[str, tuple[str, dict[str, Any]]] = {
        "mse": ("+ ranges of the smallest squared error", {"ranges": "mse"}),
        "equalized": ("+ cross-layer equalization", {"equalize": True}),
        "rounding": ("+ adaptive rounding", {"rounding_sweeps": 2}),
        "bias": ("+ bias correction", {"correct_biases": True}),
        "channel": ("+ weights per channel", {"granularity": "per_channel"}),
        "bounded": ("+ bounded pairs of weights (the default)", {"pair_bound": True}),
    }
    settings = NEAREST
    rows = [Row("ours-nearest", "ours", "ours: per tensor, whole ranges, nearest", partial(_by_us, settings))]
    for key, (title, change) in added.items():
        settings = replace(settings, **change)
        rows.append(Row(f"ours-{key}", "ours", f"ours: {title}", partial(_by_us, settings)))
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "7-bit": ("7 bits in place of bounded pairs", {"weight_bits": 7, "pair_bound": False}),
        "tensor": ("per tensor, bounded pairs", {"granularity": "per_tensor"}),
    }
    for key, (title, change) in others.items():
        row = Row(f"ours-{key}", "ours", f"ours: {title}", partial(_by_us, replace(settings, **change)))
        rows.append(row)
    return tuple(rows)


def _nncf_row(settings: NncfSettings) -> Row:
    write = partial(_by_library, settings)
    if settings.channel_alignment:  # which NNCF has for OpenVINO's own format only
        return Row(settings.key, "nncf", settings.title, write, RUNTIMES[1:], ".xml")
    return Row(settings.key, "nncf", settings.title, write)


#: The row that the others are compared with: all steps.
OURS = "ours-bounded"
FLOAT = Row("float", "float", "float32", partial(_copy, lambda subject: subject.float_file))
TRAINED = Row(
    "trained",
    "trained",
    "integers of quantization-aware training",
    partial(_copy, lambda subject: subject.trained_file),
)
_QUANTIZED: tuple[Row, ...] = (
    *_our_rows(),
    *map(_nncf_row, NNCF_SETTINGS),
    *(Row(one.key, "onnxruntime", one.title, partial(_by_library, one)) for one in ONNX_RUNTIME_SETTINGS),
)
_RESCALED = (
    "ours-nearest",
    OURS,
    "nncf-default",
    "nncf-full-mixed-fix",
    "nncf-alignment",
    "onnxruntime-u8s8-tensor-minmax",
    "onnxruntime-u8s8-channel-reduced-minmax",
    "onnxruntime-u8u8-channel-minmax",
)
ROWS: tuple[Row, ...] = (
    FLOAT,
    *(row for row in _QUANTIZED if row.family == "ours"),
    TRAINED,
    *(row for row in _QUANTIZED if row.family != "ours"),
    _rescaled(FLOAT, "rescaled channels, float32"),
    *(_rescaled(row) for row in _QUANTIZED if row.key in _RESCALED),
)
