"""Networks with large and dilated kernels, rebuilt: UniRepLKNet, SLaK, and residual blocks with a dilated branch.

UniRepLKNet: Ding et al. (CVPR 2024); dilated depthwise branches are found by their names, and a norm follows a linear
layer and a permutation. SLaK: Liu et al., "More ConvNets in the 2020s" (ICLR 2023); two stripes and a small square are
added in place. RSBB: a 3x3 branch, a dilated 3x3 branch, and the norm of the input, added in this order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from tests.collapse.foreign.folding import ConvBN, conv_like, dilated, fold_pair, kernel_bias, padded
from tests.collapse.foreign.harness import Network, deploy, image


class GRNwithNHWC(nn.Module):
    """Global response normalization of a channels-last tensor."""

    def __init__(self, dim: int, use_bias: bool = True):
        super().__init__()
        self.use_bias = use_bias
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, dim) * 0.5)
        if self.use_bias:
            self.beta = nn.Parameter(torch.randn(1, 1, 1, dim) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        if self.use_bias:
            return (self.gamma * nx + 1) * x + self.beta
        return (self.gamma * nx + 1) * x


class NCHWtoNHWC(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class NHWCtoNCHW(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class DilatedReparamBlock(nn.Module):
    """A large depthwise kernel and several dilated ones, each with a norm."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.lk_origin = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )
        if kernel_size == 13:
            self.kernel_sizes, self.dilates = [5, 7, 3, 3, 3], [1, 2, 3, 4, 5]
        elif kernel_size == 7:
            self.kernel_sizes, self.dilates = [5, 3, 3], [1, 2, 3]
        else:
            raise ValueError("Dilated Reparam Block requires kernel_size 7 or 13")
        self.origin_bn = nn.BatchNorm2d(channels)
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            padding = (r * (k - 1) + 1) // 2
            conv = nn.Conv2d(channels, channels, k, 1, padding, dilation=r, groups=channels, bias=False)
            self.__setattr__(f"dil_conv_k{k}_{r}", conv)
            self.__setattr__(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "origin_bn"):
            return self.lk_origin(x)
        out = self.origin_bn(self.lk_origin(x))
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            conv = self.__getattr__(f"dil_conv_k{k}_{r}")
            bn = self.__getattr__(f"dil_bn_k{k}_{r}")
            out = out + bn(conv(x))
        return out

    def merge_dilated_branches(self) -> None:
        merged = fuse_conv_bn_eval(self.lk_origin, self.origin_bn)
        kernel, bias = merged.weight.clone(), merged.bias.clone()
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            conv, bn = getattr(self, f"dil_conv_k{k}_{r}"), getattr(self, f"dil_bn_k{k}_{r}")
            branch = fuse_conv_bn_eval(conv, bn)
            kernel, bias = kernel + padded(dilated(branch.weight, r), kernel.shape[2:]), bias + branch.bias
            delattr(self, f"dil_conv_k{k}_{r}")
            delattr(self, f"dil_bn_k{k}_{r}")
        self.lk_origin = conv_like(self.lk_origin, kernel, bias)
        del self.origin_bn


class SEBlock(nn.Module):
    def __init__(self, channels: int, internal: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, internal, 1), nn.Conv2d(internal, channels, 1)
        self.input_channels = channels
        self.nonlinear = nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(inputs, output_size=(1, 1))
        x = self.nonlinear(self.down(x))
        x = torch.sigmoid(self.up(x))
        return inputs * x.view(-1, self.input_channels, 1, 1)


