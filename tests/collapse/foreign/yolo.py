"""YOLO networks, rebuilt: GELAN of YOLOv9, and YOLO-NAS.

GELAN: Wang et al., "YOLOv9: Learning What You Want to Learn Using Programmable Gradient Information" (2024). The root
loops over its layers and picks inputs by index, blocks grow a list of pieces, and the head writes into the list that
it gets. YOLO-NAS: its QARepVGG blocks (Chu et al., "Make RepVGG Greater Again", 2022) create the merged convolution on
construction, so every network carries parameters that no forward calls until the blocks are fused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.folding import conv_like, fold_pair, identity_kernel, kernel_bias, padded, scaled
from tests.collapse.foreign.harness import Network, deploy, image


class Conv(nn.Module):
    """Convolution, norm, SiLU; deployed, another forward takes over."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def switch_to_deploy(self) -> None:
        fold_pair(self, "conv", "bn")
        del self.bn
        self.forward = self.forward_fuse


class RepConvN(nn.Module):
    """3x3 and 1x1 branch; the norm of the identity is optional and absent."""

    def __init__(self, c1: int, c2: int, act: bool = True):
        super().__init__()
        self.act = nn.SiLU() if act is True else nn.Identity()
        self.bn = None
        self.conv1 = Conv(c1, c2, 3, act=False)
        self.conv2 = Conv(c1, c2, 1, act=False)

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        id_out = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + id_out)

    def switch_to_deploy(self) -> None:
        (k3, b3), (k1, b1) = kernel_bias(self.conv1), kernel_bias(self.conv2)
        self.conv = conv_like(self.conv1.conv, k3 + padded(k1, (3, 3)), b3 + b1)
        del self.conv1, self.conv2, self.bn
        self.forward = self.forward_fuse


