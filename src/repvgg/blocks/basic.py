"""The pieces that multi-branch blocks are made of. Shapes: x is (N, C, H, W), kernels are (O, I, kH, kW)."""

from __future__ import annotations

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

Size: TypeAlias = int | tuple[int, int]


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that takes its stride by skipping pixels first.

    ``y = W * x[:, :, ::s, ::s] + b``: the same function as ``nn.Conv2d(..., kernel_size=1, stride=s)``, computed as a
    stride-1 convolution of a strided view. oneDNN's weight gradient of a strided 1x1 convolution on few channels
    writes past its workspace in channels_last on x86 CPUs (uxlfoundation/oneDNN#6035); this form never reaches it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: Size = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, groups=groups, bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d gives it
        """Return the convolution of every ``stride``-th pixel of ``input``."""
        step_h, step_w = self.stride
        if self.stride != (1, 1):
            input = input[:, :, ::step_h, ::step_w]  # noqa: A001
        out: Tensor = F.conv2d(input, self.weight, self.bias, groups=self.groups)
        return out


class ConvBN(nn.Module):
    """A convolution, as a rule without bias, then batch norm (a fresh one, unless given): ``y = BN(W * x)``."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels) if bn is None else bn

    def forward(self, x: Tensor) -> Tensor:
        """Return ``BN(W * x)``."""
        out: Tensor = self.bn(self.conv(x))
        return out
