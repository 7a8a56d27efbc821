"""What each step of a quantization is worth for a network: measured one by one and all together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn

from repvgg.quantization.api import quantize
from repvgg.quantization.quality import Quality
from repvgg.quantization.reference import Batches, Reference, in_batches
from repvgg.quantization.settings import QuantizationSettings

#: Nothing but rounding: what a converter without options does.
NEAREST = QuantizationSettings(
    granularity="per_tensor", pair_bound=False, ranges="minmax", equalize=False, correct_biases=False, rounding_sweeps=0
)
#: What each step changes in those settings.
STEPS: dict[str, dict[str, Any]] = {
    "weights per channel": {"granularity": "per_channel"},
    "ranges of the smallest squared error": {"ranges": "mse"},
    "cross-layer equalization": {"equalize": True},
    "adaptive rounding": {"rounding_sweeps": 2},
    "bias correction": {"correct_biases": True},
}


@final
@dataclass(frozen=True)
class Step:
    """The quality with one step alone.

    Attributes:
        name: of the step.
        quality: of the network with this step alone.
        gain: its SQNR minus that without any step, in dB.
    """

    name: str
    quality: Quality
    gain: float


@final
@dataclass(frozen=True)
class StepReport:
    """What the steps are worth, the most useful first.

    Attributes:
        nearest: the quality without any of them.
        steps: each alone, by descending gain.
        together: all of them.
    """

    nearest: Quality
    steps: tuple[Step, ...]
    together: Quality

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        lines = [f"{'rounding alone':{width}}  {self.nearest}"]
        lines += [f"{step.name:{width}}  {step.gain:+.1f} dB: {step.quality}" for step in self.steps]
        lines.append(f"{'all together':{width}}  {self.together.sqnr - self.nearest.sqnr:+.1f} dB: {self.together}")
        return "\n".join(lines)


def measure_steps(
    model: nn.Module,
    calibration: Tensor,
    images: Tensor | Batches,
    labels: Tensor | None = None,
) -> StepReport:
    """Quantize ``model`` without any step, with each one alone, and with all, and compare the outputs on ``images``.

    Args:
        model: a plain network.
        calibration: as for :func:`quantize`.
        images: (N, C, H, W), other images than those of the calibration; or batches of them with labels or masks.
        labels: (N,) true classes of a tensor of images, if known.
    """
    reference = Reference(model, in_batches(images, labels) if isinstance(images, Tensor) else images)

    def quality(settings: QuantizationSettings) -> Quality:
        quantized, _ = quantize(model, calibration, settings)
        return reference.compare(quantized)

    nearest = quality(NEAREST)
    found = {name: quality(replace(NEAREST, **change)) for name, change in STEPS.items()}
    steps = [Step(name, one, one.sqnr - nearest.sqnr) for name, one in found.items()]
    return StepReport(nearest, tuple(sorted(steps, key=lambda step: -step.gain)), quality(QuantizationSettings()))
