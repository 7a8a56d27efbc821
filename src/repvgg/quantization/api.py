"""``quantize``: a plain network in 8-bit integers, and what each step cost."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._arguments import check_model
from repvgg.errors import UsageError
from repvgg.quantization.affine import QuantizedWeight
from repvgg.quantization.calibration import BATCH, LayerStatistics, collect_statistics, hooked, run
from repvgg.quantization.equalization import channel_spread, equalize
from repvgg.quantization.layers import QuantizedLayer, quantize_layer, why_not_quantizable
from repvgg.quantization.quality import decibels, sqnr
from repvgg.quantization.ranges import choose_quantizer
from repvgg.quantization.reference import Reference, in_batches
from repvgg.quantization.refinement import Refinement
from repvgg.quantization.report import QuantizationReport, QuantizedLayerReport
from repvgg.quantization.settings import QuantizationSettings

_PROBE_IMAGES = 16  # for the SQNR of single layers, which takes a run of the network for each layer
_PROBE_PIXELS = _PROBE_IMAGES * 224 * 224  # of them all, where images are larger
_NOT_CALLED = "it is not called on the calibration images"


def quantize(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    settings: QuantizationSettings | None = None,
) -> tuple[nn.Module, QuantizationReport]:
    """Quantize the convolutions and linear layers of a plain network to 8-bit integers.

    The steps: equalize the channels between layers (exact), calibrate the ranges of activations, round weights, and
    correct the bias of each layer, in the order of execution, on the outputs of the quantized layers before it.

    Args:
        model: a network, best in the plain form of :func:`repvgg.reparameterize`; batch norms that are left, and all
            operations between layers, stay in float32. It is not changed.
        calibration: images (N, C, H, W) as the network receives them, or an iterable of such batches, or of (images,
            labels). A hundred images are usually enough; they are in memory at once.
        settings: default: 8-bit weights per channel, ranges of the smallest squared error, and all steps.

    Returns:
        The quantized network, an ``nn.Module`` from tensors to tensors that computes with exact integers, and a report.

    Raises:
        UsageError: ``model`` has no layer to quantize, or is one itself, or there are no calibration images.
        ExportError: ``torch.export`` cannot capture the model, which equalization needs.
    """
    settings = settings or QuantizationSettings()
    check_model(model, "quantize")
    images = calibration_images(calibration)
    float_model, equalized = copy.deepcopy(model).eval().float(), None
    if settings.equalize:
        float_model, equalized = equalize(float_model, images)
    names, skipped = layers_to_quantize(float_model)
    statistics = collect_statistics(float_model, names, torch.split(images, BATCH))
    skipped |= {name: _NOT_CALLED for name, found in statistics.items() if not found.calls}
    names = [name for name, found in statistics.items() if found.calls]
    quantized = copy.deepcopy(float_model)
    for name in names:
        layer = float_model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        quantizer = choose_quantizer(statistics[name].inputs, settings.ranges, settings.percentile)
        integers = quantize_layer(
            layer, quantizer, settings.granularity, settings.weight_bits, pair_bound=settings.pair_bound
        )
        quantized.set_submodule(name, integers)
    refinement = Refinement(quantized, float_model, statistics, settings)
    refinement.run(images)
    probe = images[: min(_PROBE_IMAGES, max(2, _PROBE_PIXELS // images[0, 0].numel()))]
    alone = _sqnr_alone(float_model, quantized, names, probe)
    accumulated = _sqnr_accumulated(float_model, quantized, names, probe)
    layers = [
        replace(
            _layer_report(name, model, float_model, quantized, statistics[name]),
            rounding_error_ratio=refinement.rounding.get(name),
            bias_correction=refinement.corrections.get(name),
            sqnr_alone=alone[name],
            sqnr_accumulated=accumulated[name],
        )
        for name in names
    ]
    quality = Reference(copy.deepcopy(model).eval().float(), in_batches(images)).compare(quantized)
    return quantized, QuantizationReport(settings, tuple(layers), skipped, equalized, quality)


def calibration_images(calibration: Tensor | Iterable[Any]) -> Tensor:
    """Return the images of a tensor, of batches, or of batches with labels, as one tensor."""
    if isinstance(calibration, Tensor):
        found = calibration
    else:
        batches = [batch[0] if isinstance(batch, list | tuple) else batch for batch in calibration]
        if not batches or not all(isinstance(batch, Tensor) for batch in batches):
            raise UsageError("Calibration images are a tensor (N, C, H, W), or batches of such tensors.")
        found = torch.cat(batches)
    if found.ndim != 4 or not len(found):
        raise UsageError(f"Calibration images are a tensor (N, C, H, W), got the shape {tuple(found.shape)}.")
    return found


def layers_to_quantize(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Return the names of the layers to quantize, and why others, and batch norms, are not."""
    names, skipped = [], {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            reason = why_not_quantizable(module)
            if reason is None:
                names.append(name)
            else:
                skipped[name] = reason
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            skipped[name] = "it is a batch norm: call repvgg.reparameterize first, which folds most of them"
    if not names:
        raise UsageError("The network has no convolution or linear layer to quantize.")
    if names == [""]:
        raise UsageError("A single layer is not quantized by itself: give nn.Sequential(layer).")
    return names, skipped


def _sqnr_alone(float_model: nn.Module, quantized: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, float]:
    """Return the SQNR of the network's output with one layer quantized at a time."""
    reference = Reference(float_model, in_batches(images))
    probe = copy.deepcopy(float_model)
    found = {}
    for name in names:
        probe.set_submodule(name, quantized.get_submodule(name))
        found[name] = reference.compare(probe).sqnr
        probe.set_submodule(name, float_model.get_submodule(name))
    return found


def _sqnr_accumulated(
    float_model: nn.Module, quantized: nn.Module, names: Sequence[str], images: Tensor
) -> dict[str, float]:
    """Return the SQNR of each layer's output in the quantized network."""
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for image in torch.split(images, 1):  # one at a time: the outputs of all layers are in memory
        expected: dict[str, Tensor] = {}

        def keep(name: str, _: Tensor, y: Tensor, expected: dict[str, Tensor] = expected) -> None:
            expected.setdefault(name, y.double())

        def compare(name: str, _: Tensor, y: Tensor, expected: dict[str, Tensor] = expected) -> None:
            if (reference := expected.pop(name, None)) is not None:  # the first call of the layer
                signal[name] += float(reference.square().sum())
                noise[name] += float((reference - y).square().sum())

        for model, visit in ((float_model, keep), (quantized, compare)):
            with hooked(model, names, visit):
                run(model, image)
    return {name: decibels(signal[name], noise[name]) for name in names}


def _layer_report(
    name: str,
    model: nn.Module,
    float_model: nn.Module,
    quantized: nn.Module,
    statistics: LayerStatistics,
) -> QuantizedLayerReport:
    layer = quantized.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    weight = float_model.get_submodule(name).get_parameter("weight").detach()
    integers = QuantizedWeight(layer.weight_integers, layer.weight_scale)
    return QuantizedLayerReport(
        name=name,
        spread=channel_spread(model.get_submodule(name).get_parameter("weight")),
        equalized_spread=channel_spread(weight),
        largest_weight=float(weight.abs().max()),
        weight_sqnr=sqnr(weight, integers.dequantize()),
        input_range=(statistics.inputs.lowest, statistics.inputs.highest),
        quantized_range=layer.quantizer.bounds,
        clipped_share=statistics.inputs.clipped_share(layer.quantizer),
        histogram=tuple(statistics.inputs.counts.reshape(64, -1).sum(1).tolist()),
    )
