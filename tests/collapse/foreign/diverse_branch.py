"""ResNet-18 of diverse branch blocks and of OREPA, rebuilt.

DBB: Ding et al., "Diverse Branch Block" (CVPR 2021). The authors' block pads with what the norm makes of zero by item
assignment, so that its 1x1 -> norm -> 3x3 branch is one convolution at the border too. OREPA: Hu et al., "Online
Convolutional Re-parameterization" (CVPR 2022). The kernel is composed from parameters in every forward, in eval mode
as well; only the norm behind it is a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.folding import ConvBN, conv_like, identity_kernel, kernel_bias, padded, scaled
from tests.collapse.foreign.harness import Network, deploy, image


class IdentityBasedConv1x1(nn.Conv2d):
    """1x1 convolution whose kernel is added to the identity."""

    def __init__(self, channels: int, groups: int = 1):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.normal_(self.weight, 0, 0.05)
        self.id_tensor = identity_kernel(channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight + self.id_tensor.to(self.weight.device).type_as(self.weight)
        return F.conv2d(x, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups)

    def get_actual_kernel(self) -> Tensor:
        return self.weight + self.id_tensor.to(self.weight.device).type_as(self.weight)


class BNAndPad(nn.Module):
    """Batch norm, then a border that holds what it makes of zero."""

    def __init__(self, pad_pixels: int, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.pad_pixels = pad_pixels

    def forward(self, x: Tensor) -> Tensor:
        output = self.bn(x)
        if self.pad_pixels > 0:
            if self.bn.affine:
                pad_values = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / torch.sqrt(
                    self.bn.running_var + self.bn.eps
                )
            else:
                pad_values = -self.bn.running_mean / torch.sqrt(self.bn.running_var + self.bn.eps)
            output = F.pad(output, [self.pad_pixels] * 4)
            pad_values = pad_values.view(1, -1, 1, 1)
            output[:, :, 0 : self.pad_pixels, :] = pad_values
            output[:, :, -self.pad_pixels :, :] = pad_values
            output[:, :, :, 0 : self.pad_pixels] = pad_values
            output[:, :, :, -self.pad_pixels :] = pad_values
        return output


class DiverseBranchBlock(nn.Module):
    """Four branches, added in place: k x k; 1x1; 1x1 -> average; 1x1 -> k x k."""

    def __init__(self, c1: int, c2: int, k: int, stride: int = 1, nonlinear: nn.Module | None = None):
        super().__init__()
        padding = k // 2
        self.nonlinear = nonlinear or nn.Identity()
        self.out_channels = c2
        self.dbb_origin = self._conv_bn(c1, c2, k, stride, padding)
        self.dbb_avg = nn.Sequential()
        self.dbb_avg.add_module("conv", nn.Conv2d(c1, c2, 1, bias=False))
        self.dbb_avg.add_module("bn", BNAndPad(padding, c2))
        self.dbb_avg.add_module("avg", nn.AvgPool2d(k, stride, 0))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(c2))
        self.dbb_1x1 = self._conv_bn(c1, c2, 1, stride, 0)
        self.dbb_1x1_kxk = nn.Sequential()
        if c1 == c2:
            self.dbb_1x1_kxk.add_module("idconv1", IdentityBasedConv1x1(c1))
        else:
            self.dbb_1x1_kxk.add_module("conv1", nn.Conv2d(c1, c1, 1, bias=False))
        self.dbb_1x1_kxk.add_module("bn1", BNAndPad(padding, c1))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(c1, c2, k, stride, 0, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(c2))

    @staticmethod
    def _conv_bn(c1: int, c2: int, k: int, stride: int, padding: int) -> nn.Sequential:
        branch = nn.Sequential()
        branch.add_module("conv", nn.Conv2d(c1, c2, k, stride, padding, bias=False))
        branch.add_module("bn", nn.BatchNorm2d(c2))
        return branch

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "dbb_reparam"):
            return self.nonlinear(self.dbb_reparam(inputs))
        out = self.dbb_origin(inputs)
        if hasattr(self, "dbb_1x1"):
            out += self.dbb_1x1(inputs)
        out += self.dbb_avg(inputs)
        out += self.dbb_1x1_kxk(inputs)
        return self.nonlinear(out)

    def switch_to_deploy(self) -> None:
        origin = self.dbb_origin.conv
        size = origin.kernel_size
        kernel, bias = kernel_bias(self.dbb_origin)
        k1, b1 = kernel_bias(self.dbb_1x1)

        avg = self.dbb_avg
        first, shift = scaled(avg.conv.weight, avg.bn.bn)
        pool = torch.zeros(self.out_channels, self.out_channels, *size)
        pool[range(self.out_channels), range(self.out_channels)] = 1 / (size[0] * size[1])
        k_avg, b_avg = scaled(pool, avg.avgbn)
        k_avg, b_avg = self._one_by_one_then(first, shift, k_avg, b_avg)

        seq = self.dbb_1x1_kxk
        first = seq.idconv1.get_actual_kernel() if hasattr(seq, "idconv1") else seq.conv1.weight
        first, shift = scaled(first, seq.bn1.bn)
        k_seq, b_seq = self._one_by_one_then(first, shift, *scaled(seq.conv2.weight, seq.bn2))

        self.dbb_reparam = conv_like(origin, kernel + padded(k1, size) + k_avg + k_seq, bias + b1 + b_avg + b_seq)
        del self.dbb_origin, self.dbb_avg, self.dbb_1x1, self.dbb_1x1_kxk

    @staticmethod
    def _one_by_one_then(first: Tensor, shift: Tensor, second: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(second, first.permute(1, 0, 2, 3)), bias + (second * shift.view(1, -1, 1, 1)).sum((1, 2, 3))


class OREPA(nn.Module):
    """A kernel that is the weighted sum of five branches, composed from parameters in every forward; then a norm."""

    def __init__(self, c1: int, c2: int, k: int, stride: int = 1, nonlinear: nn.Module | None = None):
        super().__init__()
        self.nonlinear = nonlinear or nn.Identity()
        self.kernel_size, self.in_channels, self.out_channels = k, c1, c2
        self.groups, self.stride, self.padding, self.dilation = 1, stride, k // 2, 1
        self.branch_counter = 0
        self.weight_orepa_origin = self._weight(c2, c1, k, k)
        self.branch_counter += 1
        self.weight_orepa_avg_conv = self._weight(c2, c1, 1, 1)
        self.weight_orepa_pfir_conv = self._weight(c2, c1, 1, 1)
        self.register_buffer("weight_orepa_avg_avg", torch.ones(k, k).mul(1.0 / k / k))
        self.branch_counter += 1
        self.register_buffer("weight_orepa_prior", torch.zeros(c2, k, k))
        self._fre_init()
        self.branch_counter += 1
        self.weight_orepa_1x1 = self._weight(c2, c1, 1, 1)
        self.branch_counter += 1
        self.internal_channels_1x1_3x3 = c1 if c1 <= c2 else 2 * c1
        if self.internal_channels_1x1_3x3 == c1:
            self.weight_orepa_1x1_kxk_idconv1 = nn.Parameter(torch.zeros(c1, c1, 1, 1).normal_(0, 0.05))
            self.register_buffer("id_tensor", identity_kernel(c1))
        else:
            self.weight_orepa_1x1_kxk_conv1 = self._weight(self.internal_channels_1x1_3x3, c1, 1, 1)
        self.weight_orepa_1x1_kxk_conv2 = self._weight(c2, self.internal_channels_1x1_3x3, k, k)
        self.branch_counter += 1
        self.weight_orepa_gconv_dw = self._weight(8 * c1, 1, k, k)
        self.weight_orepa_gconv_pw = self._weight(c2, 8 * c1, 1, 1)
        self.branch_counter += 1
        self.vector = nn.Parameter(torch.rand(self.branch_counter, c2) + 0.5)
        self.bn = nn.BatchNorm2d(c2)

    @staticmethod
    def _weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=1.0))

    def _fre_init(self) -> None:
        prior = torch.zeros_like(self.weight_orepa_prior)
        half = self.out_channels / 2
        position = (torch.arange(self.kernel_size) + 0.5) / self.kernel_size
        for i in range(self.out_channels):
            wave = torch.cos(torch.pi * position * ((i + 1) if i < half else (i + 1 - half)))
            prior[i] = wave[:, None] if i < half else wave[None, :]
        self.weight_orepa_prior.copy_(prior)

    def weight_gen(self) -> Tensor:
        weight_orepa_origin = torch.einsum("oihw,o->oihw", self.weight_orepa_origin, self.vector[0, :])
        weight_orepa_avg = torch.einsum(
            "oi,hw->oihw", self.weight_orepa_avg_conv.squeeze(3).squeeze(2), self.weight_orepa_avg_avg
        )
        weight_orepa_avg = torch.einsum("oihw,o->oihw", weight_orepa_avg, self.vector[1, :])
        weight_orepa_pfir = torch.einsum(
            "oi,ohw->oihw", self.weight_orepa_pfir_conv.squeeze(3).squeeze(2), self.weight_orepa_prior
        )
        weight_orepa_pfir = torch.einsum("oihw,o->oihw", weight_orepa_pfir, self.vector[2, :])
        if hasattr(self, "weight_orepa_1x1_kxk_idconv1"):
            weight_orepa_1x1_kxk_conv1 = (self.weight_orepa_1x1_kxk_idconv1 + self.id_tensor).squeeze(3).squeeze(2)
        else:
            weight_orepa_1x1_kxk_conv1 = self.weight_orepa_1x1_kxk_conv1.squeeze(3).squeeze(2)
        weight_orepa_1x1_kxk_conv2 = self.weight_orepa_1x1_kxk_conv2
        if self.groups > 1:
            raise NotImplementedError
        weight_orepa_1x1_kxk = torch.einsum("ti,othw->oihw", weight_orepa_1x1_kxk_conv1, weight_orepa_1x1_kxk_conv2)
        weight_orepa_1x1_kxk = torch.einsum("oihw,o->oihw", weight_orepa_1x1_kxk, self.vector[3, :])
        weight_orepa_1x1 = 0
        if hasattr(self, "weight_orepa_1x1"):
            left = self.kernel_size // 2
            weight_orepa_1x1 = torch.nn.functional.pad(self.weight_orepa_1x1, [left] * 4)
            weight_orepa_1x1 = torch.einsum("oihw,o->oihw", weight_orepa_1x1, self.vector[4, :])
        weight_orepa_gconv = self.dwsc2full(self.weight_orepa_gconv_dw, self.weight_orepa_gconv_pw, self.in_channels)
        weight_orepa_gconv = torch.einsum("oihw,o->oihw", weight_orepa_gconv, self.vector[5, :])
        return (
            weight_orepa_origin
            + weight_orepa_avg
            + weight_orepa_1x1
            + weight_orepa_1x1_kxk
            + weight_orepa_pfir
            + weight_orepa_gconv
        )

    @staticmethod
    def dwsc2full(weight_dw: Tensor, weight_pw: Tensor, groups: int) -> Tensor:
        t, ig, h, w = weight_dw.size()
        o, _, _, _ = weight_pw.size()
        tg = int(t / groups)
        i = int(ig * groups)
        weight_dw = weight_dw.view(groups, tg, ig, h, w)
        weight_pw = weight_pw.squeeze().view(o, groups, tg)
        return torch.einsum("gtihw,ogt->ogihw", weight_dw, weight_pw).reshape(o, i, h, w)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "orepa_reparam"):
            return self.nonlinear(self.orepa_reparam(inputs))
        weight = self.weight_gen()
        out = F.conv2d(
            inputs,
            weight,
            bias=None,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return self.nonlinear(self.bn(out))

    def switch_to_deploy(self) -> None:
        kernel, bias = scaled(self.weight_gen(), self.bn)
        geometry = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        nonlinear = self.nonlinear
        self.__dict__["_parameters"].clear()
        self.__dict__["_buffers"].clear()
        self.__dict__["_modules"].clear()
        self.nonlinear, self.orepa_reparam = nonlinear, conv_like(geometry, kernel, bias)


class OREPALargeConv(nn.Module):
    """A 7x7 kernel that every forward composes from three 3x3 ones, found by name; then a norm."""

    def __init__(self, c1: int, c2: int, k: int, stride: int = 1, nonlinear: nn.Module | None = None):
        super().__init__()
        self.nonlinear = nonlinear or nn.Identity()
        self.stride, self.padding, self.layers, self.groups = stride, k // 2, (k - 1) // 2, 1
        internal = c2
        for i in range(self.layers):
            outputs, inputs = c2 if i == self.layers - 1 else internal, c1 if i == 0 else internal
            self.register_parameter(f"weight{i}", OREPA._weight(outputs, inputs, 3, 3))
        self.bn = nn.BatchNorm2d(c2)

    def weight_gen(self) -> Tensor:
        weight = getattr(self, "weight" + str(0)).transpose(0, 1)
        for i in range(1, self.layers):
            weight2 = getattr(self, "weight" + str(i))
            weight = F.conv2d(weight, weight2, groups=self.groups, padding=2)
        return weight.transpose(0, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "or_reparam"):
            return self.nonlinear(self.or_reparam(inputs))
        weight = self.weight_gen()
        return self.nonlinear(self.bn(F.conv2d(inputs, weight, stride=self.stride, padding=self.padding)))

    def switch_to_deploy(self) -> None:
        kernel, bias = scaled(self.weight_gen(), self.bn)
        geometry = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], self.stride, self.padding)
        for i in range(self.layers):
            delattr(self, f"weight{i}")
        del self.bn
        self.or_reparam = conv_like(geometry, kernel, bias)


def orepa(c1: int, c2: int, k: int, stride: int = 1, nonlinear: nn.Module | None = None) -> nn.Module:
    kind = OREPA if k == 3 else OREPALargeConv
    return kind(c1, c2, k, stride, nonlinear)


Factory = Callable[..., nn.Module]


class BasicBlock(nn.Module):
    def __init__(self, factory: Factory, c1: int, c2: int, stride: int):
        super().__init__()
        self.shortcut = ConvBN(c1, c2, 1, stride) if stride != 1 or c1 != c2 else nn.Identity()
        self.conv1 = factory(c1, c2, 3, stride, nonlinear=nn.ReLU())
        self.conv2 = factory(c2, c2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.conv2(out)
        out = out + self.shortcut(x)
        return F.relu(out)


class ResNet18(nn.Module):
    def __init__(self, factory: Factory, width: int = 64, classes: int = 1000):
        super().__init__()
        self.conv1 = factory(3, width, 7, 2, nonlinear=nn.ReLU())
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            c1, c2 = widths[stage - 1], widths[stage]
            blocks = [BasicBlock(factory, c1, c2, 1 if stage == 1 else 2), BasicBlock(factory, c2, c2, 1)]
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(self.conv1(x))
        for i in range(4):
            out = getattr(self, f"stage{i + 1}")(out)
        out = self.gap(out)
        return self.linear(out.view(out.size(0), -1))


NETWORKS = [
    Network(
        "DBB ResNet-18",
        lambda: ResNet18(DiverseBranchBlock),
        lambda: (image(2, 3, 96, 80),),
        deploy,
        "the authors' switch_to_deploy",
        "rebuilt: DingXiaoH/DiverseBranchBlock",
    ),
    Network(
        "OREPA ResNet-18",
        lambda: ResNet18(orepa),
        lambda: (image(2, 3, 96, 80),),
        deploy,
        "the authors' switch_to_deploy",
        "rebuilt: JUGGHM/OREPA_CVPR2022",
    ),
]
SMALL = [
    replace(
        NETWORKS[0],
        name="DBB ResNet-18, 1/16 wide",
        make=lambda: ResNet18(DiverseBranchBlock, 4, 10),
        inputs=lambda: (image(2, 3, 33, 40),),
    ),
    replace(
        NETWORKS[1],
        name="OREPA ResNet-18, 1/16 wide",
        make=lambda: ResNet18(orepa, 4, 10),
        inputs=lambda: (image(2, 3, 33, 40),),
    ),
]
