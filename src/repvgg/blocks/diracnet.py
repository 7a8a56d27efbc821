"""DiracNet's convolution: the kernel is an identity plus a learned part; and its simpler control without norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.blocks.basic import ComputedConv2d
from repvgg.blocks.geometry import Geometry

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
        """Return ``I + W``."""
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
        """Return ``diag(α)·I + diag(β)·W/‖W‖₂``."""
        # β/‖W‖ is one number per filter: multiply it in before it meets the large tensor.
        norms = self.weight.flatten(1).norm(dim=1).clamp_min(_MIN_FILTER_NORM)
        out: Tensor = self.alpha.view(-1, 1, 1, 1) * self.unit + (self.beta / norms).view(-1, 1, 1, 1) * self.weight
        return out


def _identity_kernel(weight_OIHW: Tensor, groups: int) -> Tensor:
    return nn.init.dirac_(torch.zeros_like(weight_OIHW, requires_grad=False), groups)
