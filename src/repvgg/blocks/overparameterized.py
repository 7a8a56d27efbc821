"""Convolutions with more parameters than taps: DO-Conv and ExpandNet."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from repvgg.blocks.computed import ComputedConv2d
from repvgg.blocks.geometry import Geometry
from repvgg.errors import UsageError


class DOConv2d(ComputedConv2d):
    """Depthwise over-parameterized convolution: ``K[o, i, k] = Σ_m (δ_km + D[i, k, m]) · W[o, i, m]``, ``y = K ∗ x``.

    W has the shape (O, I, kH, kW) of a kernel, its k² taps being the m of the formula (D_mul = k², as published), and D
    the shape (C, k², k²), zero at first, so that it begins as the convolution with W. Plain form: K. When to use it:
    in the place of any convolution larger than 1x1; it costs one small product of matrices a step. D decays as W does,
    towards the plain convolution: its authors trained with the settings of their baselines, which spare no kernel.

    Source: Cao et al., DO-Conv, IEEE Transactions on Image Processing 31 (2022), §3.
    """

    kernels: ClassVar[frozenset[str]] = frozenset({"weight", "depthwise"})

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(geometry, bias=bias)
        self.depthwise = nn.Parameter(torch.zeros(geometry.in_channels, geometry.taps, geometry.taps))
        self.register_buffer("unit", torch.eye(geometry.taps), persistent=False)
        self.taps = geometry.taps
        self.unit: Tensor

    def kernel(self) -> Tensor:
        """``D ∘ W``, (O, I, kH, kW)."""
        inputs, outputs = self.in_channels // self.groups, self.out_channels // self.groups
        depthwise = (self.unit + self.depthwise).view(self.groups, inputs, self.taps, self.taps)
        kernel = torch.einsum("gikm,goim->goik", depthwise, self.weight.view(self.groups, outputs, inputs, self.taps))
        return kernel.reshape(self.out_channels, inputs, *self.kernel_size)


def expand_layers(geometry: Geometry, rate: int = 4) -> nn.Sequential:
    """ExpandNet-CL: a convolution as three, ``y = W3 ∗ (W2 ∗ (W1 ∗ x))``, with nothing but channels in between.

    1x1 from C to rC channels, kxk from rC to rC', 1x1 from rC' to C'. The first one pads, so that the merged kernel
    ``K[o, i] = Σ_m Σ_n W3[o, n]·W2[n, m]·W1[m, i]`` is exact at the border. When to use it: to train small networks.

    Args:
        geometry: of the convolution that it is equal to.
        rate: r, 4 in the paper.

    Source: Guo et al., ExpandNets, NeurIPS 2020, §3.1.
    """
    inner, outer = rate * geometry.in_channels, rate * geometry.out_channels
    first = replace(geometry, out_channels=inner, kernel_size=(1, 1), stride=(1, 1), dilation=(1, 1))
    middle = replace(geometry, in_channels=inner, out_channels=outer, padding=(0, 0))
    last = Geometry.square(outer, geometry.out_channels, groups=geometry.groups, kernel_size=1)
    return nn.Sequential(first.conv(), middle.conv(), last.conv())


def expand_kernel(geometry: Geometry, rate: int = 4) -> nn.Sequential:
    """ExpandNet-CK: a kxk convolution as ``(k − 1) / 2`` convolutions 3x3, rC channels wide in between.

    The first one pads and the last one strides. Plain form: the composition of the kernels, of size k. When to use it:
    for kernels of 5 and more; of a 3x3 convolution it makes the same convolution.

    Args:
        geometry: of the convolution that it is equal to; its kernel is square and odd.
        rate: r, 4 in the paper.

    Raises:
        UsageError: the kernel is not square, odd and at least 3x3.

    Source: Guo et al., ExpandNets, NeurIPS 2020, §3.2.
    """
    height, width = geometry.kernel_size
    if height != width or not height % 2 or height < 3:
        raise UsageError(f"A kernel of {height}x{width} is no stack of 3x3 kernels: take an odd square from 3x3 on.")
    count, wide = (height - 1) // 2, rate * geometry.in_channels
    layers = []
    for place in range(count):
        first, last = place == 0, place == count - 1
        layer = replace(
            geometry,
            in_channels=geometry.in_channels if first else wide,
            out_channels=geometry.out_channels if last else wide,
            kernel_size=(3, 3),
            stride=geometry.stride if last else (1, 1),
            padding=geometry.padding if first else (0, 0),
        )
        layers.append(layer.conv())
    return nn.Sequential(*layers)
