"""Networks for dense prediction, rebuilt: ConvModule nets in the style of mmcv, HRNet, MODNet.

mmcv's ConvModule: switches and an order of its layers, a norm that is found by name, a neck and a head over lists of
feature maps. HRNet: Wang et al. (TPAMI 2020), W18-small: modules write into the list that they get. MODNet: Ke et al.
(AAAI 2022): half of the channels are batch normalized, half instance normalized, with a flag as a second argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.folding import conv_like, fold_in_order, fold_pair
from tests.collapse.foreign.harness import Network, deploy, image


class ConvModule(nn.Module):
    """Convolution, norm and activation, in an order that is data."""

    def __init__(
        self,
        c1: int,
        c2: int,
        kernel_size: int,
        stride: int = 1,
        norm: bool = True,
        act: bool = True,
        inplace: bool = True,
        order: tuple[str, ...] = ("conv", "norm", "act"),
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.order, self.with_norm, self.with_activation = order, norm, act
        self.with_explicit_padding = padding_mode != "zeros"
        padding = kernel_size // 2
        if self.with_explicit_padding:
            self.padding_layer = nn.ReflectionPad2d(padding)
        self.conv = nn.Conv2d(c1, c2, kernel_size, stride, 0 if self.with_explicit_padding else padding, bias=not norm)
        self.norm_name = None
        if norm:
            self.norm_name = "bn"
            self.add_module("bn", nn.BatchNorm2d(c2))
        if act:
            self.activate = nn.ReLU(inplace=inplace)

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        layer_index = 0
        while layer_index < len(self.order):
            layer = self.order[layer_index]
            if layer == "conv":
                if self.with_explicit_padding:
                    x = self.padding_layer(x)
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
            layer_index += 1
        return x

    def switch_to_deploy(self) -> None:
        if self.with_norm:
            fold_pair(self, "conv", "bn")


class DarknetBottleneck(nn.Module):
    def __init__(self, c: int, add_identity: bool = True):
        super().__init__()
        self.conv1, self.conv2 = ConvModule(c, c // 2, 1), ConvModule(c // 2, c, 3)
        self.add_identity = add_identity

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv2(self.conv1(x))
        return out + identity if self.add_identity else out


class CSPLayer(nn.Module):
    def __init__(self, c1: int, c2: int, blocks: int):
        super().__init__()
        mid = c2 // 2
        self.main_conv, self.short_conv, self.final_conv = (
            ConvModule(c1, mid, 1),
            ConvModule(c1, mid, 1),
            ConvModule(2 * mid, c2, 1),
        )
        self.blocks = nn.Sequential(*(DarknetBottleneck(mid) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x_short = self.short_conv(x)
        x_main = self.blocks(self.main_conv(x))
        return self.final_conv(torch.cat((x_main, x_short), dim=1))


class FPN(nn.Module):
    """Top-down path over a tuple of levels; more levels by subsampling."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_outs: int):
        super().__init__()
        self.in_channels, self.num_outs, self.start_level = in_channels, num_outs, 0
        self.upsample_cfg: dict[str, Any] = {"mode": "nearest"}
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1, act=False) for c in in_channels)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, act=False) for _ in in_channels)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        assert len(inputs) == len(self.in_channels)
        laterals = [conv(inputs[i + self.start_level]) for i, conv in enumerate(self.lateral_convs)]
        used = len(laterals)
        for i in range(used - 1, 0, -1):
            if "scale_factor" in self.upsample_cfg:
                laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], **self.upsample_cfg)
            else:
                size = laterals[i - 1].shape[2:]
                laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=size, **self.upsample_cfg)
        outs = [self.fpn_convs[i](laterals[i]) for i in range(used)]
        for _ in range(self.num_outs - used):
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


