"""Evaluate a quantized ONNX file in its runtimes: SQNR, agreement, accuracy or mIoU, saturation, latency."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import final

import torch
from torch import Tensor, nn

from repvgg.deploy.onnx import OnnxRunner, export_onnx
from repvgg.deploy.openvino import compile_for_cpu, openvino_core
from repvgg.deploy.qdq import export_qdq
from repvgg.errors import ExportError, MissingDependencyError, first_line
from repvgg.measure import INTERLEAVED, REST_SECONDS, take_samples
from repvgg.measure.timing import Sample
from repvgg.quantization import (
    Quality,
    QualityMeter,
    QuantizationReport,
    QuantizationSettings,
    Reference,
    quantize,
)
from repvgg.quantization.calibration import first_tensor

_SATURATION_DB = 1.0  # loss of integer kernels against the same file in float arithmetic; rounding alone loses less
_EMULATED_IMAGES, _EMULATED_MAPS = 512, 16  # float arithmetic is slow: so many tell saturation from rounding
#: Granularities that are tried; the first wins ties. Weights are in bounded pairs, also on CPUs whose kernels do not
#: saturate: the file may run on others.
CHOICES = (QuantizationSettings(granularity="per_channel"), QuantizationSettings(granularity="per_tensor"))
RUNTIMES = ("ONNX Runtime", "OpenVINO")

Runner = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Latency:
    """The time of a call of a quantized file, by default with one image, and of the float file in the same rounds.

    Attributes:
        milliseconds: median.
        float_milliseconds: the same of the float network.
        speedup: median over the rounds of the float network's time divided by that of the quantized file.
    """

    milliseconds: float
    float_milliseconds: float
    speedup: float

    def __str__(self) -> str:
        return (
            f"{self.milliseconds:.2f} ms a call, float32 {self.float_milliseconds:.2f} ms: "
            f"{self.speedup:.2f} times as fast"
        )


@final
@dataclass(frozen=True)
class RuntimeResult:
    """A quantized file in one runtime, compared with the float network.

    Attributes:
        runtime: its name.
        quality: the outputs compared with those of the float network in PyTorch.
        latency: beside that of the float network in the same runtime; None if it was not timed.
        saturation: what integer kernels lose against float arithmetic with the same file on the same images, in dB;
            None if the runtime has no such arithmetic.
    """

    runtime: str
    quality: Quality
    latency: Latency | None = None
    saturation: float | None = None

    @property
    def saturates(self) -> bool:
        """Whether integer kernels lose more than rounding explains: sums saturate, as U8S8 kernels do without VNNI."""
        return self.saturation is not None and self.saturation > _SATURATION_DB

    def __str__(self) -> str:
        text = f"{self.runtime}: {self.quality}"
        if self.latency is not None:
            text += f", {self.latency}"
        if self.saturates:
            text += (
                f"; its integer kernels saturate on this CPU, {self.saturation:.1f} dB are lost: weights in bounded "
                "pairs, or of 7 bits, do not"
            )
        return text


def evaluate_int8(
    path: str | os.PathLike[str],
    reference: Reference,
    *,
    runtimes: Iterable[str] = RUNTIMES,
    rounds: int = 10,
    batch: int = 1,
    float_file: Path | None = None,
) -> list[RuntimeResult]:
    """Run a quantized ONNX file in ONNX Runtime, and in OpenVINO if it is installed, on the images of ``reference``.

    Args:
        path: the file.
        reference: the float network on other images than those of the calibration.
        runtimes: names from :data:`RUNTIMES`.
        rounds: how often each file is timed; 0 does not time.
        batch: images in a timed call.
        float_file: the float network as ONNX; None writes one for the timing.

    Raises:
        ExportError: the file cannot be loaded or run.
        UsageError: there are no images.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if rounds and float_file is None:
            float_file = Path(folder) / "float.onnx"
            export_onnx(reference.model, float_file, reference.shape)
        for name in runtimes:
            try:
                quantized = load_runner(name, path)
            except MissingDependencyError:
                if name == RUNTIMES[0]:
                    raise
                continue
            emulated = load_runner(name, path, emulate=True) if name == RUNTIMES[0] else None
            quality, saturation = _compare(reference, quantized, emulated)
            latency = None
            if rounds and float_file is not None:
                images = next(iter(reference)).images[:1].repeat_interleave(batch, 0)
                latency = time_int8(quantized, load_runner(name, float_file), images, rounds)
            results.append(RuntimeResult(name, quality, latency, saturation))
    return results


