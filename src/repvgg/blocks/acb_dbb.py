"""ACB and DBB: branches with kernels of other shapes (ACNet, ICCV 2019) or with several layers each (CVPR 2021)."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks.basic import ConvBN, MeanFilter
from repvgg.blocks.geometry import Geometry, PaddingMode
from repvgg.blocks.overparameterized import IdentityConv2d
from repvgg.blocks.repvgg import BranchSum
from repvgg.errors import UsageError


def acb(geometry: Geometry) -> BranchSum:
    """Build an ACB: ``y = BN(W ∗ x) + BN(Wv ∗ x) + BN(Wh ∗ x)`` with kernels kxk, kx1 and 1xk.

    Plain form: ``K = t·W``, plus ``tv·Wv`` on the middle column and ``th·Wh`` on the middle row. Use it in place of any
    convolution larger than 1x1 to strengthen the central cross of its kernel. It adds no shortcut: Table 7 of the
    RepVGG paper reports 73.58 % for it and 75.14 % for RepVGG.

    Returns:
        A sum of ``dense``, ``vertical`` and ``horizontal``.

    Raises:
        UsageError, BorderError: see :meth:`Geometry.require_centre`.

    Source: Ding et al., ACNet, ICCV 2019.
    """
    geometry.require_centre()
    height, width = geometry.kernel_size
    branches = {
        "dense": geometry.conv(),
        "vertical": geometry.around((height, 1)),
        "horizontal": geometry.around((1, width)),
    }
    return BranchSum({name: ConvBN(conv) for name, conv in branches.items()})


class PaddedNorm(nn.BatchNorm2d):
    """Batch norm followed by a padding with the batch norm's output for a zero, ``c = β − μ·γ/√(σ² + ε)``.

    The next convolution then sees what zero padding before the batch norm would have given it, so that 1x1, batch norm
    and unpadded kxk convolution equal one convolution with zero padding (DBB, §3.2, Fig. 3). Eval mode computes exactly
    that, ``y = BN(pad(x))``. Training mode computes ``y = pad(BN(x) − c) + c``: the batch statistics exclude the
    border, and c uses the running statistics, as published. Other padding modes repeat pixels and need no c.
    """

    def __init__(self, channels: int, padding: tuple[int, int], padding_mode: PaddingMode = "zeros") -> None:
        super().__init__(channels)
        self.sides = (padding[1], padding[1], padding[0], padding[0])  # left, right, top, bottom: the order of F.pad
        self.padding_mode = padding_mode

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.BatchNorm2d uses
        if not self.training:
            return super().forward(self._padded(input))
        out = super().forward(input)
        # After super().forward(): c uses the running statistics that already include this batch, as published.
        of_zero = self._of_zero() if self.padding_mode == "zeros" else 0.0
        return self._padded(out - of_zero) + of_zero

    def _padded(self, image: Tensor) -> Tensor:
        return F.pad(image, self.sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _of_zero(self) -> Tensor:
        assert self.running_mean is not None  # __init__ leaves track_running_stats on
        assert self.running_var is not None
        factor = (self.running_var + self.eps).rsqrt() * self.weight
        return (self.bias - self.running_mean * factor).view(-1, 1, 1)


def dbb(geometry: Geometry) -> BranchSum:
    """Build a DBB: the sum of kxk-BN, 1x1-BN, 1x1-BN-kxk-BN and 1x1-BN-mean-BN.

    Plain form, with t = γ/σ of the batch norm after each convolution and t' of the one in between:
    ``K = t·W + pad(t·W1) + t·Σ_d W2[o, d]·t'_d·W1[d, i] + t·t'·W1/k²``. A bias in between reaches all k² taps of the
    next layer; with :class:`PaddedNorm` it does so at the border as well. A depthwise block omits the 1x1 branch and
    the 1x1 before the mean, and has two inner channels per channel. The 1x1 of the third branch is initialized as an
    identity. Use it in place of any convolution larger than 1x1 if training may cost more.

    Returns:
        A sum of ``dense``, ``pointwise``, ``expanded`` and ``mean``.

    Raises:
        UsageError: the kernel size is even, or 1.
        BorderError: the padding does not centre the kernel.

    Source: Ding et al., Diverse Branch Block, CVPR 2021, §3.2 and Fig. 2.
    """
    geometry.require_centre()
    if geometry.taps == 1:
        raise UsageError("A DBB needs a kernel larger than 1x1: choose another block for 1x1 convolutions.")
    # The order of construction fixes which random numbers each branch is initialized with.
    branches = BranchSum({"dense": ConvBN(geometry.conv())})
    if not geometry.is_depthwise:
        branches["pointwise"] = ConvBN(geometry.around(1))
    branches["expanded"] = _expanded_branch(geometry)
    branches["mean"] = _mean_branch(geometry)
    return branches


def _expanded_branch(geometry: Geometry) -> nn.Sequential:
    """Build 1x1, batch norm and padding, kxk, batch norm."""
    channels = geometry.in_channels * (2 if geometry.is_depthwise else 1)
    inner = Geometry.square(geometry.in_channels, channels, groups=geometry.groups, kernel_size=1)
    first: nn.Module
    if geometry.is_depthwise:
        first = inner.conv()
    else:
        first = IdentityConv2d(inner)
        nn.init.zeros_(first.weight)
    norm = PaddedNorm(channels, geometry.padding, geometry.padding_mode)
    outer = replace(geometry, in_channels=channels, padding=(0, 0))  # PaddedNorm has padded already
    return nn.Sequential(first, norm, outer.conv(), nn.BatchNorm2d(geometry.out_channels))


def _mean_branch(geometry: Geometry) -> nn.Sequential:
    """Build 1x1, batch norm and padding, mean, batch norm; a depthwise block has the mean and its batch norm alone."""
    outer = replace(geometry, in_channels=geometry.out_channels, groups=1)
    if geometry.is_depthwise and geometry.in_channels == geometry.out_channels:
        return nn.Sequential(MeanFilter(outer), nn.BatchNorm2d(geometry.out_channels))
    inner = Geometry.square(geometry.in_channels, geometry.out_channels, groups=geometry.groups, kernel_size=1)
    norm = PaddedNorm(geometry.out_channels, geometry.padding, geometry.padding_mode)
    return nn.Sequential(inner.conv(), norm, MeanFilter(outer, padding=(0, 0)), nn.BatchNorm2d(geometry.out_channels))
