"""Convolutions whose kernel is written as an identity and something learned: DiracNet, and its plainer form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.blocks.computed import ComputedConv2d
from repvgg.blocks.geometry import Geometry

_SMALL = 1e-12  # of the norm of a filter, so that a filter of zeros stays one


class IdentityConv2d(ComputedConv2d):
    """Trivial re-parameterization: ``y = (I + W) ∗ x + b`` (paper §4.2, Table 7).

    I is the kernel of the identity, ``I[o, i] = 1`` at the centre where i is o, counted inside a group. Output channels
    beyond the last input channel of a group have none. Plain form: ``K = I + W``. When to use it: as the control for
    DiracNet; and with W = 0 a 1x1 one is an identity that can be trained.
    """

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(geometry, bias=bias)
        self.register_buffer("unit", _unit(self.weight, geometry.groups), persistent=False)
        self.unit: Tensor

    def kernel(self) -> Tensor:
        """``I + W``."""
        return self.unit + self.weight


class DiracConv2d(ComputedConv2d):
    """DiracNet's convolution: ``y = (diag(α)·I + diag(β)·W/‖W‖₂) ∗ x + b``, each filter of W with its own norm.

    α begins at 1 and β at 0.1. Plain form: the kernel that the formula says. When to use it: to train deep plain
    networks without data flowing through shortcuts. α and β take no weight decay.

    Source: Zagoruyko and Komodakis, DiracNets, arXiv:1706.00388, §3; RepVGG §2.2 and Table 7.
    """

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(geometry, bias=bias)
        self.register_buffer("unit", _unit(self.weight, geometry.groups), persistent=False)
        self.unit: Tensor
        self.alpha = nn.Parameter(torch.ones(geometry.out_channels))
        self.beta = nn.Parameter(torch.full((geometry.out_channels,), 0.1))

    def kernel(self) -> Tensor:
        """``diag(α)·I + diag(β)·W/‖W‖₂``."""
        norms = self.weight.flatten(1).norm(dim=1).clamp_min(_SMALL)
        out: Tensor = self.alpha.view(-1, 1, 1, 1) * self.unit + (self.beta / norms).view(-1, 1, 1, 1) * self.weight
        return out


def _unit(weight_OIHW: Tensor, groups: int) -> Tensor:
    """The kernel of the identity in the shape of another."""
    return nn.init.dirac_(torch.zeros_like(weight_OIHW, requires_grad=False), groups)