class UniRepLKNetBlock(nn.Module):
    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.need_contiguous = kernel_size >= 7
        if kernel_size == 0:
            self.dwconv, self.norm = nn.Identity(), nn.Identity()
        elif kernel_size >= 7:
            self.dwconv, self.norm = DilatedReparamBlock(dim, kernel_size), nn.BatchNorm2d(dim)
        else:
            self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
            self.norm = nn.BatchNorm2d(dim)
        self.se = SEBlock(dim, dim // 4)
        self.pwconv1 = nn.Sequential(NCHWtoNHWC(), nn.Linear(dim, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), GRNwithNHWC(4 * dim))
        self.pwconv2 = nn.Sequential(nn.Linear(4 * dim, dim, bias=False), NHWCtoNCHW(), nn.BatchNorm2d(dim))
        self.gamma = nn.Parameter(torch.rand(dim) + 0.5)
        self.drop_path = nn.Identity()

    def compute_residual(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma.view(1, -1, 1, 1) * y
        return self.drop_path(y)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.compute_residual(inputs)

    def switch_to_deploy(self) -> None:
        if hasattr(self.dwconv, "merge_dilated_branches"):
            self.dwconv.merge_dilated_branches()
            fold_pair_of(self.dwconv, "lk_origin", self, "norm")
        elif isinstance(self.norm, nn.BatchNorm2d):
            fold_pair(self, "dwconv", "norm")
        linear = fuse_linear_bn_eval(self.pwconv2[0], self.pwconv2[2])
        linear.weight.data *= self.gamma[:, None]
        linear.bias.data *= self.gamma
        self.pwconv2 = nn.Sequential(linear, NHWCtoNCHW())
        self.gamma = None


def fold_pair_of(host: nn.Module, conv: str, norm_host: nn.Module, norm: str) -> None:
    """Fold a batch norm into a convolution of another module."""
    setattr(host, conv, fuse_conv_bn_eval(getattr(host, conv), getattr(norm_host, norm)))
    setattr(norm_host, norm, nn.Identity())


class LayerNorm(nn.Module):
    """Layer norm over channels, in either layout."""

    def __init__(self, channels: int, data_format: str = "channels_last"):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps, self.data_format, self.normalized_shape = 1e-6, data_format, (channels,)

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class UniRepLKNet(nn.Module):
    """Four stages of blocks; the kernel of each block is 3 or 13, as in the small published variants."""

    def __init__(self, width: int = 40, depths: tuple[int, ...] = (2, 2, 6, 2), large: int = 13, classes: int = 100):
        super().__init__()
        dims = [width * 2**i for i in range(4)]
        stem = [nn.Conv2d(3, width // 2, 3, 2, 1), LayerNorm(width // 2, "channels_first"), nn.GELU()]
        stem += [nn.Conv2d(width // 2, width, 3, 2, 1), LayerNorm(width, "channels_first")]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for i in range(3):
            conv, norm = nn.Conv2d(dims[i], dims[i + 1], 3, 2, 1), LayerNorm(dims[i + 1], "channels_first")
            self.downsample_layers.append(nn.Sequential(conv, norm))
        self.stages = nn.ModuleList()
        for i in range(4):
            kernels = [3 if i == 0 or j % 2 else large for j in range(depths[i])]
            self.stages.append(nn.Sequential(*(UniRepLKNetBlock(dims[i], k) for k in kernels)))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], classes)
        self.output_mode = "logits"

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.output_mode == "logits":
            for stage_idx in range(4):
                x = self.downsample_layers[stage_idx](x)
                x = self.stages[stage_idx](x)
            x = self.norm(x.mean([-2, -1]))
            return self.head(x)
        outs = []
        for stage_idx in range(4):
            x = self.stages[stage_idx](self.downsample_layers[stage_idx](x))
            outs.append(x)
        return outs


def conv_bn(channels: int, kernel: tuple[int, int]) -> nn.Sequential:
    branch = nn.Sequential()
    padding = (kernel[0] // 2, kernel[1] // 2)
    branch.add_module("conv", nn.Conv2d(channels, channels, kernel, 1, padding, groups=channels, bias=False))
    branch.add_module("bn", nn.BatchNorm2d(channels))
    return branch


class ReparamLargeKernelConv(nn.Module):
    """A large depthwise kernel as two stripes (k x 5 and 5 x k), and a small square."""

    def __init__(self, channels: int, kernel_size: int, small_kernel: int = 5, Decom: bool = True):
        super().__init__()
        self.kernel_size, self.small_kernel, self.Decom = kernel_size, small_kernel, Decom
        if Decom:
            self.LoRA1 = conv_bn(channels, (kernel_size, small_kernel))
            self.LoRA2 = conv_bn(channels, (small_kernel, kernel_size))
        else:
            self.lkb_origin = conv_bn(channels, (kernel_size, kernel_size))
        if small_kernel is not None and small_kernel < kernel_size:
            self.small_conv = conv_bn(channels, (small_kernel, small_kernel))

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "lkb_reparam"):
            return self.lkb_reparam(inputs)
        if self.Decom:  # noqa: SIM108
            out = self.LoRA1(inputs) + self.LoRA2(inputs)
        else:
            out = self.lkb_origin(inputs)
        if hasattr(self, "small_conv"):
            out += self.small_conv(inputs)
        return out

    def switch_to_deploy(self) -> None:
        kernel, bias = kernel_bias(self.LoRA1)
        small, shift = kernel_bias(self.small_conv)
        self.LoRA1 = conv_like(self.LoRA1.conv, kernel + padded(small, kernel.shape[2:]), bias + shift)
        self.LoRA2 = conv_like(self.LoRA2.conv, *kernel_bias(self.LoRA2))
        del self.small_conv


class SLaKBlock(nn.Module):
    """ConvNeXt's block with the decomposed kernel."""

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.large_kernel = ReparamLargeKernelConv(dim, kernel_size)
        self.norm = LayerNorm(dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.large_kernel(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        x = self.pwconv1(x)
        x = self.act(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return residual + x


class SLaK(nn.Module):
    def __init__(
        self,
        dims: tuple[int, ...] = (48, 96, 192, 384),
        depths: tuple[int, ...] = (2, 2, 4, 2),
        kernels: tuple[int, ...] = (51, 49, 47, 13),
        classes: int = 100,
    ):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), LayerNorm(dims[0], "channels_first"))
        self.downsample_layers = nn.ModuleList([stem])
        for i in range(len(dims) - 1):
            norm = LayerNorm(dims[i], "channels_first")
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(dims[i], dims[i + 1], 2, 2)))
        stages = [
            nn.Sequential(*(SLaKBlock(d, k) for _ in range(n))) for d, k, n in zip(dims, kernels, depths, strict=True)
        ]
        self.stages = nn.ModuleList(stages)
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], classes)

    def forward_features(self, x: Tensor) -> Tensor:
        for i in range(len(self.stages)):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        return self.norm(x.mean([-2, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


class RSBB(nn.Module):
    """3x3 and dilated 3x3 branch, and the norm of the input."""

    def __init__(self, channels: int, dilation: int = 2):
        super().__init__()
        self.conv_bn = ConvBN(channels, channels, 3)
        self.dilated_bn = ConvBN(channels, channels, 3, dilation=dilation)
        self.identity_bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "merged"):
            return self.relu(self.merged(x) + self.dilated_bn(x))
        return self.relu(self.conv_bn(x) + self.dilated_bn(x) + self.identity_bn(x))

    def switch_to_deploy(self) -> None:
        # The sum of both kernels would be 5x5, with more weights than the two have.
        kernel, bias = kernel_bias(self.conv_bn)
        identity, shift = kernel_bias(self.identity_bn)
        self.merged = conv_like(self.conv_bn.conv, kernel + padded(identity, (3, 3)), bias + shift)
        del self.conv_bn, self.identity_bn


class RSBBNet(nn.Module):
    def __init__(self, width: int = 32, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 100):
        super().__init__()
        channels = 3
        self.stages = nn.ModuleList()
        for i, depth in enumerate(blocks):
            down = ConvBN(channels, width * 2**i, 3, 2, act=nn.ReLU())
            channels = width * 2**i
            self.stages.append(nn.Sequential(down, *(RSBB(channels) for _ in range(depth))))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


NETWORKS = [
    Network(
        "UniRepLKNet",
        UniRepLKNet,
        lambda: (image(2, 3, 96, 80),),
        deploy,
        "the authors' reparameterize_unireplknet",
        "rebuilt: AILab-CVC/UniRepLKNet",
    ),
    Network(
        "SLaK",
        SLaK,
        lambda: (image(2, 3, 96, 96),),
        deploy,
        "small square merged into a stripe, norms folded",
        "rebuilt: VITA-Group/SLaK",
    ),
    Network(
        "RSBB", RSBBNet, lambda: (image(2, 3, 64, 80),), deploy, "identity merged into the 3x3, norms folded", "rebuilt"
    ),
]
SMALL = [
    replace(
        NETWORKS[0],
        name="UniRepLKNet, small",
        make=lambda: UniRepLKNet(8, (1, 1, 2, 1), 7, 10),
        inputs=lambda: (image(2, 3, 64, 64),),
    ),
    replace(
        NETWORKS[1],
        name="SLaK, small",
        make=lambda: SLaK((8, 12), (1, 1), (13, 9), 10),
        inputs=lambda: (image(2, 3, 48, 40),),
    ),
    replace(
        NETWORKS[2], name="RSBB, small", make=lambda: RSBBNet(6, (1, 1), 10), inputs=lambda: (image(2, 3, 24, 32),)
    ),
]
