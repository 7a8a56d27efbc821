"""A layer that simulates its integers while it is trained: rounding in the forward pass, gradients past it.

The forward pass is that of :mod:`repvgg.quantization.layers`, with the same integers and scales:

    y = s_x · s_w[o] · ( Σ w_q[o, i] · (q(x)[i] − z_x) + b_q[o] )

In the backward pass ``round`` has the derivative 1, and values that are clipped have the derivative 0: the
straight-through estimator (Bengio et al. 2013, arXiv 1308.3432). The weight is no parameter: it is the merged kernel of
branches and batch norms, computed in every pass as a differentiable function of their parameters (RepQ: Prutianova et
al. 2023, arXiv 2311.05317).

Sums are added in float32 here and exactly in the integer layers. Both are equal as long as no sum reaches 2²⁴, which
:attr:`FakeQuantLayer.largest_sum` bounds; larger sums differ by one rounding to float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.quantization.adaptive_rounding import adapt_rounding
from repvgg.quantization.affine import (
    ActivationQuantizer,
    Granularity,
    QuantizedWeight,
    full_range_scale,
    largest_integer,
    over_axis_0,
    quantize_weight,
    round_weight,
)
from repvgg.quantization.equalization import LayerFactors
from repvgg.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, smallest_weight_scale
from repvgg.quantization.ranges import Histogram, choose_quantizer
from repvgg.quantization.settings import QuantizationSettings
from repvgg.symbolic import equivalent_conv

_MOMENTUM = 0.1  # of the moving average of observed ranges
_INSIDE = 0.49  # steps from the integer that a weight has to round to
_SMALLEST_FACTOR = 1e-3  # of a parameter in a merged one: its shift must not become huge
_SAME_SHIFT = 1e-5  # float32 rounds to 6e-8
_HISTOGRAM_VALUES = 2**18  # of a batch, evenly spaced: more change the range of smallest error by less than its noise


class _StraightThrough(torch.autograd.Function):
    """Return given integers in place of ``values / step``, with the gradients of ``clamp(values / step)``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, integers: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(step, inside, values if step.requires_grad else None)
        return integers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        step, inside, values = ctx.saved_tensors
        gradient = gradients[0] / step
        if inside is not None:
            gradient = gradient * inside
        of_step = None if values is None else -(gradient * (values / step)).sum().reshape(step.shape)
        return gradient if ctx.needs_input_grad[0] else None, of_step, None, None


