"""``quantize``: a plain network in 8-bit integers, and what each step cost."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._arguments import check_model
from repvgg.errors import UsageError
from repvgg.quantization.adaptive_rounding import adapt_rounding
from repvgg.quantization.affine import QuantizedWeight, largest_integer
from repvgg.quantization.bias_correction import correct_bias
from repvgg.quantization.calibration import LayerStatistics, collect_statistics, first_tensor, hooked, run
from repvgg.quantization.equalization import channel_spread, equalize
from repvgg.quantization.layers import QuantizedLayer, quantize_layer, why_not_quantizable
from repvgg.quantization.quality import compare_outputs, sqnr
from repvgg.quantization.ranges import choose_quantizer
from repvgg.quantization.report import QuantizationReport, QuantizedLayerReport
from repvgg.quantization.settings import QuantizationSettings

_PROBE_IMAGES = 16  # images for the SQNR of single layers


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
            labels). A hundred images are usually enough; they are in memory at once, with their feature maps.
        settings: default: 8-bit weights per channel, ranges of the smallest squared error, and all steps.

    Returns:
        The quantized network, an ``nn.Module`` from tensors to tensors that computes with exact integers, and a report.

    Raises:
        UsageError: ``model`` has no layer to quantize, or is one itself, or there are no calibration images.
        ExportError: ``torch.export`` cannot capture the model, which equalization needs.
    """
    settings = settings or QuantizationSettings()
    check_model(model, "quantize")
    images = _images(calibration)
    float_model, equalized = copy.deepcopy(model).eval().float(), None
    if settings.equalize:
        float_model, equalized = equalize(float_model, images)
    names, skipped = _layers(float_model)
    statistics = collect_statistics(float_model, names, [images])
    for name in [name for name in names if not statistics[name].calls]:
        skipped[name] = "it is not called on the calibration images"
        names.remove(name)
    quantized = copy.deepcopy(float_model)
    for name in names:
        layer = float_model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        quantizer = choose_quantizer(statistics[name].inputs, settings.ranges, settings.percentile)
        integers = quantize_layer(
            layer, quantizer, settings.granularity, settings.weight_bits, pair_bound=settings.pair_bound
        )
        quantized.set_submodule(name, integers)
    rounding, corrections = _refine(quantized, float_model, statistics, names, images, settings)
    probe = images[:_PROBE_IMAGES]
    alone = _sqnr_alone(float_model, quantized, names, probe)
    accumulated = _sqnr_accumulated(float_model, quantized, names, probe)
    layers = [
        _layer_report(
            name, model, float_model, quantized, statistics[name], rounding.get(name), corrections.get(name),
            alone[name], accumulated[name],
        )
        for name in names
    ]  # fmt: skip
    quality = compare_outputs(first_tensor(run(model, images)), first_tensor(run(quantized, images)))
    return quantized, QuantizationReport(settings, tuple(layers), skipped, equalized, quality)


def _images(calibration: Tensor | Iterable[Any]) -> Tensor:
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


def _layers(model: nn.Module) -> tuple[list[str], dict[str, str]]:
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


def _refine(
    quantized: nn.Module,
    float_model: nn.Module,
    statistics: Mapping[str, LayerStatistics],
    names: Sequence[str],
    images: Tensor,
    settings: QuantizationSettings,
) -> tuple[dict[str, float], dict[str, float]]:
    """Adapt the rounding and correct the bias of one layer after the other, in one pass over the images."""
    rounding: dict[str, float] = {}
    corrections: dict[str, float] = {}
    # A layer that is called several times has several inputs and output means, which one weight and bias cannot serve.
    once = [name for name in names if statistics[name].calls == 1]

    def visit(name: str, x: Tensor, y: Tensor) -> Tensor:
        layer = quantized.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        if settings.rounding_sweeps:
            weight = float_model.get_submodule(name).get_parameter("weight")
            highest = largest_integer(settings.weight_bits)
            rounding[name] = adapt_rounding(
                layer, weight, [x], settings.rounding_sweeps, highest, pair_bound=settings.pair_bound
            )
            y = layer.forward(x)  # not the call, which would visit it again
        if settings.correct_biases:
            y, corrections[name] = correct_bias(layer, y, statistics[name])
        return y

    if settings.rounding_sweeps or settings.correct_biases:
        with hooked(quantized, once, visit):
            run(quantized, images)
    return rounding, corrections


def _sqnr_alone(float_model: nn.Module, quantized: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, float]:
    """Return the SQNR of the network's output with one layer quantized at a time."""
    reference = first_tensor(run(float_model, images))
    probe = copy.deepcopy(float_model)
    found = {}
    for name in names:
        probe.set_submodule(name, quantized.get_submodule(name))
        found[name] = sqnr(reference, first_tensor(run(probe, images)))
        probe.set_submodule(name, float_model.get_submodule(name))
    return found


def _sqnr_accumulated(
    float_model: nn.Module, quantized: nn.Module, names: Sequence[str], images: Tensor
) -> dict[str, float]:
    """Return the SQNR of each layer's output in the quantized network."""
    reference: dict[str, Tensor] = {}
    found: dict[str, float] = {}

    def keep(name: str, _: Tensor, y: Tensor) -> None:
        reference.setdefault(name, y)

    def compare(name: str, _: Tensor, y: Tensor) -> None:
        found.setdefault(name, sqnr(reference[name], y))

    for model, visit in ((float_model, keep), (quantized, compare)):
        with hooked(model, names, visit):
            run(model, images)
    return found


def _layer_report(
    name: str,
    model: nn.Module,
    float_model: nn.Module,
    quantized: nn.Module,
    statistics: LayerStatistics,
    rounding: float | None,
    correction: float | None,
    alone: float,
    accumulated: float,
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
        rounding_error_ratio=rounding,
        bias_correction=correction,
        sqnr_alone=alone,
        sqnr_accumulated=accumulated,
    )
