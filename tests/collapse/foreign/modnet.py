"""MODNet, rebuilt from Ke et al., "MODNet: Real-Time Trimap-Free Portrait Matting" (AAAI 2022).

Half of the channels are batch normalized, the other half instance normalized; the forward has a flag as its second
argument, with which three layers are not called.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.folding import conv_like, fold_in_order
from tests.collapse.foreign.harness import Network, deploy, image


class IBNorm(nn.Module):
    """Batch norm for the first half of the channels, instance norm for the second."""

    def __init__(self, channels: int):
        super().__init__()
        self.bnorm_channels = channels // 2
        self.inorm_channels = channels - self.bnorm_channels
        self.bnorm = nn.BatchNorm2d(self.bnorm_channels, affine=True)
        self.inorm = nn.InstanceNorm2d(self.inorm_channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        bn_x = self.bnorm(x[:, : self.bnorm_channels, ...].contiguous())
        in_x = self.inorm(x[:, self.bnorm_channels :, ...].contiguous())
        return torch.cat((bn_x, in_x), 1)


class Conv2dIBNormRelu(nn.Module):
    def __init__(
        self, c1: int, c2: int, k: int, stride: int = 1, padding: int = 0, with_ibn: bool = True, relu: bool = True
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(c1, c2, k, stride, padding)]
        if with_ibn:
            layers.append(IBNorm(c2))
        if relu:
            layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def switch_to_deploy(self) -> None:
        if len(self.layers) < 2 or not isinstance(self.layers[1], IBNorm):
            return
        conv, bn = self.layers[0], self.layers[1].bnorm
        if not isinstance(bn, nn.BatchNorm2d):
            return
        half = bn.num_features
        factor = bn.weight / (bn.running_var + bn.eps).sqrt()
        kernel, bias = conv.weight.clone(), conv.bias.clone()
        kernel[:half] *= factor.view(-1, 1, 1, 1)
        bias[:half] = bn.bias + (bias[:half] - bn.running_mean) * factor
        self.layers[0] = conv_like(conv, kernel, bias)
        self.layers[1].bnorm = nn.Identity()


class InvertedResidual(nn.Module):
    def __init__(self, c1: int, c2: int, stride: int, expansion: int):
        super().__init__()
        hidden = c1 * expansion
        self.use_res_connect = stride == 1 and c1 == c2
        parts = [nn.Conv2d(c1, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        parts += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        parts += [nn.ReLU6(inplace=True), nn.Conv2d(hidden, c2, 1, bias=False), nn.BatchNorm2d(c2)]
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)

    def switch_to_deploy(self) -> None:
        fold_in_order(self)


class MobileNetBackbone(nn.Module):
    """Features at strides 2, 4 and 32, called by index."""

    def __init__(self, width: int):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True))
        rows = [(width, 1, 1), (2 * width, 2, 4), (2 * width, 1, 4), (3 * width, 2, 4), (4 * width, 2, 4)]
        rows += [(4 * width, 1, 4), (6 * width, 2, 4)]
        layers: list[nn.Module] = [stem]
        c = width
        for c2, stride, expansion in rows:
            layers.append(InvertedResidual(c, c2, stride, expansion))
            c = c2
        self.enc_channels = [width, 2 * width, 6 * width]
        self.features = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        for i in (0, 1):
            x = self.features[i](x)
        enc2x = x
        for i in (2, 3):
            x = self.features[i](x)
        enc4x = x
        for i in range(4, len(self.features)):
            x = self.features[i](x)
        return [enc2x, enc4x, x]

    def switch_to_deploy(self) -> None:
        fold_in_order(self.features[0])


class SEBlock(nn.Module):
    def __init__(self, c1: int, c2: int, reduction: int = 1):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(c1, c1 // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(c1 // reduction, c2, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        w = self.pool(x).view(b, c)
        w = self.fc(w).view(b, c, 1, 1)
        return x * w.expand_as(x)


class MODNet(nn.Module):
    """Low resolution, high resolution and fusion branch; ``inference`` skips the intermediate predictions."""

    def __init__(self, hr_channels: int = 32, width: int = 16):
        super().__init__()
        self.backbone = MobileNetBackbone(width)
        c2, c4, c32 = self.backbone.enc_channels
        h = hr_channels
        self.se_block = SEBlock(c32, c32, reduction=4)
        self.conv_lr16x, self.conv_lr8x = Conv2dIBNormRelu(c32, 3 * h, 5, 1, 2), Conv2dIBNormRelu(3 * h, h, 5, 1, 2)
        self.conv_lr = Conv2dIBNormRelu(h, 1, 3, 2, 1, with_ibn=False, relu=False)
        self.tohr_enc2x = Conv2dIBNormRelu(c2, h, 1)
        self.conv_enc2x = Conv2dIBNormRelu(h + 3, h, 3, 2, 1)
        self.tohr_enc4x = Conv2dIBNormRelu(c4, h, 1)
        self.conv_enc4x = Conv2dIBNormRelu(2 * h, 2 * h, 3, 1, 1)
        self.conv_hr4x = nn.Sequential(Conv2dIBNormRelu(3 * h + 3, 2 * h, 3, 1, 1), Conv2dIBNormRelu(2 * h, h, 3, 1, 1))
        self.conv_hr2x = nn.Sequential(Conv2dIBNormRelu(2 * h, 2 * h, 3, 1, 1), Conv2dIBNormRelu(2 * h, h, 3, 1, 1))
        self.conv_hr = nn.Sequential(
            Conv2dIBNormRelu(h + 3, h, 3, 1, 1), Conv2dIBNormRelu(h, 1, 1, with_ibn=False, relu=False)
        )
        self.conv_lr4x, self.conv_f2x = Conv2dIBNormRelu(h, h, 5, 1, 2), Conv2dIBNormRelu(2 * h, h, 3, 1, 1)
        self.conv_f = nn.Sequential(
            Conv2dIBNormRelu(h + 3, h // 2, 3, 1, 1), Conv2dIBNormRelu(h // 2, 1, 1, with_ibn=False, relu=False)
        )

    def forward(self, img: Tensor, inference: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
        enc2x, enc4x, enc32x = self.backbone(img)
        enc32x = self.se_block(enc32x)
        lr16x = self.conv_lr16x(F.interpolate(enc32x, scale_factor=2, mode="bilinear", align_corners=False))
        lr8x = self.conv_lr8x(F.interpolate(lr16x, scale_factor=2, mode="bilinear", align_corners=False))
        pred_semantic = None
        if not inference:
            pred_semantic = torch.sigmoid(self.conv_lr(lr8x))

        img2x = F.interpolate(img, scale_factor=1 / 2, mode="bilinear", align_corners=False)
        img4x = F.interpolate(img, scale_factor=1 / 4, mode="bilinear", align_corners=False)
        enc2x = self.tohr_enc2x(enc2x)
        hr4x = self.conv_enc2x(torch.cat((img2x, enc2x), dim=1))
        enc4x = self.tohr_enc4x(enc4x)
        hr4x = self.conv_enc4x(torch.cat((hr4x, enc4x), dim=1))
        lr4x = F.interpolate(lr8x, scale_factor=2, mode="bilinear", align_corners=False)
        hr4x = self.conv_hr4x(torch.cat((hr4x, lr4x, img4x), dim=1))
        hr2x = F.interpolate(hr4x, scale_factor=2, mode="bilinear", align_corners=False)
        hr2x = self.conv_hr2x(torch.cat((hr2x, enc2x), dim=1))
        pred_detail = None
        if not inference:
            hr = F.interpolate(hr2x, scale_factor=2, mode="bilinear", align_corners=False)
            pred_detail = torch.sigmoid(self.conv_hr(torch.cat((hr, img), dim=1)))

        lr4x = self.conv_lr4x(lr4x)
        lr2x = F.interpolate(lr4x, scale_factor=2, mode="bilinear", align_corners=False)
        f2x = self.conv_f2x(torch.cat((lr2x, hr2x), dim=1))
        f = F.interpolate(f2x, scale_factor=2, mode="bilinear", align_corners=False)
        pred_matte = torch.sigmoid(self.conv_f(torch.cat((f, img), dim=1)))
        return pred_semantic, pred_detail, pred_matte


NETWORKS = [
    Network(
        "MODNet",
        MODNet,
        lambda: (image(2, 3, 64, 96), True),
        deploy,
        "none; every norm folded into its part of the convolution",
        "rebuilt: ZHKKKe/MODNet",
    ),
]
SMALL = [
    replace(NETWORKS[0], name="MODNet, small", make=lambda: MODNet(8, 4), inputs=lambda: (image(1, 3, 64, 64), True)),
]
