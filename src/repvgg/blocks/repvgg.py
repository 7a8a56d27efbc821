"""The RepVGG block (Ding et al., CVPR 2021, §3.2, Fig. 4), and all that differs from it by switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from repvgg.blocks.basic import ConvBN, Size
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.fused import trained
from repvgg.blocks.geometry import Geometry, PaddingMode
from repvgg.blocks.mean import MeanFilter

Branch: TypeAlias = Literal["dense", "pointwise", "identity"]
_EVERY: frozenset[Branch] = frozenset({"dense", "pointwise", "identity"})


@dataclass(frozen=True)
class Switches:
    """Which branches a block of RepVGG's kind has, and where its batch norms stand.

    Attributes:
        dense: how many copies of the kxk convolution.
        pointwise: whether there is a 1x1 convolution.
        identity: whether the input is added where the shapes match.
        mean: whether the mean over the k² pixels is added where the shapes match.
        norms: the branches with a batch norm of their own.
        norm_after: whether a batch norm follows the sum.
        relu: whether a ReLU ends each branch, in front of the sum. No convolution equals such a block.
    """

    dense: int = 1
    pointwise: bool = True
    identity: bool = True
    mean: bool = False
    norms: frozenset[Branch] = _EVERY
    norm_after: bool = False
    relu: bool = False


REPVGG = Switches()


def branches_of(geometry: Geometry, switches: Switches = REPVGG) -> nn.Module:
    """The branches that are switched on, summed; equal in eval mode to one convolution, unless there are ReLUs.

    ``y = BN(Σ_j BNj(Wj ∗ x) + BN1(W1 ∗ x) + BN0(x) + mean(x))``, each batch norm where ``switches`` have it. With
    t = γ/σ of each, and 1 where there is none, the plain kernel is
    ``t · (Σ_j tj·Wj + pad(t1·W1) + pad(diag(t0)) + diag(1/k²))``.

    Returns:
        A :class:`BranchSum` with ``dense``, ``dense1``, …, ``pointwise``, ``identity`` and ``mean``; where a batch norm
        follows, an ``nn.Sequential`` of it and ``bn``.

    Raises:
        UsageError: the kernel size is even.
        BorderError: the padding is another one than the centre needs.
    """
    geometry.require_centre()
    found: dict[str, nn.Module] = {}
    for copy in range(switches.dense):
        found[f"dense{copy or ''}"] = _normed(geometry.conv(), "dense", switches)
    if switches.pointwise:
        found["pointwise"] = _normed(geometry.around(1), "pointwise", switches)
    if switches.identity and geometry.keeps_shape:
        normed = "identity" in switches.norms
        found["identity"] = nn.BatchNorm2d(geometry.in_channels) if normed else nn.Identity()
    if switches.mean and geometry.keeps_shape:
        found["mean"] = MeanFilter(geometry)
    if switches.relu:
        found = {name: nn.Sequential(branch, nn.ReLU()) for name, branch in found.items()}
    return summed(BranchSum(found), geometry) if switches.norm_after else BranchSum(found)


def summed(branches: BranchSum, geometry: Geometry) -> nn.Sequential:
    """A sum of branches and the batch norm behind it, as ``sum`` and ``bn``."""
    out = nn.Sequential()
    out.add_module("sum", branches)
    out.add_module("bn", nn.BatchNorm2d(geometry.out_channels))
    return out


def _normed(conv: nn.Conv2d, branch: Branch, switches: Switches) -> nn.Module:
    return ConvBN(conv) if branch in switches.norms else conv


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
    """The three branches of RepVGG, equal in eval mode to one kxk convolution with a bias.

    ``y = BNk(Wk * x) + BN1(W1 * x) + BN0(x)``; the identity branch exists iff the shapes match. With t = γ/σ of each
    batch norm, the plain kernel is ``tk·Wk + pad(t1·W1) + pad(diag(t0))`` and the bias ``Σ_n β_n − μ_n·t_n``
    (Eq. 3, 4, where k is 3). Nothing computes that formula here: a collapse derives it from the ``forward`` of this
    module. The padding is ``dilation · (k − 1) / 2``, with which all branches read around the same pixels.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        stride: of both convolutions.
        groups: of both convolutions.
        kernel_size: k, odd.
        dilation: of the kxk convolution.
        padding_mode: of the kxk convolution, the only one that pads.

    Raises:
        UsageError: the kernel size is even: no padding puts its centre on a pixel.
    """
    geometry = Geometry.square(
        in_channels,
        out_channels,
        stride,
        groups,
        kernel_size=kernel_size,
        dilation=dilation,
        padding_mode=padding_mode,
    )
    branches = branches_of(geometry)
    assert isinstance(branches, BranchSum)  # nothing follows the sum
    return branches


class RepVGGBlock(nn.Module):
    """``y = act(conv(x))``, in the train form and in the plain form alike.

    In the train form ``conv`` is :func:`rep_conv`, three branches; a collapse replaces it by one ``nn.Conv2d`` and
    leaves the rest. ``act`` is a ReLU, or a chain of squeeze-excite and ReLU.
    """

    def __init__(self, conv: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return ``act(conv(x))``."""
        fast = trained(self.conv, x, self.act)
        out: Tensor = self.act(self.conv(x)) if fast is None else fast
        return out
