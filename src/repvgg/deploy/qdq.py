"""Write a quantized network as an ONNX file with QuantizeLinear and DequantizeLinear nodes (QDQ).

Around each convolution and linear layer the file says which tensors are integers and at what scale; runtimes replace
the nodes by integer kernels where they have them. Weights are stored as int8, biases as int32.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.deploy.onnx import OnnxExport, export_onnx
from repvgg.deploy.qdq_operators import dequantize_linear, quantize_linear
from repvgg.errors import UsageError
from repvgg.quantization import QuantizedConv2d, QuantizedLayer


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
        q = quantize_linear(x, self.input_scale, self.input_zero_point)
        x = dequantize_linear(q, self.input_scale, self.input_zero_point)
        weight = dequantize_linear(self.weight, self.weight_scale, self.weight_zero_point)
        bias = dequantize_linear(self.bias, self.bias_scale, self.bias_zero_point)
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
        result.set_submodule(name, QdqLayer(layer))
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