class RepNBottleneck(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.cv1 = RepConvN(c, c)
        self.cv2 = Conv(c, c, 3)
        self.add = True

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class RepNCSP(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1):
        super().__init__()
        c_ = c2 // 2
        self.cv1 = Conv(c1, c_)
        self.cv2 = Conv(c1, c_)
        self.cv3 = Conv(2 * c_, c2)
        self.m = nn.Sequential(*(RepNBottleneck(c_) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class RepNCSPELAN4(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int, c4: int, n: int = 1):
        super().__init__()
        self.c = c3 // 2
        self.cv1 = Conv(c1, c3)
        self.cv2 = nn.Sequential(RepNCSP(c3 // 2, c4, n), Conv(c4, c4, 3))
        self.cv3 = nn.Sequential(RepNCSP(c4, c4, n), Conv(c4, c4, 3))
        self.cv4 = Conv(c3 + 2 * c4, c2)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in [self.cv2, self.cv3])
        return self.cv4(torch.cat(y, 1))


class ADown(nn.Module):
    def __init__(self, c1: int, c2: int):
        super().__init__()
        self.cv1 = Conv(c1 // 2, c2 // 2, 3, 2)
        self.cv2 = Conv(c1 // 2, c2 // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, 1, 0, False, True)
        x1, x2 = x.chunk(2, 1)
        x1 = self.cv1(x1)
        x2 = F.max_pool2d(x2, 3, 2, 1)
        x2 = self.cv2(x2)
        return torch.cat((x1, x2), 1)


class SPPELAN(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int):
        super().__init__()
        self.cv1 = Conv(c1, c3)
        self.cv2, self.cv3, self.cv4 = (nn.MaxPool2d(5, 1, 2) for _ in range(3))
        self.cv5 = Conv(4 * c3, c2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(m(y[-1]) for m in [self.cv2, self.cv3, self.cv4])
        return self.cv5(torch.cat(y, 1))


class Concat(nn.Module):
    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, 1)


class DFL(nn.Module):
    """Expectation of a discrete distribution, as a convolution with fixed weights."""

    def __init__(self, bins: int):
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.bins, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class DDetect(nn.Module):
    """Writes its results into the list that it gets, and caches the anchors of the last shape."""

    dynamic, export, shape = False, False, None

    def __init__(self, classes: int, channels: list[int]):
        super().__init__()
        self.nc, self.nl, self.reg_max = classes, len(channels), 16
        self.no = classes + 4 * self.reg_max
        c2, c3 = 4 * self.reg_max, max(channels[0], 24)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, c2, 3), Conv(c2, c2, 3, g=4), nn.Conv2d(c2, 4 * self.reg_max, 1, groups=4))
            for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(c, c3, 3), Conv(c3, c3, 3), nn.Conv2d(c3, classes, 1)) for c in channels
        )
        self.dfl = DFL(self.reg_max)

    def forward(self, x: list[Tensor]) -> Tensor | list[Tensor] | tuple[Tensor, list[Tensor]]:
        shape = x[0].shape
        for i in range(self.nl):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.training:
            return x
        if self.dynamic or self.shape != shape:
            self.anchors, self.strides = anchor_points(x)
            self.shape = shape
        box, cls = torch.cat([xi.view(shape[0], self.no, -1) for xi in x], 2).split((self.reg_max * 4, self.nc), 1)
        left_top, right_bottom = self.dfl(box).chunk(2, 1)
        boxes = torch.cat((self.anchors - left_top, self.anchors + right_bottom), 1) * self.strides
        y = torch.cat((boxes, cls.sigmoid()), 1)
        return y if self.export else (y, x)


def anchor_points(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return centers of shape (2, A) in cells, and strides of shape (A,), for levels with strides 8, 16, ..."""
    points, strides = [], []
    for level, feature in enumerate(features):
        h, w = feature.shape[-2:]
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        points.append(torch.stack((x, y)).flatten(1))
        strides.append(torch.full((h * w,), 8.0 * 2**level))
    return torch.cat(points, 1).to(features[0]), torch.cat(strides).to(features[0])


class Gelan(nn.Module):
    """The layout of gelan-c: layers with the index of their inputs, and a list of the outputs that are needed later."""

    def __init__(self, width: int = 64, depth: int = 1, classes: int = 20):
        super().__init__()
        w = width
        rows: list[tuple[int | list[int], nn.Module]] = [
            (-1, Conv(3, w, 3, 2)),
            (-1, Conv(w, 2 * w, 3, 2)),
            (-1, RepNCSPELAN4(2 * w, 4 * w, 2 * w, w, depth)),
            (-1, ADown(4 * w, 4 * w)),
            (-1, RepNCSPELAN4(4 * w, 8 * w, 4 * w, 2 * w, depth)),
            (-1, ADown(8 * w, 8 * w)),
            (-1, RepNCSPELAN4(8 * w, 8 * w, 8 * w, 4 * w, depth)),
            (-1, ADown(8 * w, 8 * w)),
            (-1, RepNCSPELAN4(8 * w, 8 * w, 8 * w, 4 * w, depth)),
            (-1, SPPELAN(8 * w, 8 * w, 4 * w)),
            (-1, nn.Upsample(None, 2, "nearest")),
            ([-1, 6], Concat()),
            (-1, RepNCSPELAN4(16 * w, 8 * w, 8 * w, 4 * w, depth)),
            (-1, nn.Upsample(None, 2, "nearest")),
            ([-1, 4], Concat()),
            (-1, RepNCSPELAN4(16 * w, 4 * w, 4 * w, 2 * w, depth)),
            (-1, ADown(4 * w, 4 * w)),
            ([-1, 12], Concat()),
            (-1, RepNCSPELAN4(12 * w, 8 * w, 8 * w, 4 * w, depth)),
            (-1, ADown(8 * w, 8 * w)),
            ([-1, 9], Concat()),
            (-1, RepNCSPELAN4(16 * w, 8 * w, 8 * w, 4 * w, depth)),
            ([15, 18, 21], DDetect(classes, [4 * w, 8 * w, 8 * w])),
        ]
        self.save = sorted(i for sources, _ in rows for i in (sources if isinstance(sources, list) else []) if i != -1)
        for index, (sources, layer) in enumerate(rows):
            layer.f, layer.i = sources, index
        self.model = nn.Sequential(*(layer for _, layer in rows))

    def forward(self, x: Tensor, profile: bool = False, visualize: bool = False) -> object:
        return self._forward_once(x, profile, visualize)

    def _forward_once(self, x: Tensor, profile: bool = False, visualize: bool = False) -> object:
        y: list[Tensor | None] = []
        for m in self.model:
            if m.f != -1:
                x = y[m.f] if isinstance(m.f, int) else [x if j == -1 else y[j] for j in m.f]
            if profile:
                self._profile_one_layer(m, x)
            x = m(x)
            y.append(x if m.i in self.save else None)
            if visualize:
                raise NotImplementedError
        return x

    def _profile_one_layer(self, m: nn.Module, x: Tensor) -> None:
        print(type(m).__name__, sum(p.numel() for p in m.parameters()), x.shape)


class QARepVGGBlock(nn.Module):
    """3x3 with norm, 1x1 with bias, identity; a norm after the sum; the merged convolution exists from the start."""

    def __init__(self, c1: int, c2: int, stride: int = 1, residual: bool = True, use_alpha: bool = False):
        super().__init__()
        self.fully_fused = False
        self.nonlinearity = nn.ReLU()
        self.se = nn.Identity()
        self.branch_3x3 = nn.Sequential()
        self.branch_3x3.add_module("conv", nn.Conv2d(c1, c2, 3, stride, 1, bias=False))
        self.branch_3x3.add_module("bn", nn.BatchNorm2d(c2))
        self.branch_1x1 = nn.Conv2d(c1, c2, 1, stride)
        self.identity = nn.Identity() if residual and c1 == c2 and stride == 1 else None
        self.alpha = nn.Parameter(torch.tensor([0.7])) if use_alpha else 1.0
        self.post_bn = nn.BatchNorm2d(c2)
        self.rbr_reparam = nn.Conv2d(c1, c2, 3, stride, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.fully_fused:
            return self.se(self.nonlinearity(self.rbr_reparam(inputs)))
        id_out = 0.0 if self.identity is None else self.identity(inputs)
        x_1x1 = self.alpha * self.branch_1x1(inputs)
        return self.se(self.nonlinearity(self.post_bn(self.branch_3x3(inputs) + x_1x1 + id_out)))

    def switch_to_deploy(self) -> None:
        kernel, bias = kernel_bias(self.branch_3x3)
        kernel = kernel + padded(self.alpha * self.branch_1x1.weight, (3, 3))
        bias = bias + self.alpha * self.branch_1x1.bias
        if self.identity is not None:
            kernel = kernel + padded(identity_kernel(kernel.shape[0]), (3, 3))
        kernel, bias = scaled(kernel, self.post_bn, bias)
        self.rbr_reparam.weight.data, self.rbr_reparam.bias.data = kernel.detach(), bias.detach()
        del self.branch_3x3, self.branch_1x1, self.post_bn, self.identity, self.alpha
        self.fully_fused = True


class ConvBNAct(nn.Module):
    """A sequence with the names conv, bn, act."""

    def __init__(self, c1: int, c2: int, k: int, stride: int = 1):
        super().__init__()
        self.seq = nn.Sequential()
        self.seq.add_module("conv", nn.Conv2d(c1, c2, k, stride, k // 2, bias=False))
        self.seq.add_module("bn", nn.BatchNorm2d(c2))
        self.seq.add_module("act", nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)

    def switch_to_deploy(self) -> None:
        fold_pair(self.seq, "conv", "bn")


class NasBottleneck(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.cv1, self.cv2 = QARepVGGBlock(c, c), QARepVGGBlock(c, c)
        self.alpha = nn.Parameter(torch.tensor([0.8]))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.cv2(self.cv1(x))


class SequentialWithIntermediates(nn.Sequential):
    """Returns the input and every intermediate result."""

    def __init__(self, output_intermediates: bool, *blocks: nn.Module):
        super().__init__(*blocks)
        self.output_intermediates = output_intermediates

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.output_intermediates:
            output = [x]
            for module in self:
                output.append(module(output[-1]))
            return output
        return [super().forward(x)]


class NasCSPLayer(nn.Module):
    def __init__(self, c1: int, c2: int, hidden: int, blocks: int, concat_intermediates: bool):
        super().__init__()
        self.conv1, self.conv2 = ConvBNAct(c1, hidden, 1), ConvBNAct(c1, hidden, 1)
        self.conv3 = ConvBNAct(hidden * (2 + concat_intermediates * blocks), c2, 1)
        self.bottlenecks = SequentialWithIntermediates(
            concat_intermediates, *(NasBottleneck(hidden) for _ in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        x_1 = self.conv1(x)
        x_1 = self.bottlenecks(x_1)
        x_2 = self.conv2(x)
        return self.conv3(torch.cat((*x_1, x_2), dim=1))


class NasStage(nn.Module):
    def __init__(self, c1: int, c2: int, blocks: int, hidden: int, concat: bool):
        super().__init__()
        self.downsample = QARepVGGBlock(c1, c2, stride=2, residual=False)
        self.blocks = NasCSPLayer(c2, c2, hidden, blocks, concat)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class SPP(nn.Module):
    def __init__(self, c1: int, c2: int):
        super().__init__()
        self.cv1, self.cv2 = ConvBNAct(c1, c1 // 2, 1), ConvBNAct(c1 // 2 * 4, c2, 1)
        self.m = nn.ModuleList([nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x] + [m(x) for m in self.m], 1))


class NasUpStage(nn.Module):
    """Takes three levels; a transposed convolution raises the resolution."""

    def __init__(self, c_low: int, c_skip: int, c_skip2: int, c_out: int):
        super().__init__()
        self.reduce_skip1 = ConvBNAct(c_skip, c_out, 1)
        self.reduce_skip2 = ConvBNAct(c_skip2, c_out, 1)
        self.conv = ConvBNAct(c_low, c_out, 1)
        self.upsample = nn.ConvTranspose2d(c_out, c_out, 2, 2)
        self.downsample = ConvBNAct(c_out, c_out, 3, stride=2)
        self.reduce_after_concat = ConvBNAct(3 * c_out, c_out, 1)
        self.blocks = NasCSPLayer(c_out, c_out, c_out // 2, 2, True)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        x, skip_x1, skip_x2 = inputs
        skip_x1, skip_x2 = self.reduce_skip1(skip_x1), self.reduce_skip2(skip_x2)
        x_inter = self.conv(x)
        x = self.upsample(x_inter)
        x = torch.cat([x, skip_x1, self.downsample(skip_x2)], 1)
        return x_inter, self.blocks(self.reduce_after_concat(x))


class NasDFLHead(nn.Module):
    def __init__(self, c: int, classes: int, reg_max: int = 16):
        super().__init__()
        self.stem = ConvBNAct(c, c, 1)
        self.cls_convs, self.reg_convs = nn.Sequential(ConvBNAct(c, c, 3)), nn.Sequential(ConvBNAct(c, c, 3))
        self.cls_pred = nn.Conv2d(c, classes, 1)
        self.reg_pred = nn.Conv2d(c, 4 * (reg_max + 1), 1)
        self.cls_dropout_rate = 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        cls_feat = self.cls_convs(x)
        return self.reg_pred(self.reg_convs(x)), self.cls_pred(cls_feat)


class NasHeads(nn.Module):
    """Calls the heads by their attribute names and decodes the boxes."""

    def __init__(self, channels: list[int], classes: int, reg_max: int = 16):
        super().__init__()
        self.num_heads, self.reg_max, self.fpn_strides = len(channels), reg_max, (8, 16, 32)
        proj = torch.linspace(0, reg_max, reg_max + 1).reshape([1, reg_max + 1, 1, 1])
        self.register_buffer("proj_conv", proj, persistent=False)
        for i, c in enumerate(channels):
            setattr(self, f"head{i + 1}", NasDFLHead(c, classes, reg_max))

    def forward(self, feats: tuple[Tensor, ...]) -> object:
        return self.forward_eval(feats)

    def forward_eval(self, feats: tuple[Tensor, ...]) -> object:
        score_list, reg_list, reduced_list = [], [], []
        for i, feat in enumerate(feats):
            b, _, h, w = feat.shape
            reg_distri, cls_logit = getattr(self, f"head{i + 1}")(feat)
            reg_list.append(torch.permute(reg_distri.flatten(2), [0, 2, 1]))
            reg = torch.permute(reg_distri.reshape([-1, 4, self.reg_max + 1, h * w]), [0, 2, 3, 1])
            reduced = F.conv2d(F.softmax(reg, dim=1), weight=self.proj_conv).squeeze(1)
            score_list.append(cls_logit.reshape([b, -1, h * w]))
            reduced_list.append(reduced)
        scores = torch.permute(torch.cat(score_list, dim=-1), [0, 2, 1])
        distances = torch.cat(reduced_list, dim=1)
        points, strides = anchor_points(list(feats))
        low, high = distances.split([2, 2], dim=-1)
        boxes = torch.cat([points.T - low, points.T + high], dim=-1) * strides[:, None]
        return (boxes, scores.sigmoid()), (scores, torch.cat(reg_list, dim=1))


class YoloNAS(nn.Module):
    """Stem and four stages as a backbone that lists its layers, two up stages and two down stages, three heads."""

    def __init__(self, width: int = 32, classes: int = 20):
        super().__init__()
        w = width
        self.stem = QARepVGGBlock(3, w, stride=2, residual=False)
        self.stage1 = NasStage(w, 2 * w, 1, w // 2, False)
        self.stage2 = NasStage(2 * w, 4 * w, 2, w, True)
        self.stage3 = NasStage(4 * w, 8 * w, 2, 2 * w, True)
        self.stage4 = NasStage(8 * w, 12 * w, 1, 4 * w, False)
        self.context_module = SPP(12 * w, 12 * w)
        self._all_layers = ["stem", "stage1", "stage2", "stage3", "stage4", "context_module"]
        self.out_layers = ["stage1", "stage2", "stage3", "context_module"]
        self.neck1 = NasUpStage(12 * w, 8 * w, 4 * w, 3 * w)
        self.neck2 = NasUpStage(3 * w, 4 * w, 2 * w, 2 * w)
        self.down1, self.merge1 = ConvBNAct(2 * w, w, 3, 2), NasCSPLayer(3 * w, 3 * w, w, 2, False)
        self.down2, self.merge2 = ConvBNAct(3 * w, w, 3, 2), NasCSPLayer(4 * w, 4 * w, w, 2, False)
        self.heads = NasHeads([2 * w, 3 * w, 4 * w], classes)

    def backbone(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self._all_layers:
            x = getattr(self, layer)(x)
            if layer in self.out_layers:
                outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> object:
        c2, c3, c4, c5 = self.backbone(x)
        x_n1_inter, x = self.neck1([c5, c4, c3])
        x_n2_inter, p3 = self.neck2([x, c3, c2])
        p4 = self.merge1(torch.cat([self.down1(p3), x_n2_inter], 1))
        p5 = self.merge2(torch.cat([self.down2(p4), x_n1_inter], 1))
        return self.heads((p3, p4, p5))


NETWORKS = [
    Network(
        "yolov9 gelan-c",
        Gelan,
        lambda: (image(2, 3, 96, 128),),
        deploy,
        "the repository's fuse()",
        "rebuilt: WongKinYiu/yolov9",
    ),
    Network(
        "YOLO-NAS",
        YoloNAS,
        lambda: (image(2, 3, 96, 128),),
        deploy,
        "full fusion of the QARepVGG blocks, folded norms",
        "rebuilt: Deci-AI/super-gradients",
    ),
]
SMALL = [
    replace(NETWORKS[0], name="gelan-c, 1/8 wide", make=lambda: Gelan(8), inputs=lambda: (image(1, 3, 64, 64),)),
    replace(NETWORKS[1], name="YOLO-NAS, 1/4 wide", make=lambda: YoloNAS(8), inputs=lambda: (image(1, 3, 64, 64),)),
]
