"""What a quantization did: a line for each layer, and the network as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from repvgg.quantization.equalization import EqualizationReport
from repvgg.quantization.quality import Quality
from repvgg.quantization.settings import QuantizationSettings


@final
@dataclass(frozen=True)
class QuantizedLayerReport:
    """A layer before and after quantization.

    Attributes:
        name: of the module.
        spread: ``max / median`` of the largest weights of its output channels, in the given model.
        equalized_spread: the same after equalization.
        largest_weight: ``max |w|`` after equalization.
        weight_sqnr: of its weights, in dB.
        input_range: smallest and largest input on the calibration images, 0 included.
        quantized_range: what the input quantizer represents.
        clipped_share: share of the inputs outside that range.
        histogram: counts of the inputs in equal intervals of ``input_range``.
        rounding_error_ratio: squared output error of adaptive rounding divided by that of rounding to the nearest.
        bias_correction: norm of the bias correction divided by that of the output means.
        sqnr_alone: of the network's output with this layer alone quantized, in dB.
        sqnr_accumulated: of this layer's output in the quantized network, in dB.
    """

    name: str
    spread: float
    equalized_spread: float
    largest_weight: float
    weight_sqnr: float
    input_range: tuple[float, float]
    quantized_range: tuple[float, float]
    clipped_share: float
    histogram: tuple[float, ...] = field(repr=False)
    rounding_error_ratio: float | None = None
    bias_correction: float | None = None
    sqnr_alone: float = math.nan
    sqnr_accumulated: float = math.nan


@final
@dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What :func:`repvgg.quantize` did.

    Attributes:
        settings: of the quantization.
        layers: the quantized layers in the order of execution.
        skipped: why other convolutions and linear layers stay in float32, by name.
        equalization: None if it was switched off.
        quality: of the quantized network on the calibration images, beside the float network.
    """

    settings: QuantizationSettings
    layers: tuple[QuantizedLayerReport, ...]
    skipped: Mapping[str, str]
    equalization: EqualizationReport | None
    quality: Quality

    def __repr__(self) -> str:
        return f"QuantizationReport({len(self.layers)} layers, {self.quality})"

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers in integers: {self.settings}",
            f"on the calibration images: {self.quality}",
        ]
        if self.equalization is not None:
            lines += str(self.equalization).splitlines()
        lines += [f"in float32: {name}, because {reason}" for name, reason in self.skipped.items()]
        lines.append("layers with the lowest SQNR alone:")
        worst = sorted(self.layers, key=lambda layer: layer.sqnr_alone)[:5]
        width = max((len(layer.name) for layer in worst), default=0)
        lines += [
            f"  {layer.name:{width}}  alone {layer.sqnr_alone:5.1f} dB  accumulated {layer.sqnr_accumulated:5.1f} dB  "
            f"spread {layer.spread:.1f} → {layer.equalized_spread:.1f}  clipped {layer.clipped_share:.2%}"
            for layer in worst
        ]
        return "\n".join(lines)
