"""Random networks: convolutions of any geometry, activations, branches, pools, views; and a bound of their error.

The bound: after every operation of a float64 run, its result is perturbed by as much as float32 arithmetic may change
it: ``n`` roundings of the largest value, with random signs. A convolution of k terms errs by up to 5 standard
deviations of its error, ``ERROR_GROWTH_LIMITS`` times √k times the 1.2e-7 of :mod:`repvgg.engine.planner.algorithms`,
relative to the largest value that enters it. What arrives at the outputs, times a margin for the signs, is the bound.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rounding import UNIT_ROUNDOFF

_CONV_ROUNDINGS = 5 * 2.6 * 2  # five deviations, "medium", 1.2e-7 in roundoffs
_OTHER_ROUNDINGS = 6
_TRIALS, _MARGIN = 3, 2

Integers = Callable[[int, int], int]  # draws a number of a closed range

ACTIVATIONS = (
    *(F.relu, F.relu6, F.hardswish, F.hardsigmoid, torch.sigmoid, F.silu, F.gelu, torch.tanh, torch.abs),
    *(lambda x: F.leaky_relu(x, 0.1), lambda x: x * 0.5 + 0.25, lambda x: x.clamp(-1, 2), lambda x: 1 - x),
)


@dataclass
class Instruction:
    """A function of earlier values; ``layer`` is the name of its module, if it has one."""

    function: Callable[..., Tensor]
    arguments: tuple[int, ...]
    layer: str = ""
    terms: int = 0  # of each sum of a convolution
    roundings: int = _OTHER_ROUNDINGS


class RandomNetwork(nn.Module):
    """Instructions on a list of values, the first of which are the images."""

    def __init__(self, integers: Integers, size: int = 6, seed: int = 0) -> None:
        super().__init__()
        self._integers, self._random = integers, np.random.default_rng(seed)
        self.instructions: list[Instruction] = []
        self.layers = nn.ModuleDict()
        self.input_shape = integers(1, 40), integers(1, 17), integers(1, 17)
        self.shapes = [self.input_shape]
        kinds = [getattr(self, name) for name in sorted(vars(RandomNetwork)) if name.startswith("add_")]
        for _ in range(size):
            kinds[integers(0, len(kinds) - 1)](self._source())
        self.add_activation(len(self.shapes) - 1)  # views alone are no network
        last = len(self.shapes) - 1
        self.outputs = sorted({last, integers(0, last) or last})
        if integers(0, 2) == 0:
            self._append(lambda x: x.mean((2, 3)), (last,), self.shapes[last][:1])
            self.outputs = [*self.outputs, last + 1]

    def forward(self, x: Tensor, perturb: Callable[..., Tensor] | None = None) -> Any:
        values = [x]
        for one in self.instructions:
            given = [values[at] for at in one.arguments]
            value = self.layers[one.layer](*given) if one.layer else one.function(*given)
            values.append(perturb(value, one, given) if perturb else value)
        return [values[at] for at in self.outputs]

    def error_bound(self, x: Tensor) -> tuple[list[Tensor], list[float]]:
        """Return the outputs in float64 and how far those in float32 may be from them."""
        exact, generator = copy.deepcopy(self).double(), torch.Generator().manual_seed(0)

        def perturb(value: Tensor, one: Instruction, given: list[Tensor]) -> Tensor:
            scale = max(each.abs().max().item() for each in (value, *given))
            count = _CONV_ROUNDINGS * math.sqrt(one.terms) if one.terms else one.roundings
            noise = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            return value + noise * (count * UNIT_ROUNDOFF * max(scale, 1e-3))

        with torch.inference_mode():
            wanted = exact(x.double())
            trials = [exact(x.double(), perturb) for _ in range(_TRIALS)]
        bounds = [
            _MARGIN * max((trial[at] - one).abs().max().item() for trial in trials) for at, one in enumerate(wanted)
        ]
        return wanted, bounds

    # Drawing

    def _source(self) -> int:
        """Draw a value; the last ones are the most frequent."""
        last = len(self.shapes) - 1
        return last - min(last, self._integers(0, 3) * self._integers(0, 1))

    def _append(self, function, arguments, shape, layer: nn.Module | None = None, terms: int = 0) -> int:
        name = str(len(self.instructions)) if layer is not None else ""
        if layer is not None:
            self.layers[name] = layer.eval()
        self.instructions.append(Instruction(function, arguments, name, terms))
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _same(self, shape: tuple[int, ...], other: int) -> int | None:
        """Return another value of this shape, if there is one."""
        fitting = [at for at, one in enumerate(self.shapes) if one == shape and at != other]
        return fitting[self._integers(0, len(fitting) - 1)] if fitting else None

    def _convolve(self, source: int, conv: nn.Conv2d) -> int:
        _, height, width = self.shapes[source]
        axes = zip((height, width), conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
        size = [
            (length + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for length, kernel, stride, pad, step in axes
        ]
        if min(size) < 1:
            return source
        with torch.no_grad():
            shape, count = conv.weight.shape, conv.weight[0].numel()
            weight = self._random.standard_normal(tuple(shape)) / math.sqrt(count)
            conv.weight.copy_(torch.from_numpy(weight))
            conv.bias.copy_(torch.from_numpy(self._random.standard_normal(len(conv.bias)) / 4))
        return self._append(None, (source,), (conv.out_channels, *size), conv, count)

    def add_conv(self, source: int) -> None:
        channels, integers = self.shapes[source][0], self._integers
        kernel = ((3, 3), (3, 3), (1, 1), (5, 3), (2, 2))[integers(0, 4)]
        groups = [count for count in range(1, channels + 1) if channels % count == 0]
        count = groups[integers(0, len(groups) - 1)] if integers(0, 2) == 0 else 1
        outputs = count * integers(1, max(1, 45 // count))
        stride, dilation = (1, 2, 1)[integers(0, 2)], (1, 1, 2)[integers(0, 2)]
        padding = integers(0, 2), integers(0, 2)
        self._convolve(source, nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, count))

    def add_winograd(self, source: int) -> None:
        channels = self.shapes[source][0]
        self._convolve(source, nn.Conv2d(channels, self._integers(1, 45), 3, 1, 1))

    def add_transposed(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        stride, extra = self._integers(1, 2), self._integers(0, 1)
        if height * width > 200:
            return
        outputs = self._integers(1, 20)
        layer = nn.ConvTranspose2d(channels, outputs, 3, stride, 1, extra if stride == 2 else 0)
        layer.weight.data.copy_(
            torch.from_numpy(self._random.standard_normal(tuple(layer.weight.shape)) / math.sqrt(9 * channels))
        )
        size = tuple(layer(torch.zeros(1, channels, height, width)).shape[2:])
        self._append(None, (source,), (outputs, *size), layer, 9 * channels)

    def add_depthwise(self, source: int) -> None:
        channels, kernel = self.shapes[source][0], (3, 5, 7)[self._integers(0, 2)]
        stride = self._integers(1, 2)
        self._convolve(source, nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels))

    def add_batch_norm(self, source: int) -> None:
        channels = self.shapes[source][0]
        norm = nn.BatchNorm2d(channels)
        with torch.no_grad():
            for vector, low in (
                (norm.running_mean, -0.5),
                (norm.running_var, 0.5),
                (norm.weight, 0.5),
                (norm.bias, -0.5),
            ):
                vector.copy_(torch.from_numpy(low + self._random.random(channels)))
        self._append(None, (source,), self.shapes[source], norm)

    def add_prelu(self, source: int) -> None:
        layer = nn.PReLU(self.shapes[source][0])
        layer.weight.data.copy_(torch.from_numpy(self._random.random(self.shapes[source][0])))
        self._append(None, (source,), self.shapes[source], layer)

    def add_activation(self, source: int) -> None:
        function = ACTIVATIONS[self._integers(0, len(ACTIVATIONS) - 1)]
        self._append(function, (source,), self.shapes[source])

    def add_residual(self, source: int) -> None:
        """Append a block whose result is added to its input, with an activation."""
        shape = self.shapes[source]
        kernel = (1, 3)[self._integers(0, 1)]
        inner = self._convolve(source, nn.Conv2d(shape[0], shape[0], kernel, padding=kernel // 2))
        total = self._append(torch.add, (inner, source), shape)
        if self._integers(0, 1):
            self._append(F.relu, (total,), shape)

    def add_arithmetic(self, source: int) -> None:
        shape = self.shapes[source]
        other = self._same(shape, source)
        function = (torch.add, torch.sub, torch.mul, torch.maximum)[self._integers(0, 3)]
        if other is not None:
            self._append(function, (source, other), shape)

    def add_gate(self, source: int) -> None:
        shape = self.shapes[source]
        pooled = self._append(lambda x: x.mean((2, 3), keepdim=True), (source,), (shape[0], 1, 1))
        hidden = self._convolve(pooled, nn.Conv2d(shape[0], self._integers(1, 9), 1))
        active = self._append(F.relu, (hidden,), self.shapes[hidden])
        factors = self._convolve(active, nn.Conv2d(self.shapes[active][0], shape[0], 1))
        gate = self._append((torch.sigmoid, F.hardsigmoid)[self._integers(0, 1)], (factors,), (shape[0], 1, 1))
        self._append(torch.mul, (source, gate), shape)

    def add_concatenation(self, source: int) -> None:
        shape = self.shapes[source]
        others = [at for at, one in enumerate(self.shapes) if one[1:] == shape[1:] and shape[0] + one[0] <= 70]
        if others:
            other = others[self._integers(0, len(others) - 1)]
            joined = shape[0] + self.shapes[other][0], *shape[1:]
            self._append(lambda *x: torch.cat(x, 1), (source, other), joined)

    def add_slice(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        first = self._integers(0, channels - 1)
        count, step = self._integers(1, channels - first), self._integers(1, 2)
        shape = count, len(range(0, height, step)), width
        self._append(lambda x: x[:, first : first + count, ::step], (source,), shape)

    def add_shuffle(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        groups = [count for count in range(1, channels + 1) if channels % count == 0]
        count = groups[self._integers(0, len(groups) - 1)]
        if channels % 4 == 0 and height * width <= 200 and self._integers(0, 1):
            self._append(lambda x: F.pixel_shuffle(x, 2), (source,), (channels // 4, 2 * height, 2 * width))
            return
        self._append(
            lambda x: x.view(len(x), count, channels // count, height, width).transpose(1, 2).flatten(1, 2),
            (source,),
            self.shapes[source],
        )

    def add_pool(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        kernel, stride = self._integers(2, 3), self._integers(1, 2)
        if min(height, width) < kernel:
            return
        kind = (F.max_pool2d, F.avg_pool2d)[self._integers(0, 1)]
        pad, ceil = self._integers(0, 1), bool(self._integers(0, 1))
        result = kind(torch.zeros(1, 1, height, width), kernel, stride, pad, ceil_mode=ceil)
        shape = channels, *result.shape[2:]
        self._append(lambda x: kind(x, kernel, stride, pad, ceil_mode=ceil), (source,), shape)

    def add_adaptive_pool(self, source: int) -> None:
        size = self._integers(1, 4), self._integers(1, 4)
        # Cells may overlap, and be larger than the map has pixels.
        self._append(lambda x: F.adaptive_avg_pool2d(x, size), (source,), (self.shapes[source][0], *size))

    def add_upsampling(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        if height * width > 200:
            return
        kinds = ({}, {"mode": "bilinear"}, {"mode": "bilinear", "align_corners": True})
        more = kinds[self._integers(0, 2)]
        shape = channels, 2 * height, 2 * width
        self._append(lambda x: F.interpolate(x, scale_factor=2, **more), (source,), shape)
        # The position of a pixel is rounded, and with it the weights of its neighbours.
        self.instructions[-1].roundings += 4 * max(shape[1:])

    def add_pad(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        left, right, above, below = (self._integers(0, 2) for _ in range(4))
        shape = channels, height + above + below, width + left + right
        self._append(lambda x: F.pad(x, (left, right, above, below)), (source,), shape)

    def add_channels_last(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        weight = torch.from_numpy(self._random.standard_normal((channels, channels)) / math.sqrt(channels)).float()

        def function(x: Tensor) -> Tensor:
            y = F.layer_norm(x.permute(0, 2, 3, 1), (channels,), eps=1e-2)
            return F.gelu(F.linear(y, weight.to(x.dtype))).permute(0, 3, 1, 2)

        self._append(function, (source,), (channels, height, width), terms=100 * channels)

    def add_softmax(self, source: int) -> None:
        axis = self._integers(1, 3)
        self._append(lambda x: x.softmax(axis), (source,), self.shapes[source])

    def add_attention(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        heads = (1, 2)[self._integers(0, 1)] if channels % 2 == 0 else 1

        def function(x: Tensor) -> Tensor:
            y = F.layer_norm(x.flatten(2).transpose(1, 2), (channels,), eps=1e-2)
            y = y.view(len(x), height * width, heads, channels // heads).transpose(1, 2)
            z = F.scaled_dot_product_attention(y, y, y).transpose(1, 2)
            return z.reshape(len(x), height, width, channels).permute(0, 3, 1, 2)

        if height * width <= 200:
            self._append(function, (source,), (channels, height, width), terms=100 * channels)

    def add_group_norm(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        values = channels * height * width
        # PyTorch refuses groups of one value.
        groups = [count for count in range(1, channels + 1) if channels % count == 0 and values > count]
        if not groups:
            return
        count = groups[self._integers(0, len(groups) - 1)]
        terms = 100 * height * width * channels // count
        self._append(lambda x: F.group_norm(x, count, eps=1e-2), (source,), (channels, height, width), terms=terms)

    def add_wrap_pad(self, source: int) -> None:
        channels, height, width = self.shapes[source]
        mode = ("reflect", "replicate", "circular")[self._integers(0, 2)]
        left, right, above, below = (self._integers(0, min(2, size - 1)) for size in (width, width, height, height))
        shape = channels, height + above + below, width + left + right
        self._append(lambda x: F.pad(x, (left, right, above, below), mode=mode), (source,), shape)
