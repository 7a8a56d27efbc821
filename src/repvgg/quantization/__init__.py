"""Quantization of plain networks to 8-bit integers: equalization, calibration, bias correction, and what they cost."""

from repvgg.quantization.adaptive_rounding import adapt_rounding
from repvgg.quantization.affine import ActivationQuantizer, Granularity, QuantizedWeight, quantize_weight
from repvgg.quantization.api import quantize
from repvgg.quantization.bias_correction import correct_bias
from repvgg.quantization.channel_graph import ChannelGraph, trace_channels
from repvgg.quantization.equalization import EqualizationReport, LayerSpread, equalize
from repvgg.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, quantize_layer
from repvgg.quantization.quality import PairedAccuracy, PairedSegmentation, Quality, QualityMeter, compare_outputs, sqnr
from repvgg.quantization.ranges import Histogram, RangeMethod, choose_quantizer
from repvgg.quantization.reference import Reference, in_batches
from repvgg.quantization.report import QuantizationReport, QuantizedLayerReport
from repvgg.quantization.settings import QuantizationSettings
from repvgg.quantization.steps import StepReport, measure_steps

__all__ = [
    "ActivationQuantizer",
    "ChannelGraph",
    "EqualizationReport",
    "Granularity",
    "Histogram",
    "LayerSpread",
    "PairedAccuracy",
    "PairedSegmentation",
    "Quality",
    "QualityMeter",
    "QuantizationReport",
    "QuantizationSettings",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLayerReport",
    "QuantizedLinear",
    "QuantizedWeight",
    "RangeMethod",
    "Reference",
    "StepReport",
    "adapt_rounding",
    "choose_quantizer",
    "compare_outputs",
    "correct_bias",
    "equalize",
    "in_batches",
    "measure_steps",
    "quantize",
    "quantize_layer",
    "quantize_weight",
    "sqnr",
    "trace_channels",
]
