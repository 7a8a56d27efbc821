"""A detector of ConvModules in the style of mmcv and mmdetection, rebuilt.

The module has switches and an order of its layers that is data, and finds its norm by name; neck and head map over
tuples of feature maps; the forward of the detector has modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.folding import fold_pair
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


NETWORKS = [
    Network(
        "mmcv ConvModule detector",
        Detector,
        lambda: (image(2, 3, 80, 96),),
        deploy,
        "mmcv's fuse_conv_bn",
        "rebuilt: open-mmlab/mmcv, mmdetection",
    ),
]
SMALL = [
    replace(
        NETWORKS[0],
        name="mmcv ConvModule detector, small",
        make=lambda: Detector(8, 3, 1),
        inputs=lambda: (image(1, 3, 32, 40),),
    ),
]
