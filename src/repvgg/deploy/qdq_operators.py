"""Quantization as operators of PyTorch, which the ONNX exporter writes as QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repvgg.errors import require
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
