"""The quantizability report: what quantization does to each layer of a network, and what would help, ranked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from repvgg._files import write_text
from repvgg.measure import environment
from repvgg.quantization import Quality, QuantizationReport, Step, StepReport
from repvgg.studies.report.quantizability_charts import (
    ChannelRanges,
    decibels,
    gain,
    gain_chart,
    inputs_picture,
    sqnr_chart,
    weights_picture,
)
from repvgg.studies.report.render import as_markup, render_page

_WIDE_SPREAD = 8.0  # max / median of channel ranges: 3 of 8 bits are lost for half of the channels
#: How to get what each measured step gives.
_OPTIONS = {
    "weights per channel": "--granularity per_channel",
    "ranges of the smallest squared error": "--ranges mse, the default",
    "cross-layer equalization": "on by default",
    "adaptive rounding": "--rounding-sweeps 2, the default",
    "bias correction": "on by default",
}


class _Training(NamedTuple):
    """What needs training, and can therefore not be measured here."""

    name: str
    how: str
    about: str


_NEEDS_TRAINING = (
    _Training(
        "quantization-aware training",
        "repvgg train --recipe qat --init CHECKPOINT --data URI",
        "a few epochs from this checkpoint, with the integers in every pass: the branches adapt to the rounding",
    ),
    _Training(
        "QARepVGG blocks",
        'repvgg.models.create_variant(NAME, "qarepvgg"), trained from scratch',
        "branches whose merged kernels have channels of similar ranges (Chu et al., AAAI 2024: RepVGG-A0 quantized "
        "after training has 52.2 % top-1, QARepVGG-A0 70.4 %)",
    ),
    _Training(
        "RepOptimizer",
        'repvgg.models.create_variant(NAME, "constant_scale") with repvgg.training.merge_constant_scale_branches',
        "trains the plain network itself: there is nothing to merge (Ding et al., ICLR 2023)",
    ),
)


class _LayerRow(NamedTuple):
    """A layer with its pictures."""

    layer: Any
    weights: Any
    inputs: Any
    reason: str | None  # why its channels cannot be rescaled


@dataclass(frozen=True, eq=False)
class QuantizabilityPage:
    """What a page shows.

    Attributes:
        name: of the network.
        created: date and time in ISO 8601.
        command: that repeats it.
        steps: each step alone, and all together.
        report: of the quantization with all steps.
        channels: ranges of the channels of each layer by name, from :func:`channel_ranges`.
        calibration: number of images of the calibration.
        images: number of images that are compared.
        runtimes: quality in ONNX Runtime on this CPU for granularities and bits, by their description; empty if it was
            not run.
        facts: settings.
    """

    name: str
    created: str
    command: str
    steps: StepReport
    report: QuantizationReport
    channels: Mapping[str, ChannelRanges]
    calibration: int
    images: int
    runtimes: Mapping[str, Quality] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """Return the page as HTML.

        Raises:
            MissingDependencyError: Jinja2 or Matplotlib is not installed.
        """
        layers = self.report.layers
        reasons = {} if self.report.equalization is None else self.report.equalization.skipped
        rows = [
            _LayerRow(
                layer,
                as_markup(weights_picture(index, layer.name, self.channels[layer.name])),
                as_markup(inputs_picture(index, layer)),
                reasons.get(layer.name),
            )
            for index, layer in enumerate(layers)
        ]
        return render_page(
            "quantizability.html.j2",
            created=self.created,
            machine=environment(),
            page=self,
            rows=rows,
            worst=min(layers, key=lambda layer: layer.sqnr_alone),
            widest=max(layers, key=lambda layer: layer.spread),
            most_clipped=max(layers, key=lambda layer: layer.clipped_share),
            best=max(self.runtimes, key=lambda name: self.runtimes[name].sqnr, default=""),
            measured=self._ranked(),
            options=_OPTIONS,
            training=_NEEDS_TRAINING,
            advice=self._advice(),
            db=decibels,
            gain=gain,
            charts={"sqnr": as_markup(sqnr_chart(layers)), "gains": as_markup(gain_chart(self._ranked()))},
        )

    def write(self, path: Path, *, overwrite: bool = False) -> Path:
        """Write the page.

        Raises:
            OutputExistsError: ``path`` exists and ``overwrite`` is not set.
            OutputError: it cannot be written.
            MissingDependencyError: see :meth:`render`.
        """
        return write_text(path, self.render(), overwrite=overwrite)

    def _ranked(self) -> Sequence[Step]:
        """Return the measured steps, the most useful first."""
        return sorted(self.steps.steps, key=lambda step: -step.gain)

    def _advice(self) -> str:
        """Return what the measurements say, in a sentence or two."""
        best = self._ranked()[0]
        lines = [f"By itself, {best.name} gains most: {gain(best.gain)}."]
        wide = [layer for layer in self.report.layers if layer.spread > _WIDE_SPREAD]
        if wide:
            still = sum(layer.equalized_spread > _WIDE_SPREAD for layer in wide)
            lines.append(
                f"In {len(wide)} of {len(self.report.layers)} layers the widest channel is more than {_WIDE_SPREAD:g} "
                f"times the median one; after equalization in {still}."
            )
        if self.steps.together.agreement < 0.99:
            lines.append("With all steps fewer than 99 % of the images keep their class: train for it, as below.")
        return " ".join(lines)


def channel_ranges(plain: nn.Module, report: QuantizationReport) -> dict[str, ChannelRanges]:
    """Return the largest absolute weight of each output channel of the quantized layers, before and after equalization.

    Args:
        plain: the network that was quantized, in float.
        report: of that.
    """
    factors = {} if report.equalization is None else report.equalization.factors
    found = {}
    for layer in report.layers:
        weight = plain.get_submodule(layer.name).get_parameter("weight").detach().double().abs()
        after = weight
        if layer.name in factors:
            after = weight * factors[layer.name].weight.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        found[layer.name] = ChannelRanges(_largest(weight), _largest(after))
    return found


def _largest(magnitudes: Tensor) -> tuple[float, ...]:
    return tuple(value for value in magnitudes.flatten(1).amax(1).tolist() if math.isfinite(value))
