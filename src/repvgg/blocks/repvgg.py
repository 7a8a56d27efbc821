"""The RepVGG block (Ding et al., CVPR 2021, §3.2, Fig. 4)."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor, nn

from repvgg.blocks.basic import ConvBN, PointwiseConv2d, Size
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.fused import trained
from repvgg.errors import UsageError

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]


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
    kernel, steps = _pair(kernel_size), _pair(dilation)
    if not all(size % 2 for size in kernel):
        raise UsageError(f"A kernel of {kernel[0]}x{kernel[1]} has no centre for the other branches: take an odd size.")
    branches = BranchSum()
    if kernel == (1, 1):
        dense: nn.Conv2d = PointwiseConv2d(in_channels, out_channels, stride, groups, bias=False)
    else:
        padding = (steps[0] * (kernel[0] // 2), steps[1] * (kernel[1] // 2))
        dense = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, steps, groups, False, padding_mode)
    branches["dense"] = ConvBN(dense)
    branches["pointwise"] = ConvBN(PointwiseConv2d(in_channels, out_channels, stride, groups, bias=False))
    if in_channels == out_channels and _pair(stride) == (1, 1):
        branches["identity"] = nn.BatchNorm2d(in_channels)
    return branches


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


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
