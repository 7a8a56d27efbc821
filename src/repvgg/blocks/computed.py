"""Convolutions whose kernel is computed from parameters at each call."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.geometry import Geometry


class ComputedConv2d(nn.Conv2d):
    """``y = K ∗ x + b`` with K a function of ``weight`` and other parameters, which a subclass gives in :meth:`kernel`.

    A strided 1x1 kernel skips pixels first, for the reason that :class:`repvgg.blocks.PointwiseConv2d` tells.

    Attributes:
        kernels: names of the parameters that are kernels, or factors of kernels, and decay as such; the others are
            scales, a number a channel.
    """

    kernels: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(
            geometry.in_channels,
            geometry.out_channels,
            geometry.kernel_size,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            bias,
            geometry.padding_mode,
        )
        self.skips = geometry.kernel_size == (1, 1) and geometry.padding == (0, 0) and geometry.stride != (1, 1)

    @abstractmethod
    def kernel(self) -> Tensor:
        """K, (O, I, kH, kW)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d gives it
        """Return the convolution with the computed kernel."""
        if self.skips:
            rows, columns = self.stride
            return F.conv2d(input[:, :, ::rows, ::columns], self.kernel(), self.bias, groups=self.groups)
        out: Tensor = self._conv_forward(input, self.kernel(), self.bias)
        return out
