"""HRNet-W18-small, rebuilt from Wang et al., "Deep High-Resolution Representation Learning" (TPAMI 2020).

Its modules write into the list of feature maps that they get, and lists of layers have gaps where nothing is needed.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from tests.collapse.foreign.folding import fold_in_order
from tests.collapse.foreign.harness import Network, image


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
                if i == j:  # noqa: SIM108
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


NETWORKS = [
    Network(
        "HRNet-W18-small",
        HRNet,
        lambda: (image(2, 3, 64, 96),),
        fold_in_order,
        "none; every convolution with its norm",
        "rebuilt: HRNet/HRNet-Image-Classification",
    ),
]
SMALL = [
    replace(
        NETWORKS[0],
        name="HRNet, small",
        make=lambda: HRNet(4, 8, 1, 10, 4),
        inputs=lambda: (image(2, 3, 64, 64),),
    ),
]
