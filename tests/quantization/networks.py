"""Small plain networks with the structures that equalization has to follow."""

import torch
import torch.nn.functional as F
from torch import nn


def random_(module, seed=0):
    """Weights of channels that differ in scale, and biases."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
            if parameter.ndim == 4:
                scales = torch.exp(torch.randn(len(parameter), generator=draw))
                parameter *= scales.reshape(-1, 1, 1, 1)
    return module.eval()


class Chain(nn.Module):
    """Dilated, grouped, strided and depthwise convolutions, then a linear layer."""

    def __init__(self, channels=8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(2 * channels, 2 * channels, 3, 2, 1, groups=2 * channels),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * channels, 2 * channels, 1),
            nn.PReLU(2 * channels),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x):
        return self.head(self.body(x))


class Residual(nn.Module):
    """A residual addition, a squeeze-excite gate, a concatenation and a channel shuffle."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.branch = nn.Conv2d(channels, channels, 3, padding=1)
        self.squeeze = nn.Conv2d(channels, channels // 2, 1)
        self.excite = nn.Conv2d(channels // 2, channels, 1)
        self.left = nn.Conv2d(channels, channels, 1)
        self.right = nn.Conv2d(channels, channels, 1)
        self.head = nn.Conv2d(2 * channels, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.branch(x)
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = (x * gate).relu()
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        n, c, h, w = both.shape
        shuffled = both.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(shuffled)


class Smooth(nn.Module):
    """GELU and a clipped ReLU are not positively homogeneous; a layer is called twice."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.twice = nn.Conv2d(channels, channels, 3, padding=1)
        self.third = nn.Conv2d(channels, channels, 1)
        self.head = nn.Conv2d(channels, 5, 1)

    def forward(self, x):
        x = nn.functional.gelu(self.first(x))
        x = nn.functional.relu6(self.second(x))
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(self.third(x).relu())


class Constants(nn.Module):
    """Parameters are combined with each other and stand first in a sum; a pool reads pixels of different scales."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.third = nn.Conv2d(channels, channels, 1)
        self.head = nn.Conv2d(channels, 5, 1)
        self.gain = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)
        self.position = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x):
        x = F.relu(self.first(x) * (self.gain * self.gain))
        x = F.adaptive_max_pool2d(self.position + self.second(x), (7, 7))
        x = F.max_pool2d(F.pixel_shuffle(self.third(x), 2), 3, 1, 1)
        x = x.unflatten(2, (7, 2)).unflatten(4, (7, 2))
        return self.head(x.permute(0, 1, 3, 5, 2, 4).flatten(1, 3))


NETWORKS = {"chain": Chain, "residual": Residual, "smooth": Smooth, "constants": Constants}


def images(count=8, side=21, seed=3):
    return torch.randn(count, 3, side, side + 2, generator=torch.Generator().manual_seed(seed))
