"""The formulas of the conversions that other repositories ship, on convolutions and batch norms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from tests.collapse.foreign.harness import is_norm


class ConvBN(nn.Module):
    """Convolution, batch norm, and an activation if one is given; most repositories have a class like this."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        groups: int = 1,
        act: nn.Module | None = None,
        dilation: int = 1,
    ):
        super().__init__()
        sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(dilation * (k // 2) for k in sizes)
        self.conv = nn.Conv2d(inputs, channels, sizes, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def switch_to_deploy(self) -> None:
        fold_pair(self, "conv", "bn")


def fold_pair(host: nn.Module, first: str, norm: str) -> None:
    """Fold a batch norm into the convolution or linear layer before it; an identity takes its place."""
    layer, bn = getattr(host, first), getattr(host, norm)
    if isinstance(bn, nn.Identity):
        return
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    eps = getattr(bn, "eps", 1e-5)  # transformers' frozen norm has it in its forward only
    fused = fuse(layer.weight, layer.bias, bn.running_mean, bn.running_var, eps, bn.weight, bn.bias)
    layer.weight, layer.bias = fused
    setattr(host, norm, nn.Identity())


def fold_in_order(model: nn.Module) -> nn.Module:
    """Fold every batch norm that directly follows a convolution or linear layer among the children of one module.

    Repositories without a conversion of their own leave this to a general tool; this is what such tools find where the
    order of the children is the order of the calls.
    """
    for host in list(model.modules()):
        names = list(host._modules)
        for first, second in pairwise(names):
            layer, norm = host._modules[first], host._modules[second]
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and norm is not None and is_norm(norm):
                fold_pair(host, first, second)
    return model


def kernel_bias(layer: nn.Module, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return the kernel and bias of a convolution with its batch norm, or of a batch norm on its own (1x1 kernel)."""
    if isinstance(layer, nn.BatchNorm2d):
        return scaled(identity_kernel(layer.num_features, groups), layer)
    conv, bn = (layer.conv, layer.bn) if hasattr(layer, "conv") else (layer[0], layer[1])
    return scaled(conv.weight, bn, conv.bias)


def scaled(kernel: Tensor, bn: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a kernel and bias with a batch norm applied to the result."""
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    offset = bn.bias - bn.running_mean * factor
    return kernel * factor.view(-1, 1, 1, 1), offset if bias is None else offset + bias * factor


def identity_kernel(channels: int, groups: int = 1) -> Tensor:
    """Return the 1x1 kernel of the identity."""
    per_group = channels // groups
    kernel = torch.zeros(channels, per_group, 1, 1)
    kernel[torch.arange(channels), torch.arange(channels) % per_group] = 1
    return kernel


def dilated(kernel: Tensor, dilation: int) -> Tensor:
    """Return a kernel with zeros between its taps."""
    size = [dilation * (k - 1) + 1 for k in kernel.shape[2:]]
    spread = kernel.new_zeros(*kernel.shape[:2], *size)
    spread[:, :, ::dilation, ::dilation] = kernel
    return spread


def padded(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Center a kernel in a larger one."""
    rows, columns = (size[0] - kernel.shape[2]) // 2, (size[1] - kernel.shape[3]) // 2
    return F.pad(kernel, (columns, columns, rows, rows))


def conv_like(conv: nn.Conv2d, kernel: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution with the geometry of another, and a kernel and bias."""
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel.shape[2:], conv.stride, conv.padding, conv.dilation, conv.groups
    )
    new.weight.data, new.bias.data = kernel.detach(), bias.detach()
    return new.eval()
