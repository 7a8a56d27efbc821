"""Large kernels with small ones beside them: RepLKNet and UniRepLKNet."""

from __future__ import annotations

from repvgg.blocks.basic import ConvBN
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.geometry import Geometry
from repvgg.errors import UsageError

#: Kernel sizes and dilations of the branches beside a large kernel (UniRepLKNet).
_DILATED: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def large_kernel(geometry: Geometry, small: int | None = None) -> BranchSum:
    """RepLK: ``y = BN(W ∗ x) + BN(Ws ∗ x)`` with a large kernel and a small one around the same pixels.

    Plain form: ``K = t·W + pad(ts·Ws)``. When to use it: depthwise, with kernels from 7 to 31; the small kernel makes
    the large one trainable.

    Args:
        geometry: of the large convolution.
        small: size of the small kernel; unless given, 5 where that is smaller, and else 3 or 1.

    Returns:
        A sum of ``dense`` and ``small``.

    Raises:
        UsageError: the kernel is even, or no smaller kernel fits in it.
        BorderError: the padding is another one than the centre needs.

    Source: Ding et al., RepLKNet, CVPR 2022, §3 (guideline 3).
    """
    geometry.require_centre()
    least = min(geometry.kernel_size)
    size = next((size for size in (5, 3, 1) if size < least), 0) if small is None else small
    if not (0 < size < least and size % 2):
        raise UsageError(f"A small kernel of {size} is not inside one of {least}: take an odd size between 0 and that.")
    return BranchSum({"dense": ConvBN(geometry.conv()), "small": ConvBN(geometry.around(size))})


def dilated_kernels(geometry: Geometry) -> BranchSum:
    """UniRepLK: ``y = BN(W ∗ x) + Σ_j BN(Wj ∗ x)`` with small kernels whose taps lie r_j pixels apart.

    Plain form: ``K = t·W + Σ_j pad(spread(tj·Wj))``, where spread puts r − 1 zeros between taps. A dilation of the
    large kernel multiplies that of the small ones. When to use it: depthwise, with large kernels; small dilated ones
    see sparse patterns.

    Returns:
        A sum of ``dense`` and ``small_K_R`` for each size K and dilation R.

    Raises:
        UsageError: the kernel is not one of the squares 5, 7, …, 17.
        BorderError: the padding is another one than the centre needs.

    Source: Ding et al., UniRepLKNet, CVPR 2024, §3.2 (the dilated reparam block).
    """
    geometry.require_centre()
    height, width = geometry.kernel_size
    if height != width or height not in _DILATED:
        raise UsageError(f"Dilated kernels go with squares of {', '.join(map(str, _DILATED))}, not {height}x{width}.")
    branches = BranchSum({"dense": ConvBN(geometry.conv())})
    for size, rate in _DILATED[height]:
        steps = (rate * geometry.dilation[0], rate * geometry.dilation[1])
        branches[f"small_{size}_{rate}"] = ConvBN(geometry.around(size, steps))
    return branches