@final
class FakeQuantLayer(nn.Module):
    """A convolution or linear layer in simulated integers, whose kernel is that of another module.

    Args:
        layer: the plain layer; its geometry and name count, its values do not.
        source: the module that it is equal to, with the parameters that are trained. It stays where it is: it is no
            submodule of this layer.
        quantizer: of the input, from calibration.
        settings: granularity and bits of the weights, and how ranges are observed.
        factors: of equalization; None for none.
        learn_range: train a factor of the range of the input (LSQ: Esser et al. 2020, arXiv 1902.08153).

    Attributes:
        lowest: smallest input that is represented, a float32 scalar.
        highest: largest input that is represented.
        log_factor: logarithm of the factor of both, a parameter; None unless it is learned.
        weight_clip: scales of the weight divided by those that represent its largest value, () or (O,).
        observing: whether a training pass moves the range of the input.
    """

    lowest: Tensor
    highest: Tensor
    weight_clip: Tensor
    weight_factor: Tensor | None
    output_factor: Tensor | None

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        source: nn.Module,
        quantizer: ActivationQuantizer,
        settings: QuantizationSettings,
        factors: LayerFactors | None = None,
        *,
        learn_range: bool = False,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.observing = False
        # In tuples, so that state_dict and parameters() find the source once, where it is.
        self._source = (source,)
        self._geometry = (copy.deepcopy(layer).to("meta"),)
        lowest, highest = quantizer.bounds
        self.register_buffer("lowest", torch.tensor(lowest, dtype=torch.float32))
        self.register_buffer("highest", torch.tensor(highest, dtype=torch.float32))
        self.log_factor = nn.Parameter(torch.zeros(())) if learn_range else None
        self.register_buffer("weight_factor", None if factors is None else factors.weight.clone())
        self.register_buffer("output_factor", None if factors is None else factors.output.clone())
        shape = () if settings.granularity == "per_tensor" else (len(layer.weight),)
        self.register_buffer("weight_clip", torch.ones(shape, dtype=torch.float64))
        self.search_weight_clip()

    @property
    def granularity(self) -> Granularity:
        return self.settings.granularity

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, which gradients pass on to the parameters of the source."""
        (source,) = self._source
        weight, bias = kernel_of(source)
        if self.weight_factor is not None and self.output_factor is not None:
            factor = self.weight_factor.reshape(*self.weight_factor.shape, *[1] * (weight.ndim - 2))
            weight = (weight.double() * factor).to(weight.dtype)
            bias = None if bias is None else (bias.double() / self.output_factor).to(bias.dtype)
        return weight, bias

    def shift_bias(self, shift: Tensor) -> bool:
        """Change parameters of the source so that the rounded bias grows by ``shift`` (O,); False if none can."""
        (source,) = self._source
        _, bias = self.kernel()
        if bias is None:
            return False
        integers = self.to_integers()
        # What rounding the bias added already is part of the outputs that ``shift`` was measured on.
        rounding = integers.bias_integers * integers.accumulator_scale.double() - bias.detach().double()
        delta = shift.double() + rounding
        if self.output_factor is not None:
            delta = delta * self.output_factor
        return shift_merged(source, "bias", delta)

    def adapt_rounding(self, inputs: Iterable[Tensor], sweeps: int) -> bool:
        """Change parameters of the source so that weights round to the integers of the smallest output error.

        Each weight moves as little as rounding to that integer takes. Returns False if no parameter can do so.

        Args:
            inputs: batches of inputs, as the layer receives them.
            sweeps: see :func:`repvgg.quantization.adapt_rounding`.
        """
        weight, _ = (None if one is None else one.detach() for one in self.kernel())
        assert weight is not None
        bits, layer = self.settings.weight_bits, self.to_integers()
        adapt_rounding(layer, weight, inputs, sweeps, largest_integer(bits), pair_bound=self.settings.pair_bound)
        scale = layer.weight_scale.double()
        steps = weight.double() / over_axis_0(scale, weight.ndim)
        wanted = layer.weight_integers.double()
        shift = (steps.clamp(wanted - _INSIDE, wanted + _INSIDE) - steps) * over_axis_0(scale, weight.ndim)
        if self.weight_factor is not None:
            shift = shift / self.weight_factor.reshape(*self.weight_factor.shape, *[1] * (weight.ndim - 2))
        (source,) = self._source
        if not shift_merged(source, "weight", shift):
            return False
        with torch.no_grad():  # the scale stays, though the largest weight has moved
            self.weight_clip.copy_(scale / full_range_scale(self.kernel()[0], self.granularity, bits))
        return True

    @torch.no_grad()
    def search_weight_clip(self) -> None:
        """Choose the scales of the weight by the smallest squared error, relative to its largest value."""
        weight, _ = self.kernel()
        bits = self.settings.weight_bits
        best = quantize_weight(weight, self.granularity, bits, pair_bound=self.settings.pair_bound).scale.double()
        self.weight_clip.copy_(best / full_range_scale(weight, self.granularity, bits))

    @property
    def quantizer(self) -> ActivationQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer()[0]

    @torch.no_grad()
    def to_integers(self) -> QuantizedLayer:
        """Return the layer in exact integers, the same ones that are simulated."""
        weight, bias = self.kernel()
        quantizer = self.quantizer
        quantized = self._quantized(weight, bias, quantizer)
        (geometry,) = self._geometry
        if isinstance(geometry, nn.Linear):
            return QuantizedLinear(quantized, bias, quantizer)
        conv = copy.deepcopy(geometry)
        conv.bias = None if bias is None else nn.Parameter(bias)
        return QuantizedConv2d(conv, quantized, quantizer)

    @property
    def largest_sum(self) -> float:
        """An upper bound of the absolute value of all sums of integers; below 2²⁴ the simulation is exact."""
        layer = self.to_integers()
        sums = layer.weight_integers.flatten(1).double().abs().sum(1) * ActivationQuantizer.HIGHEST
        return float((sums + layer.bias_integers.double().abs()).max())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.observing:
            self._observe(x.detach())
        quantizer, scale = self._input_quantizer(x)
        weight, bias = self.kernel()
        quantized = self._quantized(weight.detach(), bias, quantizer)
        steps = over_axis_0(quantized.scale, weight.ndim)
        unit = scale * quantized.scale  # in float32, as the integer layers compute it
        unclipped = quantizer.unclipped(x.float())
        integers = unclipped.clamp(quantizer.LOWEST, quantizer.HIGHEST)
        centred = _StraightThrough.apply(x, scale, integers - quantizer.zero_point, integers == unclipped)
        # Weights beyond the scale are clipped; without the mask they would grow without end.
        inside = weight.detach().abs() <= steps * (largest_integer(self.settings.weight_bits) + 0.5)
        rounded = _StraightThrough.apply(weight, steps, quantized.integers.float(), inside)
        if bias is not None:
            fixed = unit.detach()
            bias = _StraightThrough.apply(bias, fixed, (bias.detach().double() / fixed.double()).round().float(), None)
        (geometry,) = self._geometry
        if isinstance(geometry, nn.Linear):
            return F.linear(centred, rounded, bias) * unit
        sums = F.conv2d(centred, rounded, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        return sums * over_axis_0(unit, sums.ndim - 1)

    def _quantized(self, weight: Tensor, bias: Tensor | None, quantizer: ActivationQuantizer) -> QuantizedWeight:
        scale = self.weight_clip * full_range_scale(weight, self.granularity, self.settings.weight_bits)
        settings, smallest = self.settings, smallest_weight_scale(bias, quantizer)
        return round_weight(weight, scale, settings.weight_bits, smallest, pair_bound=settings.pair_bound)

    def _input_quantizer(self, x: Tensor | None = None) -> tuple[ActivationQuantizer, Tensor]:
        """Return the quantizer, and its scale as a tensor; with ``x``, gradients of a learned range pass through it."""
        found = ActivationQuantizer.of_range(float(self.lowest), float(self.highest))
        if self.log_factor is None:
            return found, torch.tensor(found.scale, device=self.lowest.device)
        scale = found.scale * self.log_factor.exp()
        if x is not None and scale.requires_grad:
            # LSQ's factor: otherwise a range, which all values of a map act on, would learn faster than a weight.
            size = 1 / math.sqrt(x[0].numel() * ActivationQuantizer.HIGHEST)
            scale.register_hook(lambda gradient: gradient * size)  # type: ignore[no-untyped-call]
        # The zero point stays: both ends of the range have the same factor.
        return ActivationQuantizer(float(scale.detach()), found.zero_point), scale

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        """Move the range towards that of a batch."""
        lowest, highest = x.aminmax()
        if not (lowest.isfinite() and highest.isfinite()):
            return  # the training stops with the reason: its loss is not finite either
        histogram = Histogram()
        values = x.flatten()
        sample = values[:: max(1, values.numel() // _HISTOGRAM_VALUES)].float().cpu()
        histogram.observe_range(torch.stack([lowest, highest]))
        histogram.count(sample)
        bounds = choose_quantizer(histogram, self.settings.ranges, self.settings.percentile).bounds
        for buffer, bound in zip((self.lowest, self.highest), bounds, strict=True):
            buffer.lerp_(torch.tensor(bound, dtype=buffer.dtype, device=buffer.device), _MOMENTUM)

    def extra_repr(self) -> str:
        return f"{self._geometry[0]}, {self.settings.weight_bits}-bit weights {self.granularity.replace('_', ' ')}"


def kernel_of(source: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the layer that ``source`` is equal to, differentiable in its parameters.

    Raises:
        ReparamError: it is no convolution and no linear layer, or in training mode.
    """
    if type(source) in (nn.Conv2d, nn.Linear):
        assert isinstance(source, nn.Conv2d | nn.Linear)
        return source.weight, source.bias
    found = equivalent_conv(source)
    return found.weight, found.bias


