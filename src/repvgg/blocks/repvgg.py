"""The RepVGG block (Ding et al., CVPR 2021, §3.2, Fig. 4) and the blocks that differ from it in their branches only."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal, TypeAlias

from torch import Tensor, nn

from repvgg.blocks._cpu.dispatch import fused_forward
from repvgg.blocks.basic import ConvBN, MeanFilter
from repvgg.blocks.geometry import Geometry, PaddingMode, Size

Branch: TypeAlias = Literal["dense", "pointwise", "identity"]
# Without the mean branch, which has no parameters and is never followed by a batch norm.
_ALL_BRANCHES: frozenset[Branch] = frozenset({"dense", "pointwise", "identity"})


class BranchSum(nn.ModuleDict):
    """The sum of named branches on one input: ``y = Σ_k branch_k(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        fused = fused_forward(self, x)  # None in eval mode, under tracers, and off the CPU
        out: Tensor = reduce(add, (branch(x) for branch in self.values())) if fused is None else fused
        return out


@dataclass(frozen=True)
class BranchConfig:
    """The branches of a RepVGG-like block and the positions of its batch norms."""

    dense: int = 1  # number of kxk convolutions
    pointwise: bool = True  # whether to add a 1x1 convolution
    identity: bool = True  # whether to add the input, where the shapes match
    mean: bool = False  # whether to add the mean over the k² pixels under the kernel, where the shapes match
    norms: frozenset[Branch] = _ALL_BRANCHES  # the branches that end in a batch norm
    norm_after: bool = False  # whether a batch norm follows the sum
    relu: bool = False  # whether each branch ends in a ReLU; such a block is not equal to any convolution


REPVGG = BranchConfig()


def branches_of(geometry: Geometry, config: BranchConfig = REPVGG) -> nn.Module:
    """Build the sum of the branches in ``config``; in eval mode it equals one convolution, unless there are ReLUs.

    ``y = BN(Σ_j BNj(Wj ∗ x) + BN1(W1 ∗ x) + BN0(x) + mean(x))``, with each batch norm where ``config`` has one. With
    t = γ/σ of each batch norm, or 1 where there is none, the plain kernel is
    ``t · (Σ_j tj·Wj + pad(t1·W1) + pad(diag(t0)) + diag(1/k²))``.

    Returns:
        A :class:`BranchSum` with ``dense``, ``dense1``, …, ``pointwise``, ``identity`` and ``mean``. If a batch norm
        follows the sum, an ``nn.Sequential`` of ``sum`` and ``bn``.

    Raises:
        UsageError, BorderError: see :meth:`Geometry.require_centre`.
    """
    geometry.require_centre()

    def with_norm(conv: nn.Conv2d, branch: Branch) -> nn.Module:
        return ConvBN(conv) if branch in config.norms else conv

    # The names are part of checkpoints: "dense" without a number is the name that RepVGG's own files have.
    branches: dict[str, nn.Module] = {}
    for copy in range(config.dense):
        branches[f"dense{copy or ''}"] = with_norm(geometry.conv(), "dense")
    if config.pointwise:
        branches["pointwise"] = with_norm(geometry.around(1), "pointwise")
    if config.identity and geometry.keeps_shape:
        has_norm = "identity" in config.norms
        branches["identity"] = nn.BatchNorm2d(geometry.in_channels) if has_norm else nn.Identity()
    if config.mean and geometry.keeps_shape:
        branches["mean"] = MeanFilter(geometry)
    if config.relu:
        # "+ReLU in branches" of Table 7, a control experiment.
        branches = {name: nn.Sequential(branch, nn.ReLU()) for name, branch in branches.items()}
    return sum_then_norm(BranchSum(branches), geometry) if config.norm_after else BranchSum(branches)


def sum_then_norm(branches: BranchSum, geometry: Geometry) -> nn.Sequential:
    """Append a batch norm to a sum of branches; the two are named ``sum`` and ``bn``."""
    return nn.Sequential(OrderedDict(sum=branches, bn=nn.BatchNorm2d(geometry.out_channels)))


def rep_conv(
    in_channels: int,
    out_channels: int,
    stride: Size = 1,
    groups: int = 1,
    *,
    kernel_size: Size = 3,
    dilation: Size = 1,
    padding_mode: PaddingMode = "zeros",
) -> BranchSum:
    """Build the three branches of RepVGG, equal in eval mode to one kxk convolution with a bias.

    ``y = BNk(Wk * x) + BN1(W1 * x) + BN0(x)``; the identity branch exists iff the shapes match. With t = γ/σ of each
    batch norm, the plain kernel is ``tk·Wk + pad(t1·W1) + pad(diag(t0))`` and the bias ``Σ_n β_n − μ_n·t_n``
    (Eq. 3 and 4, where k is 3). No code here computes that formula: a collapse derives it from this module's
    ``forward``. The padding is ``dilation · (k − 1) / 2``, which centres all branches on the same pixels.

    ``stride`` and ``groups`` apply to both convolutions, ``dilation`` and ``padding_mode`` to the kxk one, which is the
    only one that pads.

    Raises:
        UsageError: the kernel size is even.
    """
    geometry = Geometry.square(
        in_channels, out_channels, stride, groups, kernel_size=kernel_size, dilation=dilation, padding_mode=padding_mode
    )
    branches = branches_of(geometry)
    assert isinstance(branches, BranchSum)  # the default config has no batch norm after the sum
    return branches


class RepVGGBlock(nn.Module):
    """``y = act(conv(x))``, for the train form and for the plain form.

    In the train form ``conv`` is the three branches of :func:`rep_conv`; a collapse replaces it with one ``nn.Conv2d``
    and leaves the rest. ``act`` is a ReLU, or a sequence of squeeze-and-excitation and ReLU.
    """

    def __init__(self, conv: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        # The activation is fused too: one write of the output instead of two passes over it.
        fused = fused_forward(self.conv, x, self.act)
        out: Tensor = self.act(self.conv(x)) if fused is None else fused
        return out
