"""Online re-parameterization, OREPA (Hu et al., CVPR 2022): branches are merged into one kernel at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.computed import ComputedConv2d
from repvgg.blocks.geometry import Geometry

_TERMS = 6


class OnlineConv2d(ComputedConv2d):
    """``y = K ∗ x`` with ``K = Σ_b v_b · K_b``, one number v a branch and output channel; linear branches only.

    The branches, as kernels of the size of the block:

    - ``weight``: kxk.
    - ``pointwise``: 1x1, at the centre.
    - ``average``: 1x1 and a mean, ``A/k²`` at each tap.
    - ``frequency``: 1x1 and a fixed cosine, ``F[o, i]·cos(πu(y + ½)/kH)·cos(πv(x + ½)/kW)``, (u, v) going through all
      frequencies from filter to filter.
    - ``inner`` and ``outer``: 1x1 (an identity and something learned) and kxk, composed.
    - ``channel`` and ``mix``: kxk depthwise and 1x1, composed.

    No feature map but the outcome is kept for the backward pass, so a training step takes less memory than that of
    RepVGG's branches. Batch norms between them would keep maps; v does their part, and one batch norm follows. Each v
    begins at ``1/√6``, which leaves the sum of six independent kernels as large as one. Plain form: K.

    When to use it: where the branches of DBB are wanted and memory is short. All kernels decay, as in the authors'
    training script; v does not under the policy of RepVGG's paper, though it does there.

    Raises:
        UsageError: the kernel size is even, so that it has no centre.
        BorderError: the padding is another one than the centre needs.

    Source: Hu et al., Online Convolutional Re-parameterization, CVPR 2022, §3.2 and Fig. 4.
    """

    kernels: ClassVar[frozenset[str]] = frozenset(
        {"weight", "pointwise", "average", "frequency", "inner", "outer", "channel", "mix"}
    )

    def __init__(self, geometry: Geometry) -> None:
        geometry.require_centre()
        super().__init__(geometry)
        inputs, size = geometry.in_channels // geometry.groups, geometry.kernel_size
        self.pointwise = _fresh(geometry.out_channels, inputs)
        self.average = _fresh(geometry.out_channels, inputs)
        self.frequency = _fresh(geometry.out_channels, inputs)
        self.inner = nn.Parameter(torch.zeros(geometry.groups, inputs, inputs))
        self.outer = _fresh(geometry.out_channels, inputs, *size)
        self.channel = _fresh(geometry.in_channels, 1, *size)
        self.mix = _fresh(geometry.out_channels, inputs)
        self.scales = nn.Parameter(torch.full((_TERMS, geometry.out_channels), _TERMS**-0.5))
        self.register_buffer("cosines", cosines(geometry.out_channels, *size).to(self.weight), persistent=False)
        self.register_buffer("unit", torch.eye(inputs), persistent=False)
        self.cosines: Tensor
        self.unit: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Another dtype takes the cosines anew: in float64 they are not those of float32."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.cosines = cosines(self.out_channels, *self.kernel_size).to(self.weight)
        return self

    def kernel(self) -> Tensor:
        """The merged kernel (O, I, kH, kW)."""
        height, width = self.kernel_size
        shape = (self.groups, self.out_channels // self.groups, self.in_channels // self.groups)
        centre = (width // 2, width // 2, height // 2, height // 2)
        outer = self.outer.view(*shape, height, width)
        composed = torch.einsum("gmi,gomyx->goiyx", self.unit + self.inner, outer)
        channel = self.channel.view(self.groups, 1, shape[2], height, width)
        separable = self.mix.view(*shape, 1, 1) * channel
        terms = (
            self.weight,
            F.pad(self.pointwise[:, :, None, None], centre),
            (self.average[:, :, None, None] / (height * width)).expand_as(self.weight),
            self.frequency[:, :, None, None] * self.cosines,
            composed.reshape(self.weight.shape),
            separable.reshape(self.weight.shape),
        )
        return (self.scales[:, :, None, None, None] * torch.stack(terms)).sum(0)


def cosines(count: int, height: int, width: int) -> Tensor:
    """Basis images of the cosine transform, (count, 1, height, width), frequency after frequency in turn; float64."""
    frequency = torch.arange(count, dtype=torch.float64) % (height * width)
    rows = _waves(frequency.div(width, rounding_mode="floor"), height)
    columns = _waves(frequency % width, width)
    return (rows[:, :, None] * columns[:, None, :])[:, None]


def _waves(frequency_O: Tensor, size: int) -> Tensor:
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    return torch.cos(frequency_O[:, None] * places)


def _fresh(*shape: int) -> nn.Parameter:
    """Numbers as ``nn.Conv2d`` begins with."""
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(*shape), a=5**0.5))