def quantize_for_cpu(
    model: nn.Module,
    calibration: Tensor,
    selection: Reference,
    settings: QuantizationSettings,
    choices: Sequence[QuantizationSettings] = CHOICES,
) -> tuple[nn.Module, QuantizationReport, dict[str, Quality]]:
    """Quantize with the choice that does best in ONNX Runtime on this CPU, such as the granularity.

    Args:
        model: a plain network.
        calibration: images for :func:`repvgg.quantize`.
        selection: the network on the images on which the choices are compared: neither those of the calibration, nor
            those of an evaluation, which the choice would favour.
        settings: everything else.
        choices: settings whose granularity, bits and bound are tried.

    Returns:
        The network and the report of the best choice, and the quality of each in ONNX Runtime by its description.
    """
    best: tuple[nn.Module, QuantizationReport] | None = None
    tried: dict[str, Quality] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, choice in enumerate(choices):
            tried_settings = replace(
                settings,
                granularity=choice.granularity,
                weight_bits=choice.weight_bits,
                pair_bound=choice.pair_bound,
            )
            quantized, report = quantize(model, calibration, tried_settings)
            file = Path(folder) / f"{index}.onnx"
            export_qdq(quantized, file, selection.shape)
            quality = selection.compare(load_runner(RUNTIMES[0], file))
            if not tried or quality.sqnr > max(other.sqnr for other in tried.values()):
                best = quantized, report
            tried[choice.weights] = quality
    assert best is not None
    return *best, tried


def load_runner(runtime: str, path: str | os.PathLike[str], *, emulate: bool = False) -> Runner:
    """Return a callable that runs an ONNX file with PyTorch's number of threads; OpenVINO reads its IR, too.

    Args:
        runtime: a name from :data:`RUNTIMES`.
        path: the file.
        emulate: run the nodes of the file one by one, in float arithmetic; ONNX Runtime only.

    Raises:
        ExportError: the file cannot be loaded.
        MissingDependencyError: the runtime is not installed.
    """
    if runtime == RUNTIMES[0]:
        runner = OnnxRunner(path, torch.get_num_threads(), optimize=not emulate)
        return lambda x: first_tensor(runner(x))
    core = openvino_core()
    try:
        request = compile_for_cpu(core, core.read_model(os.fspath(path)))
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot load the file: {first_line(error)}.") from error
    return lambda x: torch.from_numpy(request.infer([x.contiguous().numpy()])[0].copy())


def _compare(reference: Reference, quantized: Runner, emulated: Runner | None) -> tuple[Quality, float | None]:
    """Return the quality in integer kernels, and what they lose against float arithmetic on the first images."""
    meter, in_integers, in_floats = QualityMeter(), QualityMeter(), QualityMeter()
    compared = 0
    for images, labels, expected in reference:
        found = quantized(images)
        meter.add(expected, found, labels)
        if emulated is not None and compared < (_EMULATED_MAPS if expected.ndim == 4 else _EMULATED_IMAGES):
            in_integers.add(expected, found)
            in_floats.add(expected, emulated(images))
            compared += len(images)
    saturation = in_floats.quality.sqnr - in_integers.quality.sqnr if emulated is not None else None
    return meter.quality, saturation


def time_int8(quantized: Runner, as_float: Runner, images: Tensor, rounds: int) -> Latency:
    """Time two files on the same images in the same rounds."""
    samples: list[Sample] = []
    protocol = replace(INTERLEAVED, rounds=rounds, rest_seconds=REST_SECONDS)
    take_samples({"int8": lambda: quantized(images), "float32": lambda: as_float(images)}, protocol, samples.append)
    ours, theirs = ([sample[name] for sample in samples] for name in ("int8", "float32"))
    ratio = median(other / one for one, other in zip(ours, theirs, strict=True))
    return Latency(1e3 * median(ours), 1e3 * median(theirs), ratio)
