"""Blocks for depthwise convolutions: RepLKNet and UniRepLKNet (large kernels), and FastViT's RepMixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.blocks.basic import ConvBN
from repvgg.blocks.geometry import Geometry
from repvgg.blocks.repvgg import BranchSum, branches_of
from repvgg.errors import UsageError

#: (kernel size, dilation) of the branches parallel to a large kernel, by its size (UniRepLKNet's code).
_DILATED_BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def replk(geometry: Geometry, small: int | None = None) -> BranchSum:
    """Build a RepLK block: ``y = BN(W ∗ x) + BN(Ws ∗ x)``, a large kernel and a small one with the same centre.

    Plain form: ``K = t·W + pad(ts·Ws)``. Use it depthwise with kernels from 7 to 31; the small kernel makes the large
    one trainable.

    Args:
        geometry: of the large convolution.
        small: size of the small kernel; None selects the largest of 5, 3 and 1 that is smaller than the large one.

    Returns:
        A sum of ``dense`` and ``small``.

    Raises:
        UsageError: the kernel is even, or the small one does not fit in it.
        BorderError: the padding does not centre the kernel.

    Source: Ding et al., RepLKNet, CVPR 2022, §3 (guideline 3).
    """
    geometry.require_centre()
    limit = min(geometry.kernel_size)
    size = next((size for size in (5, 3, 1) if size < limit), 0) if small is None else small
    if not (0 < size < limit and size % 2):
        raise UsageError(
            f"A small kernel of size {size} does not fit in one of size {limit}: use an odd size below {limit}."
        )
    return BranchSum({"dense": ConvBN(geometry.conv()), "small": ConvBN(geometry.around(size))})


def unireplk(geometry: Geometry) -> BranchSum:
    """Build UniRepLKNet's dilated block: ``y = BN(W ∗ x) + Σ_j BN(Wj ∗ x)`` with small kernels of dilation r_j.

    Plain form: ``K = t·W + Σ_j pad(dilate(tj·Wj))``, where dilate inserts r − 1 zeros between taps. The dilation of the
    large kernel multiplies that of the small ones. Use it depthwise with large kernels; the small dilated kernels
    capture sparse patterns.

    Returns:
        A sum of ``dense`` and ``small_K_R`` for each size K and dilation R.

    Raises:
        UsageError: the kernel is not square with a size of 5, 7, …, 17.
        BorderError: the padding does not centre the kernel.

    Source: Ding et al., UniRepLKNet, CVPR 2024, §3.2 (the dilated reparam block).
    """
    geometry.require_centre()
    height, width = geometry.kernel_size
    if height != width or height not in _DILATED_BRANCHES:
        known = ", ".join(map(str, _DILATED_BRANCHES))
        raise UsageError(f"UniRepLK has branches for square kernels of {known}, not for {height}x{width}.")
    branches = BranchSum({"dense": ConvBN(geometry.conv())})
    for size, rate in _DILATED_BRANCHES[height]:
        # A dilated large kernel is a sparse one: its small kernels must hit the same taps.
        dilation = (rate * geometry.dilation[0], rate * geometry.dilation[1])
        branches[f"small_{size}_{rate}"] = ConvBN(geometry.around(size, dilation))
    return branches


class RepMixer(nn.Module):
    """``y = x + λ · (M(x) − BN(x))``: M is the sum of kxk-BN, 1x1-BN and BN, and λ has one number per channel.

    Plain form: ``K = I + λ·(K_M − diag(t))``. Use it depthwise to mix pixels in place of attention; its plain form has
    no shortcut left.

    Args:
        geometry: must keep the shape of its input: equal channels and stride 1.
        scale: initial value of λ, 1e-5 in the paper.

    Raises:
        UsageError: the geometry changes the shape, or the kernel is even.
        BorderError: the padding does not centre the kernel.

    Source: Vasu et al., FastViT, ICCV 2023, §3.2.1.
    """

    def __init__(self, geometry: Geometry, scale: float = 1e-5) -> None:
        super().__init__()
        if not geometry.keeps_shape:
            raise UsageError("A RepMixer adds its input to its output: use equal channels and stride 1.")
        self.mixer = branches_of(geometry)
        self.norm = nn.BatchNorm2d(geometry.in_channels)
        # (C, 1, 1) broadcasts over N, H and W. A small λ makes the block start as the identity.
        self.scale = nn.Parameter(torch.full((geometry.in_channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.scale * (self.mixer(x) - self.norm(x))
        return out
