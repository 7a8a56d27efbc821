"""The diverse branch block, DBB (Ding et al., CVPR 2021), exact at the border."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.basic import ConvBN
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.encoded import IdentityConv2d
from repvgg.blocks.geometry import Geometry, PaddingMode
from repvgg.blocks.mean import MeanFilter
from repvgg.errors import UsageError


class PaddedNorm(nn.BatchNorm2d):
    """Batch norm, then a padding with what the batch norm makes of a zero, ``c = β − μ·γ/√(σ² + ε)``.

    A convolution on it sees what a zero padding in front of the batch norm would have shown it, so that 1x1, batch norm
    and padded convolution are one convolution with zero padding (DBB, §3.2, Fig. 3). In eval mode it is computed just
    so: ``y = BN(pad(x))``. In training mode it is ``y = pad(BN(x) − c) + c``: the image is normalized with the
    statistics of the batch, of which the border is no part, and the running statistics tell c, as published. Other
    padding modes repeat pixels and need no c.
    """

    def __init__(self, channels: int, padding: tuple[int, int], padding_mode: PaddingMode = "zeros") -> None:
        super().__init__(channels)
        self.sides = (padding[1], padding[1], padding[0], padding[0])
        self.padding_mode = padding_mode

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.BatchNorm2d gives it
        """Return the padded image."""
        if not self.training:
            return super().forward(self._padded(input))
        out = super().forward(input)
        of_zero = self._of_zero() if self.padding_mode == "zeros" else 0.0
        return self._padded(out - of_zero) + of_zero

    def _padded(self, image: Tensor) -> Tensor:
        return F.pad(image, self.sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _of_zero(self) -> Tensor:
        """c, (C, 1, 1)."""
        assert self.running_mean is not None  # it is not made without
        assert self.running_var is not None
        factor = (self.running_var + self.eps).rsqrt() * self.weight
        return (self.bias - self.running_mean * factor).view(-1, 1, 1)


def diverse(geometry: Geometry) -> BranchSum:
    """DBB: kxk-BN, 1x1-BN, 1x1-BN-kxk-BN and 1x1-BN-mean-BN, summed.

    Plain form, with t = γ/σ of the batch norm behind each convolution and t' of the one in between:
    ``K = t·W + pad(t·W1) + t·Σ_d W2[o, d]·t'_d·W1[d, i] + t·t'·W1/k²``; a bias in between passes through all k² taps of
    what follows, and by :class:`PaddedNorm` at the border as well. A depthwise block leaves out the 1x1 branch and the
    1x1 in front of the mean, and has two channels in between for each. In the third branch the 1x1 begins as an
    identity. When to use it: in the place of any convolution larger than 1x1, where training may cost more.

    Returns:
        A sum of ``dense``, ``pointwise``, ``expanded`` and ``mean``.

    Raises:
        UsageError: the kernel size is even, or 1.
        BorderError: the padding is another one than the centre needs.

    Source: Ding et al., Diverse Branch Block, CVPR 2021, §3.2 and Fig. 2.
    """
    geometry.require_centre()
    if geometry.taps == 1:
        raise UsageError("A 1x1 convolution has no diverse branches: take a larger kernel, or leave it as it is.")
    branches = BranchSum({"dense": ConvBN(geometry.conv())})
    if not geometry.is_depthwise:
        branches["pointwise"] = ConvBN(geometry.around(1))
    branches["expanded"] = _expanded(geometry)
    branches["mean"] = _mean(geometry)
    return branches


def _expanded(geometry: Geometry) -> nn.Sequential:
    """1x1, batch norm, padding, kxk, batch norm."""
    channels = geometry.in_channels * (2 if geometry.is_depthwise else 1)
    inner = Geometry.square(geometry.in_channels, channels, groups=geometry.groups, kernel_size=1)
    first = inner.conv() if geometry.is_depthwise else _identity(inner)
    norm = PaddedNorm(channels, geometry.padding, geometry.padding_mode)
    outer = replace(geometry, in_channels=channels, padding=(0, 0))
    return nn.Sequential(first, norm, outer.conv(), nn.BatchNorm2d(geometry.out_channels))


def _mean(geometry: Geometry) -> nn.Sequential:
    """1x1, batch norm, padding, mean, batch norm; the mean alone where the block is depthwise."""
    outer = replace(geometry, in_channels=geometry.out_channels, groups=1)
    if geometry.is_depthwise and geometry.in_channels == geometry.out_channels:
        return nn.Sequential(MeanFilter(outer), nn.BatchNorm2d(geometry.out_channels))
    inner = Geometry.square(geometry.in_channels, geometry.out_channels, groups=geometry.groups, kernel_size=1)
    norm = PaddedNorm(geometry.out_channels, geometry.padding, geometry.padding_mode)
    return nn.Sequential(inner.conv(), norm, MeanFilter(outer, padding=(0, 0)), nn.BatchNorm2d(geometry.out_channels))


def _identity(geometry: Geometry) -> IdentityConv2d:
    conv = IdentityConv2d(geometry)
    nn.init.zeros_(conv.weight)
    return conv
