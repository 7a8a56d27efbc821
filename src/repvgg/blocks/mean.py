"""The mean over the pixels that a kernel reads, as a branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.geometry import Geometry, Pair


class MeanFilter(nn.Module):
    """``y[c] = 1/k² Σ x[c]`` over the pixels that a kxk kernel reads, those beyond the border included.

    The plain form is ``K[o, i] = 1/k²`` on the diagonal of the channels. Without dilation it is computed as an average
    pool; PyTorch has none with dilation, so there it is a depthwise convolution.

    Args:
        geometry: gives kernel, stride, dilation and channels; ``out_channels`` is not looked at.
        padding: as that of the geometry, unless the image is padded already.
    """

    def __init__(self, geometry: Geometry, padding: Pair | None = None) -> None:
        super().__init__()
        self.channels = geometry.in_channels
        self.kernel_size, self.stride, self.dilation = geometry.kernel_size, geometry.stride, geometry.dilation
        self.padding = geometry.padding if padding is None else padding
        self.padding_mode = geometry.padding_mode
        self.register_buffer("one", torch.ones(self.channels, 1, *self.kernel_size), persistent=False)
        self.one: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the means, (N, C, H', W')."""
        padding = self.padding
        if self.padding_mode != "zeros" and any(padding):
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), self.padding_mode)
            padding = (0, 0)
        if self.dilation == (1, 1):
            return F.avg_pool2d(x, self.kernel_size, self.stride, padding)
        sums = F.conv2d(x, self.one, None, self.stride, padding, self.dilation, self.channels)
        return sums / (self.kernel_size[0] * self.kernel_size[1])

    def extra_repr(self) -> str:
        """Kernel, stride and padding."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
