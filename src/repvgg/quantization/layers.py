"""Convolutions and linear layers in integer arithmetic, simulated exactly.

A layer quantizes its input to uint8, multiplies and adds integers as an int32 accumulator does, and scales the sums:

    y = s_x · s_w[o] · ( Σ w_q[o, i] · (q(x)[i] − z_x) + b_q[o] )

Sums are computed in float64, which holds every integer below 2⁵³: the result is that of integer arithmetic, on any
device and in any order of addition.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.quantization.affine import (
    ActivationQuantizer,
    Granularity,
    QuantizedWeight,
    over_axis_0,
    quantize_weight,
)

_LARGEST_BIAS = 2.0**30  # of the accumulator's 2³¹: the other half is left for the sum of products


class QuantizedLayer(nn.Module):
    """The state that quantized convolutions and linear layers share.

    Attributes:
        weight_integers: int8, of the shape of the float weight.
        weight_scale: float32, () or (O,).
        bias_integers: (O,) int32, in units of ``s_x · s_w``.
        input_scale: float32, ().
        input_zero_point: uint8, ().
    """

    weight_integers: Tensor
    weight_scale: Tensor
    bias_integers: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        device = weight.integers.device
        self.register_buffer("weight_integers", weight.integers)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("input_scale", torch.tensor(quantizer.scale, dtype=torch.float32, device=device))
        self.register_buffer("input_zero_point", torch.tensor(quantizer.zero_point, dtype=torch.uint8, device=device))
        self.register_buffer("bias_integers", torch.zeros(len(weight.integers), dtype=torch.int32, device=device))
        if bias is not None:
            self.add_to_bias(bias.detach())

    @property
    def quantizer(self) -> ActivationQuantizer:
        """The quantizer of the input."""
        return ActivationQuantizer(float(self.input_scale), int(self.input_zero_point))

    @property
    def accumulator_scale(self) -> Tensor:
        """``s_x · s_w`` in float32, () or (O,): the unit of the accumulator and of the bias."""
        return self.input_scale * self.weight_scale

    def add_to_bias(self, values: Tensor) -> Tensor:
        """Add the multiples of the bias's unit that are closest to ``values`` (O,), and return what was added."""
        unit = self.accumulator_scale.double()
        integers = (values.double() / unit).round()
        self.bias_integers.add_(integers.to(torch.int32))
        return integers * unit

    def centred_input(self, x: Tensor) -> Tensor:
        """Return ``q(x) − z_x`` as integers in float64."""
        quantizer = self.quantizer
        return (quantizer.quantize(x.float()) - quantizer.zero_point).double()


@final
class QuantizedConv2d(QuantizedLayer):
    """A convolution of the geometry of ``conv`` in integers; padding is 0, which is represented exactly.

    Args:
        conv: an ``nn.Conv2d`` with zero padding.
        weight: its weight in integers.
        quantizer: of the input.
    """

    def __init__(self, conv: nn.Conv2d, weight: QuantizedWeight, quantizer: ActivationQuantizer) -> None:
        super().__init__(weight, conv.bias, quantizer)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.kernel_size = conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        sums = F.conv2d(
            self.centred_input(x),
            self.weight_integers.double(),
            self.bias_integers.double(),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        return (sums.float() * over_axis_0(self.accumulator_scale, sums.ndim - 1)).to(x.dtype)

    def extra_repr(self) -> str:
        out_channels, in_channels = self.weight_integers.shape[:2]
        return f"{in_channels * self.groups}, {out_channels}, kernel_size={tuple(self.kernel_size)}"


@final
class QuantizedLinear(QuantizedLayer):
    """A linear layer in integers."""

    def forward(self, x: Tensor) -> Tensor:
        sums = F.linear(self.centred_input(x), self.weight_integers.double(), self.bias_integers.double())
        return (sums.float() * self.accumulator_scale).to(x.dtype)


def why_not_quantizable(module: nn.Module) -> str | None:
    """Return why a convolution or linear layer stays in float32, or ``None`` if it can be quantized."""
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"its padding mode is {module.padding_mode!r}, not zeros"
    if isinstance(module, nn.Conv2d) and module.padding == "same" and not all(side % 2 for side in module.kernel_size):
        return "it pads one side more than the other"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} may compute something else than a convolution or a linear map"
    return None


def quantize_layer(
    layer: nn.Conv2d | nn.Linear,
    quantizer: ActivationQuantizer,
    granularity: Granularity,
    bits: int = 8,
    *,
    pair_bound: bool = False,
) -> QuantizedLayer:
    """Return ``layer`` in integers, for inputs that ``quantizer`` quantizes.

    Scales of weights are large enough for the bias to fit the accumulator: a channel with weights of 0 keeps its bias.
    """
    smallest = smallest_weight_scale(layer.bias, quantizer)
    weight = quantize_weight(layer.weight, granularity, bits, smallest_scale=smallest, pair_bound=pair_bound)
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, weight, quantizer)
    return QuantizedLinear(weight, layer.bias, quantizer)


def smallest_weight_scale(bias: Tensor | None, quantizer: ActivationQuantizer) -> Tensor | float:
    """Return the scales of weights, (O,), below which a bias would not fit the accumulator; 0 without a bias."""
    return 0.0 if bias is None else bias.detach().double().abs() / (quantizer.scale * _LARGEST_BIAS)
