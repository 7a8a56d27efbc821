"""The graph that the frontend produces and the planner consumes: a chain of layers, and the shapes between them.

Layers are frozen values that hold NumPy arrays: nothing in here refers to an ``nn.Module`` or to a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from repvgg.errors import UnsupportedError

Floats: TypeAlias = NDArray[np.float32]
Pair: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int, int, int, int]  # (N, C, H, W)


def pair(value: int | Sequence[int]) -> Pair:
    """Expand a number to both axes."""
    first, second = (value, value) if isinstance(value, int) else (*value, *value)[:2]
    return int(first), int(second)


@final
@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of a convolution in pixels; pairs are (vertical, horizontal)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def output_size(self, size: Pair) -> Pair:
        """Compute the height and width of the output for an input of ``size``; below 1 if there is no output."""
        axes = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((length + 2 * pad - step * (k - 1) - 1) // stride + 1 for length, k, stride, pad, step in axes)
        return height, width


@final
@dataclass(frozen=True, eq=False)
class Conv:
    """``y = conv(x) + bias`` with zero padding, and an optional fused ReLU."""

    name: str  # of the layer in the model, for messages
    weight: Floats  # OIHW, where I is the number of channels of one group
    bias: Floats  # (O,)
    geometry: ConvGeometry
    relu: bool = False


@final
@dataclass(frozen=True, eq=False)
class Gate:
    """Squeeze-and-excitation: ``y = x · sigmoid(up · ReLU(down · mean_HW(x) + b_down) + b_up)``, optional ReLU."""

    name: str  # of the first convolution of the gate in the model, for messages
    down: Floats  # (hidden, C)
    down_bias: Floats  # (hidden,)
    up: Floats  # (C, hidden)
    up_bias: Floats  # (C,)
    relu: bool = False


@final
@dataclass(frozen=True)
class Pool:
    """Global average pooling: (N, C, H, W) to (N, C)."""

    name: str


@final
@dataclass(frozen=True, eq=False)
class Linear:
    """``y = weight · x + bias`` on (N, C), and an optional fused ReLU; ``weight`` is (O, C)."""

    name: str
    weight: Floats
    bias: Floats
    relu: bool = False


Layer: TypeAlias = Conv | Gate | Pool | Linear


@final
@dataclass(frozen=True)
class FeatureShape:
    """The shape of a value between two layers, without the batch; vectors have the size (1, 1)."""

    channels: int
    size: Pair


def infer_shapes(layers: Sequence[Layer], input_shape: Shape) -> tuple[FeatureShape, ...]:
    """Compute the input shape of every layer, followed by the output shape of the network.

    Raises:
        UnsupportedError: the channels of a layer do not match its input, or a convolution has no output; the message
            names the layer.
    """
    shape = FeatureShape(input_shape[1], input_shape[2:])
    shapes = [shape]
    for layer in layers:
        shape = _output_shape(layer, shape)
        shapes.append(shape)
    return tuple(shapes)


def _output_shape(layer: Layer, shape: FeatureShape) -> FeatureShape:
    match layer:
        case Conv():
            geometry = layer.geometry
            _check_channels(layer.name, layer.weight.shape[1] * geometry.groups, shape)
            size = geometry.output_size(shape.size)
            if min(size) < 1:
                height, width = shape.size
                raise UnsupportedError(
                    f"{layer.name!r} has no output for feature maps of {height}x{width}: pass larger images."
                )
            return FeatureShape(layer.weight.shape[0], size)
        case Gate():
            _check_channels(layer.name, layer.down.shape[1], shape)
            _check_channels(layer.name, layer.up.shape[0], shape)
            return shape
        case Linear():
            _check_channels(layer.name, layer.weight.shape[1], shape)
            return FeatureShape(layer.weight.shape[0], (1, 1))
        case Pool():
            return FeatureShape(shape.channels, (1, 1))


def _check_channels(name: str, channels: int, shape: FeatureShape) -> None:
    if channels != shape.channels:
        raise UnsupportedError(
            f"{name!r} expects {channels} channels but receives {shape.channels}: "
            "pass an input_shape (N, C, H, W) whose C is that of the network."
        )
