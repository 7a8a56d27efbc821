"""The rows of ``repvgg study int8``: who quantizes a network, and how."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from torch import Tensor, nn

from repvgg.deploy.int8 import RUNTIMES
from repvgg.deploy.qdq import export_qdq
from repvgg.quantization import QuantizationSettings, quantize
from repvgg.quantization.steps import NEAREST
from repvgg.studies.int8_libraries import NNCF_SETTINGS, ONNX_RUNTIME_SETTINGS, NncfSettings, OnnxRuntimeSettings

Family = Literal["float", "onnxruntime", "nncf", "ours", "trained"]


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


@final
@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        key: in files, and for ``--rows``.
        family: who quantizes.
        title: for readers.
        write: quantizes a network and writes an ONNX file.
        runtimes: that run the file.
    """

    key: str
    family: Family
    title: str
    write: Callable[[Subject, Path], None]
    runtimes: tuple[str, ...] = RUNTIMES


def _copy_float(subject: Subject, out: Path) -> None:
    shutil.copyfile(subject.float_file, out)


def _copy_trained(subject: Subject, out: Path) -> None:
    assert subject.trained_file is not None
    shutil.copyfile(subject.trained_file, out)


def _by_library(settings: OnnxRuntimeSettings | NncfSettings, subject: Subject, out: Path) -> None:
    settings.write(subject.float_file, subject.calibration, out)


def _by_us(settings: QuantizationSettings, subject: Subject, out: Path) -> None:
    quantized, _ = quantize(subject.plain, subject.calibration, settings)
    _, channels, height, width = subject.calibration.shape
    export_qdq(quantized, out, (channels, height, width))


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


#: The row that the others are compared with: all steps.
OURS = "ours-bounded"
FLOAT = Row("float", "float", "float32", _copy_float)
TRAINED = Row("trained", "trained", "integers of quantization-aware training", _copy_trained)
ROWS: tuple[Row, ...] = (
    FLOAT,
    *_our_rows(),
    TRAINED,
    *(Row(one.key, "nncf", one.title, partial(_by_library, one)) for one in NNCF_SETTINGS),
    *(Row(one.key, "onnxruntime", one.title, partial(_by_library, one)) for one in ONNX_RUNTIME_SETTINGS),
)
