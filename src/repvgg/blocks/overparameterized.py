"""Convolutions with more parameters than kernel elements and no branches: DiracNet, DO-Conv, ExpandNet."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from repvgg.blocks.basic import ComputedConv2d
from repvgg.blocks.geometry import Geometry
from repvgg.errors import UsageError


class DOConv2d(ComputedConv2d):
    """Depthwise over-parameterized convolution: ``K[o, i, k] = Σ_m (δ_km + D[i, k, m]) · W[o, i, m]``, ``y = K ∗ x``.

    W has the shape (O, I, kH, kW) of a kernel, its k² taps being the m of the formula (D_mul = k², as published). D is
    (C, k², k²) and starts at zero, so that the layer starts as the convolution with W. Plain form: K. Use it in place
    of any convolution larger than 1x1; it adds one small matrix product per step. D receives the same weight decay as
    W, towards the plain convolution: the authors train with their baselines' settings, which decay all kernels.

    Source: Cao et al., DO-Conv, IEEE Transactions on Image Processing 31 (2022), §3.
    """

    kernels: ClassVar[frozenset[str]] = frozenset({"weight", "depthwise"})

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(geometry, bias=bias)
        # D holds the difference to the identity, so that zero, and weight decay towards it, is the plain convolution.
        self.depthwise = nn.Parameter(torch.zeros(geometry.in_channels, geometry.taps, geometry.taps))
        self.register_buffer("unit", torch.eye(geometry.taps), persistent=False)
        self.taps = geometry.taps
        self.unit: Tensor

    def kernel(self) -> Tensor:
        inputs, outputs = self.in_channels // self.groups, self.out_channels // self.groups
        depthwise = (self.unit + self.depthwise).view(self.groups, inputs, self.taps, self.taps)
        kernel = torch.einsum("gikm,goim->goik", depthwise, self.weight.view(self.groups, outputs, inputs, self.taps))
        return kernel.reshape(self.out_channels, inputs, *self.kernel_size)


def expand_cl(geometry: Geometry, rate: int = 4) -> nn.Sequential:
    """Build an ExpandNet-CL: a convolution as three, ``y = W3 ∗ (W2 ∗ (W1 ∗ x))``, with no activations in between.

    1x1 from C to rC channels, kxk from rC to rC', 1x1 from rC' to C'. The merged kernel is
    ``K[o, i] = Σ_m Σ_n W3[o, n]·W2[n, m]·W1[m, i]``, of the given geometry. Use it to train small networks. ``rate`` is
    r, 4 in the paper.

    Source: Guo et al., ExpandNets, NeurIPS 2020, §3.1.
    """
    inner, outer = rate * geometry.in_channels, rate * geometry.out_channels
    # The first layer pads: padding between the layers would not equal the merged kernel at the border.
    first = replace(geometry, out_channels=inner, kernel_size=(1, 1), stride=(1, 1), dilation=(1, 1))
    middle = replace(geometry, in_channels=inner, out_channels=outer, padding=(0, 0))
    last = Geometry.square(outer, geometry.out_channels, groups=geometry.groups, kernel_size=1)
    return nn.Sequential(first.conv(), middle.conv(), last.conv())


def expand_ck(geometry: Geometry, rate: int = 4) -> nn.Sequential:
    """Build an ExpandNet-CK: a kxk convolution as ``(k − 1) / 2`` convolutions of 3x3 with rC channels in between.

    The first layer pads and the last one carries the stride. Plain form: the composition of the kernels, of size k. Use
    it for kernels of size 5 and more; for 3x3 it is a single convolution. ``rate`` is r, 4 in the paper.

    Raises:
        UsageError: the kernel is not square, odd and at least 3x3.

    Source: Guo et al., ExpandNets, NeurIPS 2020, §3.2.
    """
    height, width = geometry.kernel_size
    if height != width or not height % 2 or height < 3:
        raise UsageError(f"A {height}x{width} kernel is no stack of 3x3 kernels: use an odd square size from 3x3 up.")
    count, inner = (height - 1) // 2, rate * geometry.in_channels
    layers = []
    for index in range(count):
        is_first, is_last = index == 0, index == count - 1
        layer = replace(
            geometry,
            in_channels=geometry.in_channels if is_first else inner,
            out_channels=geometry.out_channels if is_last else inner,
            kernel_size=(3, 3),
            stride=geometry.stride if is_last else (1, 1),
            # All padding comes first: padding between layers would differ from the merged kernel at the border.
            padding=geometry.padding if is_first else (0, 0),
        )
        layers.append(layer.conv())
    return nn.Sequential(*layers)


_MIN_FILTER_NORM = 1e-12  # keeps an all-zero filter at zero instead of dividing 0 by 0


class IdentityConv2d(ComputedConv2d):
    """Trivial re-parameterization: ``y = (I + W) ∗ x + b`` (RepVGG §4.2, Table 7).

    I is the identity kernel: ``I[o, i] = 1`` at the centre where o equals i, counted within each group. Output channels
    beyond the last input channel of a group get zeros. Plain form: ``K = I + W``. Use it as the control experiment for
    DiracNet; a 1x1 one with W = 0 is a trainable identity.
    """

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(geometry, bias=bias)
        self.register_buffer("unit", _identity_kernel(self.weight, geometry.groups), persistent=False)
        self.unit: Tensor

    def kernel(self) -> Tensor:
        return self.unit + self.weight


class DiracConv2d(ComputedConv2d):
    """DiracNet's convolution: ``y = (diag(α)·I + diag(β)·W/‖W‖₂) ∗ x + b``, each filter divided by its own norm.

    α is initialized to 1 and β to 0.1; neither receives weight decay. Plain form: the kernel in the formula. Use it to
    train deep plain networks without shortcuts in the data flow.

    Source: Zagoruyko and Komodakis, DiracNets, arXiv:1706.00388, §3; RepVGG §2.2 and Table 7.
    """

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(geometry, bias=bias)
        self.register_buffer("unit", _identity_kernel(self.weight, geometry.groups), persistent=False)
        self.unit: Tensor
        # Initial values of the authors' code.
        self.alpha = nn.Parameter(torch.ones(geometry.out_channels))
        self.beta = nn.Parameter(torch.full((geometry.out_channels,), 0.1))

    def kernel(self) -> Tensor:
        # β/‖W‖ is one number per filter: multiply it in before it meets the large tensor.
        norms = self.weight.flatten(1).norm(dim=1).clamp_min(_MIN_FILTER_NORM)
        out: Tensor = self.alpha.view(-1, 1, 1, 1) * self.unit + (self.beta / norms).view(-1, 1, 1, 1) * self.weight
        return out


def _identity_kernel(weight_OIHW: Tensor, groups: int) -> Tensor:
    return nn.init.dirac_(torch.zeros_like(weight_OIHW, requires_grad=False), groups)
