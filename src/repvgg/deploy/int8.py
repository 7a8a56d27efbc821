"""Evaluate a quantized ONNX file in its runtimes: SQNR, top-1 agreement, accuracy, saturation, latency."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg.deploy.onnx import OnnxRunner, export_onnx
from repvgg.deploy.openvino import compile_for_cpu, openvino_core
from repvgg.deploy.qdq import export_qdq
from repvgg.errors import ExportError, MissingDependencyError, first_line
from repvgg.measure import INTERLEAVED, REST_SECONDS, take_samples
from repvgg.quantization import Quality, QuantizationReport, QuantizationSettings, compare_outputs, quantize
from repvgg.quantization.calibration import BATCH, first_tensor, run_in_batches

_SATURATION_DB = 1.0  # loss of integer kernels against the same file in float arithmetic; rounding alone loses less
#: Granularities and bits of weights that are tried, the simplest first.
CHOICES = (
    QuantizationSettings(granularity="per_channel", weight_bits=8),
    QuantizationSettings(granularity="per_tensor", weight_bits=8),
    QuantizationSettings(granularity="per_channel", weight_bits=7),
)

Runner = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class RuntimeResult:
    """A quantized file in one runtime, compared with the float network.

    Attributes:
        runtime: its name.
        quality: the outputs compared with those of the float network in PyTorch.
        milliseconds: for one image, median.
        float_milliseconds: the same of the float network in the same runtime.
        emulated: quality with the file's float arithmetic in place of integer kernels; None if the runtime cannot.
    """

    runtime: str
    quality: Quality
    milliseconds: float
    float_milliseconds: float
    emulated: Quality | None = None

    @property
    def saturates(self) -> bool:
        """Whether integer kernels lose more than rounding explains: sums saturate, as U8S8 kernels do without VNNI."""
        return self.emulated is not None and self.emulated.sqnr - self.quality.sqnr > _SATURATION_DB

    def __str__(self) -> str:
        speed = f"{self.milliseconds:.2f} ms an image, float32 {self.float_milliseconds:.2f} ms"
        text = f"{self.runtime}: {self.quality}, {speed}"
        if self.saturates:
            assert self.emulated is not None
            text += (
                f"; its integer kernels saturate on this CPU ({self.emulated.sqnr:.1f} dB in float arithmetic): "
                "use 7-bit weights"
            )
        return text


def evaluate_int8(
    path: str | os.PathLike[str],
    reference: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    expected: Tensor | None = None,
    rounds: int = 10,
) -> list[RuntimeResult]:
    """Run a quantized ONNX file in ONNX Runtime, and in OpenVINO if it is installed, on images.

    Args:
        path: the file.
        reference: the float network, in eval mode.
        images: (N, C, H, W), other ones than those of the calibration.
        labels: (N,) true classes, if known.
        expected: outputs to compare with in place of those of ``reference``, which is then timed only.
        rounds: how often each file is timed.

    Raises:
        ExportError: the file cannot be loaded or run.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    expected = run_in_batches(reference, images) if expected is None else expected
    with tempfile.TemporaryDirectory() as folder:
        float_file = Path(folder) / "float.onnx"
        export_onnx(reference, float_file, (images.shape[1], images.shape[2], images.shape[3]))
        runtimes = {"ONNX Runtime": _onnxruntime, "OpenVINO": _openvino}
        results = []
        for name, prepare in runtimes.items():
            try:
                quantized, as_float = prepare(Path(path)), prepare(float_file)
            except MissingDependencyError:
                if name == "ONNX Runtime":
                    raise
                continue
            quality = compare_outputs(expected, _outputs(quantized, images), labels)
            emulated = None
            if name == "ONNX Runtime":
                emulated = compare_outputs(expected, _outputs(_onnxruntime(Path(path), emulate=True), images), labels)
            ours, theirs = _milliseconds(quantized, as_float, images[:1], rounds)
            results.append(RuntimeResult(name, quality, ours, theirs, emulated))
    return results


def quantize_for_cpu(
    model: nn.Module,
    calibration: Tensor,
    images: Tensor,
    settings: QuantizationSettings,
    choices: Sequence[QuantizationSettings] = CHOICES,
) -> tuple[nn.Module, QuantizationReport, dict[str, Quality]]:
    """Quantize with the granularity and bits of weights that do best in ONNX Runtime on this CPU.

    Args:
        model: a plain network.
        calibration: images for :func:`repvgg.quantize`.
        images: other images, on which the choices are compared.
        settings: everything else.
        choices: settings whose granularity and bits are tried.

    Returns:
        The network and the report of the best choice, and the quality of each in ONNX Runtime by its description.
    """
    expected = run_in_batches(model, images)
    best: tuple[nn.Module, QuantizationReport] | None = None
    tried: dict[str, Quality] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, choice in enumerate(choices):
            tried_settings = replace(settings, granularity=choice.granularity, weight_bits=choice.weight_bits)
            quantized, report = quantize(model, calibration, tried_settings)
            file = Path(folder) / f"{index}.onnx"
            export_qdq(quantized, file, (images.shape[1], images.shape[2], images.shape[3]))
            quality = compare_outputs(expected, _outputs(_onnxruntime(file), images))
            if not tried or quality.sqnr > max(other.sqnr for other in tried.values()):
                best = quantized, report
            tried[f"{choice.weight_bits}-bit weights {choice.granularity.replace('_', ' ')}"] = quality
    assert best is not None
    return *best, tried


def _outputs(run: Runner, images: Tensor) -> Tensor:
    return torch.cat([run(batch) for batch in torch.split(images, BATCH)])


def _onnxruntime(path: Path, *, emulate: bool = False) -> Runner:
    runner = OnnxRunner(path, torch.get_num_threads(), optimize=not emulate)
    return lambda x: first_tensor(runner(x))


def _openvino(path: Path) -> Runner:
    core = openvino_core()
    try:
        request = compile_for_cpu(core, core.read_model(str(path)))
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot load the file: {first_line(error)}.") from error
    return lambda x: torch.from_numpy(request.infer([x.contiguous().numpy()])[0].copy())


def _milliseconds(quantized: Runner, as_float: Runner, image: Tensor, rounds: int) -> tuple[float, float]:
    seconds: dict[str, list[float]] = {"int8": [], "float32": []}

    def keep(sample: Any) -> None:
        for name, value in sample.items():
            seconds[name].append(value)

    protocol = replace(INTERLEAVED, rounds=rounds, rest_seconds=REST_SECONDS)
    take_samples({"int8": lambda: quantized(image), "float32": lambda: as_float(image)}, protocol, keep)
    return 1e3 * median(seconds["int8"]), 1e3 * median(seconds["float32"])