class DenseHead(nn.Module):
    """One tower for all levels, applied by a map over them."""

    def __init__(self, channels: int, classes: int, stacked: int = 2):
        super().__init__()
        self.cls_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(stacked))
        self.reg_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(stacked))
        self.cls_out, self.reg_out = nn.Conv2d(channels, classes, 3, padding=1), nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0 + 0.1 * i)) for i in range(5))

    def forward(self, feats: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
        return tuple(map(list, zip(*map(self.forward_single, feats, self.scales[: len(feats)]), strict=True)))

    def forward_single(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        cls_feat = reg_feat = x
        for cls_layer in self.cls_convs:
            cls_feat = cls_layer(cls_feat)
        for reg_layer in self.reg_convs:
            reg_feat = reg_layer(reg_feat)
        return self.cls_out(cls_feat), F.relu(scale * self.reg_out(reg_feat))


class Detector(nn.Module):
    """A forward with modes, as mmengine's models have it; stages found by name."""

    def __init__(self, width: int = 32, classes: int = 20, blocks: int = 2):
        super().__init__()
        self.stem = nn.Sequential(ConvModule(3, width // 2, 3, 2), ConvModule(width // 2, width, 3))
        self.layers = ["stem"]
        for i in range(1, 4):
            c1, c2 = width * 2 ** (i - 1), width * 2**i
            self.add_module(f"stage{i}", nn.Sequential(ConvModule(c1, c2, 3, 2), CSPLayer(c2, c2, blocks)))
            self.layers.append(f"stage{i}")
        self.out_indices = (1, 2, 3)
        self.neck = FPN([2 * width, 4 * width, 8 * width], 2 * width, 4)
        self.bbox_head = DenseHead(2 * width, classes)
        self.mask_head = nn.ModuleList(
            [ConvModule(2 * width, width, 3, padding_mode="reflect"), ConvModule(width, 1, 1, norm=False, act=False)]
        )

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        outs = []
        x = inputs
        for i, layer_name in enumerate(self.layers):
            x = getattr(self, layer_name)(x)
            if i in self.out_indices:
                outs.append(x)
        return self.neck(tuple(outs))

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> object:
        if mode == "loss":
            return self.loss(inputs, data_samples)
        if mode == "tensor":
            return self._forward(inputs)
        raise RuntimeError(f'Invalid mode "{mode}".')

    def _forward(self, inputs: Tensor) -> object:
        feats = self.extract_feat(inputs)
        mask = feats[0]
        for layer in self.mask_head:
            mask = layer(mask)
        return self.bbox_head(feats), mask.sigmoid()

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        return {"loss": sum(out.mean() for out in self._forward(inputs)[0][0])}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c1: int, c2: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c1, c2, 3, stride, 1, bias=False), nn.BatchNorm2d(c2)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c2, c2, 3, 1, 1, bias=False), nn.BatchNorm2d(c2)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c1: int, c2: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c1, c2, 1, bias=False), nn.BatchNorm2d(c2)
        self.conv2, self.bn2 = nn.Conv2d(c2, c2, 3, stride, 1, bias=False), nn.BatchNorm2d(c2)
        self.conv3, self.bn3 = nn.Conv2d(c2, 4 * c2, 1, bias=False), nn.BatchNorm2d(4 * c2)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)


def hr_layer(block: type[nn.Module], c1: int, c2: int, blocks: int, stride: int = 1) -> nn.Sequential:
    downsample = None
    if stride != 1 or c1 != c2 * block.expansion:
        conv = nn.Conv2d(c1, c2 * block.expansion, 1, stride, bias=False)
        downsample = nn.Sequential(conv, nn.BatchNorm2d(c2 * block.expansion))
    layers = [block(c1, c2, stride, downsample)]
    layers += [block(c2 * block.expansion, c2) for _ in range(blocks - 1)]
    return nn.Sequential(*layers)


class HighResolutionModule(nn.Module):
    """Parallel branches; each output is the sum of all of them, resampled."""

    def __init__(self, channels: list[int], blocks: int):
        super().__init__()
        self.num_branches = len(channels)
        self.branches = nn.ModuleList(hr_layer(BasicBlock, c, c, blocks) for c in channels)
        self.relu = nn.ReLU(False)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._fuse_layer(channels, i, j) for j in range(len(channels))) for i in range(len(channels))
        )

    @staticmethod
    def _fuse_layer(channels: list[int], i: int, j: int) -> nn.Module | None:
        if j == i:
            return None
        if j > i:
            conv = nn.Conv2d(channels[j], channels[i], 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(channels[i]), nn.Upsample(scale_factor=2 ** (j - i)))
        steps = []
        for k in range(i - j):
            last = k == i - j - 1
            c = channels[i] if last else channels[j]
            parts = [nn.Conv2d(channels[j], c, 3, 2, 1, bias=False), nn.BatchNorm2d(c)]
            steps.append(nn.Sequential(*parts) if last else nn.Sequential(*parts, nn.ReLU(False)))
        return nn.Sequential(*steps)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        if self.num_branches == 1:
            return [self.branches[0](x[0])]
        for i in range(self.num_branches):
            x[i] = self.branches[i](x[i])
        x_fuse = []
        for i in range(len(self.fuse_layers)):
            y = x[0] if i == 0 else self.fuse_layers[i][0](x[0])
            for j in range(1, self.num_branches):
                if i == j:
                    y = y + x[j]
                else:
                    y = y + self.fuse_layers[i][j](x[j])
            x_fuse.append(self.relu(y))
        return x_fuse


