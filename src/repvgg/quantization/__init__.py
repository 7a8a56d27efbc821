"""Quantization of plain networks to 8-bit integers: equalization, calibration, bias correction, and what they cost."""

from repvgg.quantization.adaptive_rounding import adapt_rounding
from repvgg.quantization.affine import ActivationQuantizer, Granularity, QuantizedWeight, quantize_weight
from repvgg.quantization.api import quantize
from repvgg.quantization.bias_correction import correct_bias
from repvgg.quantization.channel_graph import ChannelGraph, trace_channels
from repvgg.quantization.equalization import EqualizationReport, LayerFactors, LayerSpread, equalize, rescale_randomly
from repvgg.quantization.fake import FakeQuantLayer
from repvgg.quantization.files import load_quantized, save_quantized
from repvgg.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, quantize_layer
from repvgg.quantization.qat import QatNetwork, QatReport, prepare_qat
from repvgg.quantization.quality import PairedAccuracy, PairedSegmentation, Quality, QualityMeter, compare_outputs, sqnr
from repvgg.quantization.ranges import Histogram, RangeMethod, choose_quantizer
from repvgg.quantization.reference import Reference, in_batches
from repvgg.quantization.report import QuantizationReport, QuantizedLayerReport
from repvgg.quantization.settings import QuantizationSettings
from repvgg.quantization.steps import Step, StepReport, measure_steps

__all__ = [
    "ActivationQuantizer",
    "ChannelGraph",
    "EqualizationReport",
    "FakeQuantLayer",
    "Granularity",
    "Histogram",
    "LayerFactors",
    "LayerSpread",
    "PairedAccuracy",
    "PairedSegmentation",
    "QatNetwork",
    "QatReport",
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
    "Step",
    "StepReport",
    "adapt_rounding",
    "choose_quantizer",
    "compare_outputs",
    "correct_bias",
    "equalize",
    "in_batches",
    "load_quantized",
    "measure_steps",
    "prepare_qat",
    "quantize",
    "quantize_layer",
    "quantize_weight",
    "rescale_randomly",
    "save_quantized",
    "sqnr",
    "trace_channels",
]
