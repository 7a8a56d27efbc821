"""Adapt the rounding and correct the bias of one layer after the other, on outputs of the quantized layers before it.

If the feature maps of all calibration images fit into memory, one pass suffices: each layer is refined before the next
one runs. Otherwise the network runs once for each layer, on a part of the images at a time and up to that layer, and
the inputs of that layer alone are kept, as the integers that it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import final

import torch
from torch import Tensor, nn

from repvgg.quantization.adaptive_rounding import adapt_rounding
from repvgg.quantization.affine import ActivationQuantizer, largest_integer
from repvgg.quantization.bias_correction import add_to_channels, correct_bias
from repvgg.quantization.calibration import LayerStatistics, hooked, run
from repvgg.quantization.layers import QuantizedLayer
from repvgg.quantization.settings import QuantizationSettings

#: Of feature maps at once. 128 images of 224x224 pixels take about 1 GiB in RepVGG-A0.
MEMORY_BYTES = 2 * 2**30
_BYTES_PER_ELEMENT = 12  # of the input and the output of a layer: in float32, and in float64 in the layer


class _Reached(Exception):  # noqa: N818
    """Ends a forward at the layer whose inputs are wanted."""


@final
class Refinement:
    """Refines the layers of ``quantized`` in place.

    Args:
        quantized: the quantized network.
        float_model: the network whose layers it approximates.
        statistics: of the layers of the float network, by name, in the order of execution.
        settings: of the quantization.

    Attributes:
        rounding: squared output error of adaptive rounding divided by that of rounding to the nearest, by layer.
        corrections: norm of the bias correction divided by that of the output means, by layer.
    """

    def __init__(
        self,
        quantized: nn.Module,
        float_model: nn.Module,
        statistics: Mapping[str, LayerStatistics],
        settings: QuantizationSettings,
    ) -> None:
        self._quantized = quantized
        self._float_model = float_model
        self._statistics = statistics
        self._settings = settings
        self.rounding: dict[str, float] = {}
        self.corrections: dict[str, float] = {}

    def run(self, images: Tensor) -> None:
        """Refine all layers on ``images`` (N, C, H, W)."""
        if not (self._settings.rounding_sweeps or self._settings.correct_biases):
            return
        # A layer that is called several times has several inputs and output means, which one weight and bias cannot
        # serve.
        names = [name for name, found in self._statistics.items() if found.calls == 1]
        at_once = images_at_once(self._statistics[name] for name in names)
        if at_once >= len(images):
            with hooked(self._quantized, names, self._refine_in_passing):
                run(self._quantized, images)
            return
        for name in names:
            quantizer = self._layer(name).quantizer
            # The layers before it are refined already.
            self._refine(name, layer_inputs(self._quantized, name, quantizer, torch.split(images, at_once)))

    def _refine_in_passing(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        layer = self._layer(name)
        if self._settings.rounding_sweeps:
            self._adapt_rounding(name, [x])
            y = layer.forward(x)  # not the call, which would visit it again
        if self._settings.correct_biases:
            y = add_to_channels(y, self._correct_bias(name, [y]))
        return y

    def _refine(self, name: str, inputs: Iterable[Tensor]) -> None:
        if self._settings.rounding_sweeps:
            self._adapt_rounding(name, inputs)
        if self._settings.correct_biases:
            layer = self._layer(name)
            self._correct_bias(name, (layer.forward(x) for x in inputs))

    def _adapt_rounding(self, name: str, inputs: Iterable[Tensor]) -> None:
        self.rounding[name] = adapt_rounding(
            self._layer(name),
            self._float_model.get_submodule(name).get_parameter("weight"),
            inputs,
            self._settings.rounding_sweeps,
            largest_integer(self._settings.weight_bits),
            pair_bound=self._settings.pair_bound,
        )

    def _correct_bias(self, name: str, outputs: Iterable[Tensor]) -> Tensor:
        added, self.corrections[name] = correct_bias(self._layer(name), outputs, self._statistics[name])
        return added

    def _layer(self, name: str) -> QuantizedLayer:
        layer = self._quantized.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        return layer


def images_at_once(statistics: Iterable[LayerStatistics]) -> int:
    """Return how many images may run together so that the maps of the largest layer take :data:`MEMORY_BYTES`."""
    largest = max((layer.elements_per_image for layer in statistics), default=1)
    return max(1, MEMORY_BYTES // (_BYTES_PER_ELEMENT * largest))


def layer_inputs(
    model: nn.Module, name: str, quantizer: ActivationQuantizer, batches: Iterable[Tensor]
) -> Iterable[Tensor]:
    """Return what the layer ``name`` receives, as ``quantizer`` rounds it; ``model`` runs up to that layer."""
    stored = _StoredInputs(quantizer)

    def keep(_: str, x: Tensor, y: Tensor) -> None:
        stored.append(x)
        raise _Reached

    with hooked(model, [name], keep):
        for images in batches:
            with suppress(_Reached):
                run(model, images)
    return stored


@final
class _StoredInputs:
    """Inputs of a layer, kept as the uint8 integers that it makes of them."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self._quantizer = quantizer
        self._parts: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        self._parts.append(self._quantizer.quantize(x.float()).to(torch.uint8))

    def __iter__(self) -> Iterator[Tensor]:
        return (self._quantizer.dequantize(part.float()) for part in self._parts)
