"""Basic modules that blocks are built from. Shapes: x is (N, C, H, W), kernels are (O, I, kH, kW)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.geometry import Geometry, Pair


class ConvBN(nn.Module):
    """A convolution, normally without a bias, and a batch norm, by default a new one: ``y = BN(W * x)``."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels) if bn is None else bn

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class ComputedConv2d(nn.Conv2d):
    """A convolution ``y = K ∗ x + b`` whose kernel K is computed from parameters at every call.

    Subclasses return K, a function of ``weight`` and further parameters, from :meth:`kernel`.

    Attributes:
        kernels: names of the parameters that are kernels or factors of kernels and receive weight decay as such. All
            other parameters are scales, one number per channel.
    """

    kernels: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, geometry: Geometry, *, bias: bool = False) -> None:
        super().__init__(**vars(geometry), bias=bias)
        # A strided 1x1 convolution subsamples its input first: the oneDNN bug described at PointwiseConv2d.
        self.subsamples = geometry.kernel_size == (1, 1) and geometry.padding == (0, 0) and geometry.stride != (1, 1)

    @abstractmethod
    def kernel(self) -> Tensor:
        """Return K, (O, I, kH, kW)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d uses
        if self.subsamples:
            step_h, step_w = self.stride
            return F.conv2d(input[:, :, ::step_h, ::step_w], self.kernel(), self.bias, groups=self.groups)
        # _conv_forward pads with the padding mode, which F.conv2d does not know.
        out: Tensor = self._conv_forward(input, self.kernel(), self.bias)
        return out


class MeanFilter(nn.Module):
    """The mean over the pixels under a kernel: ``y[c] = 1/k² Σ x[c]``, padding included.

    Plain form: ``K[o, i] = 1/k²`` on the diagonal of the channels.

    Args:
        geometry: kernel, stride, dilation and input channels; ``out_channels`` is ignored.
        padding: overrides the geometry's padding, for an input that is already padded.
    """

    def __init__(self, geometry: Geometry, padding: Pair | None = None) -> None:
        super().__init__()
        self.channels = geometry.in_channels
        self.kernel_size, self.stride, self.dilation = geometry.kernel_size, geometry.stride, geometry.dilation
        self.padding = geometry.padding if padding is None else padding
        self.padding_mode = geometry.padding_mode
        # Not persistent: it is determined by the geometry, and checkpoints of other code do not have it.
        self.register_buffer("one", torch.ones(self.channels, 1, *self.kernel_size), persistent=False)
        self.one: Tensor

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros" and any(padding):
            # avg_pool2d and conv2d pad with zeros only.
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), self.padding_mode)
            padding = (0, 0)
        if self.dilation == (1, 1):
            return F.avg_pool2d(x, self.kernel_size, self.stride, padding)
        # PyTorch has no dilated average pool: sum with a depthwise convolution of ones.
        sums = F.conv2d(x, self.one, None, self.stride, padding, self.dilation, self.channels)
        return sums / (self.kernel_size[0] * self.kernel_size[1])

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scale each channel by a gate computed from the channel means.

    ``y = x · sigmoid(W2 ReLU(W1 mean_HW(x) + b1) + b2)``, with ``hidden`` channels in between, as RepVGG-D2se and
    RepVGGplus use it. The gate is not linear, so it ends a linear region and a collapse leaves it unchanged.

    Source: Hu et al., Squeeze-and-excitation networks, CVPR 2018.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)  # keepdim: down and up are 1x1 convolutions
        gate = self.up(self.down(mean).relu()).sigmoid()
        out: Tensor = x * gate
        return out
