"""The asymmetric convolution block, ACB (Ding et al., ACNet, ICCV 2019)."""

from __future__ import annotations

from repvgg.blocks.basic import ConvBN
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.geometry import Geometry


def asymmetric(geometry: Geometry) -> BranchSum:
    """ACB: ``y = BN(W ∗ x) + BN(Wv ∗ x) + BN(Wh ∗ x)`` with kernels kxk, kx1 and 1xk.

    Plain form: ``K = t·W``, plus ``tv·Wv`` on the middle column and ``th·Wh`` on the middle row. When to use it: in the
    place of any convolution larger than 1x1, to strengthen the skeleton of its kernel. The paper's Table 7 has it at
    73.58 where RepVGG has 75.14: it adds no shortcut.

    Returns:
        A sum of ``dense``, ``vertical`` and ``horizontal``.

    Raises:
        UsageError: the kernel size is even.
        BorderError: the padding is another one than the centre needs.
    """
    geometry.require_centre()
    height, width = geometry.kernel_size
    branches = {
        "dense": geometry.conv(),
        "vertical": geometry.around((height, 1)),
        "horizontal": geometry.around((1, width)),
    }
    return BranchSum({name: ConvBN(conv) for name, conv in branches.items()})
