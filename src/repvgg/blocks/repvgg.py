"""The RepVGG block (Ding et al., CVPR 2021, §3.2, Fig. 4)."""

from __future__ import annotations

from torch import Tensor, nn

from repvgg.blocks.basic import BranchSum, ConvBN, PointwiseConv2d


def rep_conv(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> BranchSum:
    """The three branches of RepVGG, equal in eval mode to one 3x3 convolution with a bias.

    ``y = BN3(W3 * x) + BN1(W1 * x) + BN0(x)``; the identity branch exists iff the shapes match. With t = γ/σ of each
    batch norm, the plain kernel is ``t3·W3 + pad(t1·W1) + pad(diag(t0))`` and the bias ``Σ_k β_k − μ_k·t_k``
    (Eq. 3, 4). Nothing computes that formula here: a collapse derives it from the ``forward`` of this module.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        stride: of both convolutions.
        groups: of both convolutions.
    """
    branches = BranchSum(
        {
            "dense": ConvBN(nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)),
            "pointwise": ConvBN(PointwiseConv2d(in_channels, out_channels, stride, groups, bias=False)),
        }
    )
    if in_channels == out_channels and stride == 1:
        branches["identity"] = nn.BatchNorm2d(in_channels)
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
        out: Tensor = self.act(self.conv(x))
        return out
