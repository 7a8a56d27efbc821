"""Super-resolution networks without norms, rebuilt: ECBSR and SPAN.

ECBSR: Zhang et al., "Edge-oriented Convolution Block for Real-time Super Resolution on Mobile Devices" (ACM MM 2021);
its eval mode composes the kernel in Python, with loops, item assignment and switches. SPAN: Wan et al., "Swift
Parameter-free Attention Network" (NTIRE 2024); its eval mode writes the composed kernel into a convolution.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.harness import Network, deploy, image

_SOBEL = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
_LAPLACIAN = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]


class SeqConv3x3(nn.Module):
    """1x1 convolution, then 3x3: learned, or a fixed depthwise edge filter with a learned scale."""

    def __init__(self, kind: str, c1: int, c2: int, depth_multiplier: float = 1.0):
        super().__init__()
        self.type, self.inp_planes, self.out_planes = kind, c1, c2
        self.mid_planes = int(c2 * depth_multiplier) if kind == "conv1x1-conv3x3" else c2
        conv0 = nn.Conv2d(c1, self.mid_planes, 1)
        self.k0, self.b0 = conv0.weight, conv0.bias
        if kind == "conv1x1-conv3x3":
            conv1 = nn.Conv2d(self.mid_planes, c2, 3)
            self.k1, self.b1 = conv1.weight, conv1.bias
            return
        mask = torch.tensor(_LAPLACIAN if kind == "conv1x1-laplacian" else _SOBEL)
        mask = mask.T if kind == "conv1x1-sobely" else mask
        self.scale = nn.Parameter(torch.randn(c2, 1, 1, 1) * 0.1)
        self.bias = nn.Parameter(torch.randn(c2) * 0.1)
        self.mask = nn.Parameter(mask.expand(c2, 1, 3, 3).clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y0 = F.conv2d(x, self.k0, self.b0)
        y0 = F.pad(y0, (1, 1, 1, 1), "constant", 0)
        border = self.b0.view(1, -1, 1, 1)
        y0[:, :, 0:1, :] = border
        y0[:, :, -1:, :] = border
        y0[:, :, :, 0:1] = border
        y0[:, :, :, -1:] = border
        if self.type == "conv1x1-conv3x3":
            return F.conv2d(y0, self.k1, self.b1)
        return F.conv2d(y0, self.scale * self.mask, self.bias, groups=self.out_planes)

    def rep_params(self) -> tuple[Tensor, Tensor]:
        device = self.k0.get_device()
        if device < 0:
            device = None
        if self.type == "conv1x1-conv3x3":
            kernel = F.conv2d(self.k1, self.k0.permute(1, 0, 2, 3))
            bias = torch.ones(1, self.mid_planes, 3, 3, device=device) * self.b0.view(1, -1, 1, 1)
            return kernel, F.conv2d(bias, self.k1).view(-1) + self.b1
        tmp = self.scale * self.mask
        k1 = torch.zeros((self.out_planes, self.out_planes, 3, 3), device=device)
        for i in range(self.out_planes):
            k1[i, i, :, :] = tmp[i, 0, :, :]
        kernel = F.conv2d(k1, self.k0.permute(1, 0, 2, 3))
        bias = torch.ones(1, self.out_planes, 3, 3, device=device) * self.b0.view(1, -1, 1, 1)
        return kernel, F.conv2d(bias, k1).view(-1) + self.bias


class ECB(nn.Module):
    """Five branches in training; in eval mode, one convolution whose kernel every forward composes."""

    def __init__(
        self, c1: int, c2: int, depth_multiplier: float = 2.0, act_type: str = "prelu", with_idt: bool = False
    ):
        super().__init__()
        self.act_type = act_type
        self.with_idt = with_idt and c1 == c2
        self.inp_planes, self.out_planes = c1, c2
        self.conv3x3 = nn.Conv2d(c1, c2, 3, padding=1)
        self.conv1x1_3x3 = SeqConv3x3("conv1x1-conv3x3", c1, c2, depth_multiplier)
        self.conv1x1_sbx = SeqConv3x3("conv1x1-sobelx", c1, c2)
        self.conv1x1_sby = SeqConv3x3("conv1x1-sobely", c1, c2)
        self.conv1x1_lpl = SeqConv3x3("conv1x1-laplacian", c1, c2)
        if act_type == "prelu":
            self.act = nn.PReLU(num_parameters=c2)
        elif act_type != "linear":
            raise ValueError("The type of activation if not support!")

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            y = self.conv3x3(x) + self.conv1x1_3x3(x)
            y = y + self.conv1x1_sbx(x) + self.conv1x1_sby(x) + self.conv1x1_lpl(x)
            if self.with_idt:
                y += x
        else:
            kernel, bias = self.rep_params()
            y = F.conv2d(input=x, weight=kernel, bias=bias, stride=1, padding=1)
        if self.act_type != "linear":
            y = self.act(y)
        return y

    def rep_params(self) -> tuple[Tensor, Tensor]:
        k0, b0 = self.conv3x3.weight, self.conv3x3.bias
        k1, b1 = self.conv1x1_3x3.rep_params()
        k2, b2 = self.conv1x1_sbx.rep_params()
        k3, b3 = self.conv1x1_sby.rep_params()
        k4, b4 = self.conv1x1_lpl.rep_params()
        kernel, bias = (k0 + k1 + k2 + k3 + k4), (b0 + b1 + b2 + b3 + b4)
        if self.with_idt:
            device = kernel.get_device()
            if device < 0:
                device = None
            identity = torch.zeros(self.out_planes, self.out_planes, 3, 3, device=device)
            for i in range(self.out_planes):
                identity[i, i, 1, 1] = 1.0
            kernel = kernel + identity
        return kernel, bias


class Conv3x3(nn.Module):
    """What an ECB is converted to."""

    def __init__(self, block: ECB):
        super().__init__()
        self.conv3x3 = nn.Conv2d(block.inp_planes, block.out_planes, 3, padding=1)
        kernel, bias = block.rep_params()
        self.conv3x3.weight.data, self.conv3x3.bias.data = kernel, bias
        self.act = getattr(block, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv3x3(x))


class ECBSR(nn.Module):
    def __init__(self, blocks: int = 4, features: int = 16, scale: int = 4, colors: int = 1, with_idt: bool = True):
        super().__init__()
        backbone = [ECB(colors, features)]
        backbone += [ECB(features, features, with_idt=with_idt) for _ in range(blocks)]
        backbone += [ECB(features, colors * scale * scale, act_type="linear")]
        self.backbone = nn.Sequential(*backbone)
        self.upsampler = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x) + x
        return self.upsampler(y)

    def switch_to_deploy(self) -> None:
        self.backbone = nn.Sequential(*(Conv3x3(block) for block in self.backbone))


class Conv3XC(nn.Module):
    """1x1, 3x3, 1x1 and a 1x1 beside them; in eval mode, a convolution that every forward writes its kernel into."""

    def __init__(self, c1: int, c2: int, gain1: int = 2, s: int = 1, bias: bool = True, relu: bool = False):
        super().__init__()
        self.weight_concat, self.bias_concat = None, None
        self.update_params_flag = False
        self.stride, self.has_relu = s, relu
        self.sk = nn.Conv2d(c1, c2, 1, s, 0, bias=bias)
        self.conv = nn.Sequential(
            nn.Conv2d(c1, c1 * gain1, 1, bias=bias),
            nn.Conv2d(c1 * gain1, c2 * gain1, 3, s, 0, bias=bias),
            nn.Conv2d(c2 * gain1, c2, 1, bias=bias),
        )
        self.eval_conv = nn.Conv2d(c1, c2, 3, s, 1, bias=bias)
        self.eval_conv.weight.requires_grad = False
        self.eval_conv.bias.requires_grad = False
        self.update_params()

    def update_params(self) -> None:
        w1, b1 = self.conv[0].weight.data.clone().detach(), self.conv[0].bias.data.clone().detach()
        w2, b2 = self.conv[1].weight.data.clone().detach(), self.conv[1].bias.data.clone().detach()
        w3, b3 = self.conv[2].weight.data.clone().detach(), self.conv[2].bias.data.clone().detach()
        w = F.conv2d(w1.flip(2, 3).permute(1, 0, 2, 3), w2, padding=2, stride=1).flip(2, 3).permute(1, 0, 2, 3)
        b = (w2 * b1.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b2
        self.weight_concat = F.conv2d(w.flip(2, 3).permute(1, 0, 2, 3), w3).flip(2, 3).permute(1, 0, 2, 3)
        self.bias_concat = (w3 * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b3
        sk_w, sk_b = self.sk.weight.data.clone().detach(), self.sk.bias.data.clone().detach()
        pixels_to_pad = (3 - 1) // 2
        sk_w = F.pad(sk_w, [pixels_to_pad] * 4)
        self.weight_concat = self.weight_concat + sk_w
        self.bias_concat = self.bias_concat + sk_b
        self.eval_conv.weight.data = self.weight_concat
        self.eval_conv.bias.data = self.bias_concat

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x_pad = F.pad(x, (1, 1, 1, 1), "constant", 0)
            out = self.conv(x_pad) + self.sk(x)
        else:
            self.update_params()
            out = self.eval_conv(x)
        if self.has_relu:
            out = F.leaky_relu(out, negative_slope=0.05)
        return out


class SPAB(nn.Module):
    """Three convolutions and an attention without parameters; returns its intermediate results as well."""

    def __init__(self, channels: int):
        super().__init__()
        self.c1_r = Conv3XC(channels, channels)
        self.c2_r = Conv3XC(channels, channels)
        self.c3_r = Conv3XC(channels, channels)
        self.act1 = nn.SiLU(inplace=True)
        self.act2 = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out1 = self.c1_r(x)
        out1_act = self.act1(out1)
        out2 = self.c2_r(out1_act)
        out2_act = self.act1(out2)
        out3 = self.c3_r(out2_act)
        sim_att = torch.sigmoid(out3) - 0.5
        out = (out3 + x) * sim_att
        return out, out1, sim_att


class SPAN(nn.Module):
    """Writes an attribute in its forward: the mean, in the type of the input."""

    def __init__(self, features: int = 48, scale: int = 4, img_range: float = 255.0):
        super().__init__()
        self.img_range = img_range
        self.mean = torch.tensor((0.4488, 0.4371, 0.4040)).view(1, 3, 1, 1)
        self.conv_1 = Conv3XC(3, features)
        for i in range(1, 7):
            setattr(self, f"block_{i}", SPAB(features))
        self.conv_cat = nn.Conv2d(4 * features, features, 1)
        self.conv_2 = Conv3XC(features, features)
        self.upsampler = nn.Sequential(nn.Conv2d(features, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        x = (x - self.mean) * self.img_range
        out_feature = self.conv_1(x)
        out_b1, _, _ = self.block_1(out_feature)
        out_b2, _, _ = self.block_2(out_b1)
        out_b3, _, _ = self.block_3(out_b2)
        out_b4, _, _ = self.block_4(out_b3)
        out_b5, _, _ = self.block_5(out_b4)
        out_b6, out_b5_2, _ = self.block_6(out_b5)
        out_b6 = self.conv_2(out_b6)
        out = self.conv_cat(torch.cat([out_feature, out_b6, out_b1, out_b5_2], 1))
        return self.upsampler(out)

    def switch_to_deploy(self) -> None:
        for name, part in list(self.named_modules()):
            if isinstance(part, Conv3XC):
                part.update_params()
                parent, _, own = name.rpartition(".")
                setattr(self.get_submodule(parent), own, part.eval_conv)


NETWORKS = [
    Network(
        "ECBSR",
        ECBSR,
        lambda: (image(2, 1, 25, 31),),
        deploy,
        "the authors' conversion: rep_params of every block",
        "rebuilt: xindongzhang/ECBSR",
    ),
    Network(
        "SPAN",
        SPAN,
        lambda: (image(2, 3, 25, 31),),
        deploy,
        "keeps eval_conv of every Conv3XC",
        "rebuilt: hongyuanyu/SPAN",
    ),
]
SMALL = [
    replace(NETWORKS[0], name="ECBSR, small", make=lambda: ECBSR(2, 4, 2), inputs=lambda: (image(1, 1, 9, 11),)),
    replace(NETWORKS[1], name="SPAN, small", make=lambda: SPAN(8, 2), inputs=lambda: (image(1, 3, 9, 11),)),
]