def shift_merged(source: nn.Module, what: Literal["weight", "bias"], shift: Tensor) -> bool:
    """Add ``shift`` to the weight or bias of the layer that ``source`` is equal to, by one of its parameters, in place.

    The merged bias is affine in the shift of each batch norm and in the bias of each convolution, the merged weight in
    the kernel of a branch of that size, with a factor for each output channel, as long as no convolution follows.
    Returns False, with nothing changed, if there is no such parameter.
    """
    index = 0 if what == "weight" else 1
    before = kernel_of(source)[index]
    if before is None or not before.requires_grad:
        return False
    names, parameters = zip(*((name, p) for name, p in source.named_parameters() if p.requires_grad), strict=True)
    factors = torch.autograd.grad(before.sum(), parameters, allow_unused=True)
    before = before.detach().clone()  # of a layer it is the parameter itself
    for name, parameter, factor in zip(names, parameters, factors, strict=True):
        if factor is None or parameter.shape != shift.shape or not factor.abs().min() > _SMALLEST_FACTOR:
            continue
        if name.rpartition(".")[2] != what:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_((shift / factor.double()).to(parameter.dtype))
            after = kernel_of(source)[index]
            assert after is not None
            error = (after.double() - before.double() - shift).abs().max()
            if error <= _SAME_SHIFT * (shift.abs().max() + before.abs().max()):
                return True
            parameter.copy_(kept)
    return False
