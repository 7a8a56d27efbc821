"""The static quantization of ONNX Runtime and of NNCF, with every setting that makes sense for a CNN on a CPU."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor

from repvgg.deploy.openvino import openvino_core
from repvgg.errors import require

_BATCH = 16  # calibration images at once, at most
_INPUT = "image"  # name of the input in the files of this library

Types = Literal["U8S8", "S8S8", "U8U8"]
Calibration = Literal["MinMax", "Entropy", "Percentile"]


@final
@dataclass(frozen=True)
class OnnxRuntimeSettings:
    """Arguments of ``onnxruntime.quantization.quantize_static``.

    Attributes:
        types: of activations and weights.
        per_channel: a scale for each output channel of a weight.
        reduce_range: weights of 7 bits.
        calibration: how the ranges of activations are chosen.
    """

    types: Types
    per_channel: bool
    reduce_range: bool
    calibration: Calibration

    @property
    def key(self) -> str:
        granularity = "channel" if self.per_channel else "tensor"
        reduced = "-reduced" if self.reduce_range else ""
        return f"onnxruntime-{self.types}-{granularity}{reduced}-{self.calibration}".lower()

    @property
    def title(self) -> str:
        granularity = "per channel" if self.per_channel else "per tensor"
        reduced = ", reduce_range" if self.reduce_range else ""
        return f"ONNX Runtime {self.types} {granularity}{reduced}, {self.calibration}"

    def write(self, float_file: Path, calibration: Tensor, out: Path) -> None:
        """Quantize an ONNX file with calibration images (N, C, H, W).

        Raises:
            MissingDependencyError: onnxruntime is not installed.
        """
        library = require("onnxruntime.quantization", "onnx")
        preprocess = require("onnxruntime.quantization.shape_inference", "onnx").quant_pre_process
        activations, weights = (library.QuantType[_TYPES[letter]] for letter in self.types.split("8")[:2])
        with tempfile.TemporaryDirectory() as folder, _quiet():
            prepared = Path(folder) / "prepared.onnx"
            # Symbolic shape inference is for transformers.
            preprocess(str(float_file), str(prepared), skip_symbolic_shape=True)
            library.quantize_static(
                str(prepared),
                str(out),
                _reader(library.CalibrationDataReader, calibration),
                quant_format=library.QuantFormat.QDQ,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                activation_type=activations,
                weight_type=weights,
                calibrate_method=library.CalibrationMethod[self.calibration],
            )


_TYPES = {"U": "QUInt8", "S": "QInt8"}


@final
@dataclass(frozen=True)
class NncfSettings:
    """Arguments of ``nncf.quantize``; None leaves NNCF's default.

    Attributes:
        key: in files.
        title: for readers.
        mixed: activations asymmetric ("MIXED"), instead of symmetric.
        full_bias_correction: the accurate bias correction instead of the fast one.
        overflow_fix: half of the range of weights: "ENABLE" everywhere, "DISABLE" nowhere.
        channel_alignment: rescale channels between layers first; NNCF has it for OpenVINO IR, which is written then.
    """

    key: str
    title: str
    mixed: bool = False
    full_bias_correction: bool = False
    overflow_fix: Literal["ENABLE", "DISABLE"] | None = None
    channel_alignment: bool = False

    def write(self, float_file: Path, calibration: Tensor, out: Path) -> None:
        """Quantize an ONNX file with calibration images (N, C, H, W).

        Raises:
            MissingDependencyError: nncf, onnx or openvino is not installed.
        """
        model: Any
        if self.channel_alignment:
            model = openvino_core().read_model(str(float_file))
        else:
            onnx = require("onnx", "onnx")
            model = onnx.load(float_file)
        with _quiet():
            nncf = require("nncf", "nncf")
            advanced = require("nncf.quantization.advanced_parameters", "nncf")
            nncf.set_log_level(logging.ERROR)
            options: dict[str, Any] = {}
            if self.mixed:
                options["preset"] = nncf.QuantizationPreset.MIXED
            more: dict[str, Any] = {"disable_channel_alignment": not self.channel_alignment}
            if self.overflow_fix is not None:
                more["overflow_fix"] = advanced.OverflowFix[self.overflow_fix]
            images = nncf.Dataset(torch.split(calibration, 1), lambda image: {_INPUT: image.numpy()})
            quantized = nncf.quantize(
                model,
                images,
                subset_size=len(calibration),
                fast_bias_correction=not self.full_bias_correction,
                advanced_parameters=nncf.AdvancedQuantizationParameters(**more),
                **options,
            )
        if self.channel_alignment:
            require("openvino", "openvino").save_model(quantized, str(out), compress_to_fp16=False)
        else:
            onnx.save(quantized, out)


#: 7 bits are for signed weights: products of unsigned ones are added in 32 bits.
ONNX_RUNTIME_SETTINGS = tuple(
    OnnxRuntimeSettings(types, per_channel, reduce_range, calibration)
    for types in get_args(Types)
    for per_channel in (False, True)
    for reduce_range in ((False, True) if types != "U8U8" else (False,))
    for calibration in get_args(Calibration)
)
NNCF_SETTINGS = (
    NncfSettings("nncf-default", "NNCF, defaults"),
    NncfSettings("nncf-mixed", "NNCF, MIXED", mixed=True),
    NncfSettings("nncf-full", "NNCF, full bias correction", full_bias_correction=True),
    NncfSettings("nncf-full-mixed", "NNCF, full bias correction, MIXED", mixed=True, full_bias_correction=True),
    NncfSettings(
        "nncf-full-mixed-fix", "NNCF, full bias correction, MIXED, OverflowFix", True, True, overflow_fix="ENABLE"
    ),
    NncfSettings(
        "nncf-full-mixed-nofix", "NNCF, full bias correction, MIXED, no OverflowFix", True, True, overflow_fix="DISABLE"
    ),
    NncfSettings(
        "nncf-alignment", "NNCF, full bias correction, MIXED, channel alignment", True, True, channel_alignment=True
    ),
)


def _reader(base: type[Any], calibration: Tensor) -> Any:
    # Histograms need batches of one size.
    size = max(size for size in range(1, _BATCH + 1) if len(calibration) % size == 0)

    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(torch.split(calibration, size))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {_INPUT: batch.numpy()}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress output and the warnings of a library off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
