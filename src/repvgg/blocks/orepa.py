"""Online re-parameterization, OREPA (Hu et al., CVPR 2022): branches are merged into one kernel at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.basic import ComputedConv2d
from repvgg.blocks.geometry import Geometry

_NUM_BRANCHES = 6


class OnlineConv2d(ComputedConv2d):
    """``y = K ∗ x`` with ``K = Σ_b v_b · K_b``: linear branches, each with one scale v per output channel.

    The branches, as kernels of the size of the block:

    - ``weight``: kxk.
    - ``pointwise``: 1x1, at the centre.
    - ``average``: 1x1 and a mean, ``A/k²`` at each tap.
    - ``frequency``: 1x1 and a fixed cosine, ``F[o, i]·cos(πu(y + ½)/kH)·cos(πv(x + ½)/kW)``, with (u, v) cycling
      through all frequencies from filter to filter.
    - ``inner`` and ``outer``: 1x1 (an identity plus a learned part) and kxk, composed.
    - ``channel`` and ``mix``: kxk depthwise and 1x1, composed.

    Only the output is stored for the backward pass, so a training step needs less memory than RepVGG's branches, whose
    batch norms store feature maps. The scales v replace those batch norms; one batch norm follows the block. Plain
    form: K.

    Use it where DBB's branches are wanted and memory is short. All kernels receive weight decay, as in the authors'
    training script. v does not, under the policy of the RepVGG paper, although it does there.

    Raises:
        UsageError: the kernel size is even, so that it has no centre.
        BorderError: the padding does not centre the kernel.

    Source: Hu et al., Online Convolutional Re-parameterization, CVPR 2022, §3.2 and Fig. 4.
    """

    kernels: ClassVar[frozenset[str]] = frozenset(
        {"weight", "pointwise", "average", "frequency", "inner", "outer", "channel", "mix"}
    )

    def __init__(self, geometry: Geometry) -> None:
        geometry.require_centre()
        super().__init__(geometry)
        inputs, size = geometry.in_channels // geometry.groups, geometry.kernel_size
        self.pointwise = _kaiming_parameter(geometry.out_channels, inputs)
        self.average = _kaiming_parameter(geometry.out_channels, inputs)
        self.frequency = _kaiming_parameter(geometry.out_channels, inputs)
        self.inner = nn.Parameter(torch.zeros(geometry.groups, inputs, inputs))
        self.outer = _kaiming_parameter(geometry.out_channels, inputs, *size)
        self.channel = _kaiming_parameter(geometry.in_channels, 1, *size)
        self.mix = _kaiming_parameter(geometry.out_channels, inputs)
        # 1/√6 keeps the variance of the sum of six independent kernels at that of one.
        self.scales = nn.Parameter(torch.full((_NUM_BRANCHES, geometry.out_channels), _NUM_BRANCHES**-0.5))
        # Not persistent: constants, recomputed by _apply in the dtype of the module.
        self.register_buffer("cosines", cosine_basis(geometry.out_channels, *size).to(self.weight), persistent=False)
        self.register_buffer("unit", torch.eye(inputs), persistent=False)
        self.cosines: Tensor
        self.unit: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Recompute the cosines after .double(): widened float32 values would not be exact to float64.
        self.cosines = cosine_basis(self.out_channels, *self.kernel_size).to(self.weight)
        return self

    def kernel(self) -> Tensor:
        """Return the merged kernel, (O, I, kH, kW)."""
        height, width = self.kernel_size
        shape = (self.groups, self.out_channels // self.groups, self.in_channels // self.groups)
        to_centre = (width // 2, width // 2, height // 2, height // 2)
        outer = self.outer.view(*shape, height, width)
        # 1x1 then kxk merge over the m inner channels of each group g.
        composed = torch.einsum("gmi,gomyx->goiyx", self.unit + self.inner, outer)
        channel = self.channel.view(self.groups, 1, shape[2], height, width)
        separable = self.mix.view(*shape, 1, 1) * channel
        branches = (
            self.weight,
            F.pad(self.pointwise[:, :, None, None], to_centre),
            (self.average[:, :, None, None] / (height * width)).expand_as(self.weight),
            self.frequency[:, :, None, None] * self.cosines,
            composed.reshape(self.weight.shape),
            separable.reshape(self.weight.shape),
        )
        return (self.scales[:, :, None, None, None] * torch.stack(branches)).sum(0)


def cosine_basis(count: int, height: int, width: int) -> Tensor:
    """Return ``count`` basis images of the 2-D cosine transform, cycling through its frequencies.

    Returns:
        A float64 tensor (count, 1, height, width).
    """
    # float64: the error of float32 arguments would exceed float64's rounding in exactness tests.
    frequency = torch.arange(count, dtype=torch.float64) % (height * width)
    rows = _cosines(frequency.div(width, rounding_mode="floor"), height)
    columns = _cosines(frequency % width, width)
    return (rows[:, :, None] * columns[:, None, :])[:, None]


def _cosines(frequency_O: Tensor, size: int) -> Tensor:
    angles = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    return torch.cos(frequency_O[:, None] * angles)


def _kaiming_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(*shape), a=5**0.5))  # a: the default of nn.Conv2d