class HRNet(nn.Module):
    """The classification network HRNet-W18-small: four stages, then a head over all resolutions."""

    def __init__(self, width: int = 16, stem: int = 64, blocks: int = 2, classes: int = 1000, head: int = 32):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem)
        self.conv2, self.bn2 = nn.Conv2d(stem, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = hr_layer(Bottleneck, stem, head, 1)
        previous = [4 * head]
        for stage in (2, 3, 4):
            channels = [width * 2**i for i in range(stage)]
            setattr(self, f"transition{stage - 1}", self._transition(previous, channels))
            setattr(self, f"stage{stage}", nn.Sequential(HighResolutionModule(channels, blocks)))
            previous = channels
        self.incre_modules = nn.ModuleList(hr_layer(Bottleneck, c, head * 2**i, 1) for i, c in enumerate(previous))
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4 * head * 2**i, 8 * head * 2**i, 3, 2, 1), nn.BatchNorm2d(8 * head * 2**i), nn.ReLU(True)
            )
            for i in range(3)
        )
        top = 4 * head * 8
        self.final_layer = nn.Sequential(nn.Conv2d(top, 64 * head, 1), nn.BatchNorm2d(64 * head), nn.ReLU(True))
        self.classifier = nn.Linear(64 * head, classes)

    @staticmethod
    def _transition(before: list[int], after: list[int]) -> nn.ModuleList:
        layers: list[nn.Module | None] = []
        for i, c in enumerate(after):
            if i < len(before):
                same = before[i] == c
                conv = nn.Conv2d(before[i], c, 3, 1, 1, bias=False)
                layers.append(None if same else nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU(True)))
            else:
                conv = nn.Conv2d(before[-1], c, 3, 2, 1, bias=False)
                layers.append(nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU(True))))
        return nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        x_list = []
        for i in range(2):
            if self.transition1[i] is not None:
                x_list.append(self.transition1[i](x))
            else:
                x_list.append(x)
        y_list = self.stage2(x_list)
        x_list = []
        for i in range(3):
            if self.transition2[i] is not None:
                x_list.append(self.transition2[i](y_list[-1]))
            else:
                x_list.append(y_list[i])
        y_list = self.stage3(x_list)
        x_list = []
        for i in range(4):
            if self.transition3[i] is not None:
                x_list.append(self.transition3[i](y_list[-1]))
            else:
                x_list.append(y_list[i])
        y_list = self.stage4(x_list)
        y = self.incre_modules[0](y_list[0])
        for i in range(len(self.downsamp_modules)):
            y = self.incre_modules[i + 1](y_list[i + 1]) + self.downsamp_modules[i](y)
        y = self.final_layer(y)
        y = F.avg_pool2d(y, kernel_size=y.size()[2:]).view(y.size(0), -1)
        return self.classifier(y)


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
    def __init__(self, c1: int, c2: int, k: int, stride: int = 1, padding: int = 0, with_ibn: bool = True, relu: bool = True):
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
            nn.Linear(c1, c1 // reduction, bias=False), nn.ReLU(inplace=True), nn.Linear(c1 // reduction, c2, bias=False), nn.Sigmoid()
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
        "mmcv ConvModule detector",
        Detector,
        lambda: (image(2, 3, 80, 96),),
        deploy,
        "mmcv's fuse_conv_bn",
        "rebuilt: open-mmlab/mmcv, mmdetection",
    ),
    Network(
        "HRNet-W18-small",
        HRNet,
        lambda: (image(2, 3, 64, 96),),
        fold_in_order,
        "none; every convolution with its norm",
        "rebuilt: HRNet/HRNet-Image-Classification",
    ),
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
    replace(
        NETWORKS[0],
        name="mmcv ConvModule detector, small",
        make=lambda: Detector(8, 3, 1),
        inputs=lambda: (image(1, 3, 32, 40),),
    ),
    replace(
        NETWORKS[1],
        name="HRNet, small",
        make=lambda: HRNet(4, 8, 1, 10, 4),
        inputs=lambda: (image(2, 3, 64, 64),),
    ),
    replace(
        NETWORKS[2], name="MODNet, small", make=lambda: MODNet(8, 4), inputs=lambda: (image(1, 3, 64, 64), True)
    ),
]
