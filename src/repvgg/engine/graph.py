"""What a plain network is to the engine: a chain of five kinds of layers, as frozen values. No ``nn.Module`` here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = tuple[int, int]


@final
@dataclass(frozen=True)
class ConvGeometry:
    """Where a convolution reads, in pixels; each pair is (vertical, horizontal)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def output_size(self, size: Pair) -> Pair:
        """Height and width of what comes out of an image of ``size``; below 1 where nothing does."""
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((length + 2 * pad - step * (k - 1) - 1) // stride + 1 for length, k, stride, pad, step in axes)
        return height, width


@final
@dataclass(frozen=True, eq=False)
class Conv:
    """``y = conv(x) + bias``, and a ReLU if asked; zeros lie beyond the border.

    Attributes:
        name: of the layer in the model, for messages.
        weight: the kernel (O, I, height, width), I being the channels of one group.
        bias: (O,).
        geometry: where it reads.
        relu: whether a ReLU follows.
    """

    name: str
    weight: Floats
    bias: Floats
    geometry: ConvGeometry
    relu: bool = False


@final
@dataclass(frozen=True, eq=False)
class Gate:
    """Squeeze-and-excitation: ``y = x · sigmoid(up · ReLU(down · mean_HW(x) + b_down) + b_up)``, then a ReLU if asked.

    Attributes:
        name: of its first convolution in the model.
        down: matrix (hidden, C).
        down_bias: (hidden,).
        up: matrix (C, hidden).
        up_bias: (C,).
        relu: whether a ReLU follows.
    """

    name: str
    down: Floats
    down_bias: Floats
    up: Floats
    up_bias: Floats
    relu: bool = False


@final
@dataclass(frozen=True)
class Pool:
    """The mean over all pixels of each channel: (N, C, H, W) to (N, C)."""

    name: str


@final
@dataclass(frozen=True, eq=False)
class Linear:
    """``y = weight · x + bias`` on (N, C), and a ReLU if asked; ``weight`` is (O, C)."""

    name: str
    weight: Floats
    bias: Floats
    relu: bool = False


Layer: TypeAlias = Conv | Gate | Pool | Linear
