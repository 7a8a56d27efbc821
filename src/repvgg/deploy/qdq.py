"""Write a quantized network as an ONNX file with QuantizeLinear and DequantizeLinear nodes (QDQ).

Around each convolution and linear layer the file says which tensors are integers and at what scale; runtimes replace
the nodes by integer kernels where they have them. Weights are stored as int8, biases as int32.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.deploy.onnx import OnnxExport, export_onnx
from repvgg.errors import UsageError, require
from repvgg.quantization import QuantizedConv2d, QuantizedLayer
from repvgg.quantization.affine import over_axis_0


@torch.library.custom_op("repvgg::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``clamp(round(x / scale) + zero_point)`` in the dtype of ``zero_point``, as ONNX's QuantizeLinear."""
    limits = torch.iinfo(zero_point.dtype)
    return torch.clamp(torch.round(x / scale) + zero_point, limits.min, limits.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("repvgg::dequantize_linear", mutates_args=())
def dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``(q − zero_point) · scale`` in float32, with scales of shape () or along axis 0."""
    centred = q.to(torch.int32) - over_axis_0(zero_point.to(torch.int32), q.ndim)
    return centred.float() * over_axis_0(scale, q.ndim)


@dequantize_linear.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


def qdq_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the functions that write the nodes, as ``torch.onnx.export`` takes them."""
    op = require("onnxscript", "onnx").opset18

    def quantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero_point)

    def dequantize(q: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(q, scale, zero_point, axis=0)

    return {
        torch.ops.repvgg.quantize_linear.default: quantize,
        torch.ops.repvgg.dequantize_linear.default: dequantize,
    }


@final
class QdqLayer(nn.Module):
    """A quantized layer as float arithmetic on dequantized integers, the form that a QDQ file holds."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.geometry: tuple[Any, ...] | None = None
        if isinstance(layer, QuantizedConv2d):
            self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        shape = layer.weight_scale.shape
        self.register_buffer("weight", layer.weight_integers.clone())
        self.register_buffer("weight_scale", layer.weight_scale.clone())
        self.register_buffer("weight_zero_point", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("bias", layer.bias_integers.clone())
        self.register_buffer("bias_scale", layer.accumulator_scale.clone())
        self.register_buffer("bias_zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("input_scale", layer.input_scale.clone())
        self.register_buffer("input_zero_point", layer.input_zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.repvgg.quantize_linear(x, self.input_scale, self.input_zero_point)
        x = torch.ops.repvgg.dequantize_linear(q, self.input_scale, self.input_zero_point)
        weight = torch.ops.repvgg.dequantize_linear(self.weight, self.weight_scale, self.weight_zero_point)
        bias = torch.ops.repvgg.dequantize_linear(self.bias, self.bias_scale, self.bias_zero_point)
        return F.linear(x, weight, bias) if self.geometry is None else F.conv2d(x, weight, bias, *self.geometry)


def qdq_form(quantized: nn.Module) -> nn.Module:
    """Return a copy of a quantized network whose layers are :class:`QdqLayer` modules.

    Raises:
        UsageError: no layer is quantized.
    """
    if isinstance(quantized, QuantizedLayer):
        return QdqLayer(quantized)
    result = copy.deepcopy(quantized)
    names = [name for name, module in result.named_modules() if isinstance(module, QuantizedLayer)]
    if not names:
        raise UsageError("No layer of this network is quantized: call repvgg.quantize first.")
    for name in names:
        layer = result.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        parent, _, child = name.rpartition(".")
        setattr(result.get_submodule(parent), child, QdqLayer(layer))
    return result


def export_qdq(
    quantized: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    *,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> OnnxExport:
    """Write a network from :func:`repvgg.quantize` to an ONNX file in QDQ form; the batch size is left open.

    Args:
        quantized: the network.
        path: the file.
        input_shape: (C, H, W) of an image.
        overwrite: replace a file at ``path``.
        notes: texts to store in the file by name.

    Raises:
        UsageError: no layer is quantized.
        OutputError, ExportError, MissingDependencyError: as :func:`repvgg.deploy.export_onnx`.
    """
    return export_onnx(qdq_form(quantized), Path(path), input_shape, overwrite=overwrite, notes=notes)
