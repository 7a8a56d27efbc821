"""Where a block stands: the geometry of the one convolution that it is to be equal to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from repvgg.blocks.basic import PointwiseConv2d, Size
from repvgg.errors import BorderError, UsageError

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Pair: TypeAlias = tuple[int, int]


def pair(size: Size) -> Pair:
    """Height and width, where one number stands for both."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Geometry:
    """All of a convolution but its numbers. A kernel is (out_channels, in_channels / groups, *kernel_size).

    Attributes:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: height and width.
        stride: the same way round, as all pairs.
        padding: pixels above and below, and to the left and right.
        dilation: pixels from tap to tap.
        groups: a divisor of both numbers of channels.
        padding_mode: how the image goes on beyond its border.

    Raises:
        UsageError: a size below 1, or groups that do not divide the channels.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    padding_mode: PaddingMode

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.groups, *self.kernel_size, *self.stride, *self.dilation)
        if min(sizes) < 1 or min(self.padding) < 0:
            raise UsageError(f"Channels, groups, kernel, stride and dilation are at least 1, unlike those of {self}.")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise UsageError(
                f"{self.groups} groups do not divide {self.in_channels} and {self.out_channels} channels: take a "
                "common divisor."
            )

    @classmethod
    def square(
        cls,
        in_channels: int,
        out_channels: int,
        stride: Size = 1,
        groups: int = 1,
        *,
        kernel_size: Size = 3,
        dilation: Size = 1,
        padding: Size | None = None,
        padding_mode: PaddingMode = "zeros",
    ) -> Geometry:
        """A geometry from numbers that hold for height and width alike; padded to keep the size, unless told how.

        The padding is ``dilation · (k − 1) / 2`` then, rounded down.
        """
        kernel, steps = pair(kernel_size), pair(dilation)
        sides = _centred(kernel, steps) if padding is None else pair(padding)
        return cls(in_channels, out_channels, kernel, pair(stride), sides, steps, groups, padding_mode)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """The geometry of a convolution.

        Raises:
            UsageError: "same" padding of an even kernel, which is not the same on both sides.
        """
        kernel, steps = _two(conv.kernel_size), _two(conv.dilation)
        if conv.padding == "same" and any(step * (size - 1) % 2 for size, step in zip(kernel, steps, strict=True)):
            raise UsageError("'same' padding of an even kernel is not the same on both sides: pad with a number.")
        named = {"same": _centred(kernel, steps), "valid": (0, 0)}
        padding = named[conv.padding] if isinstance(conv.padding, str) else _two(conv.padding)
        return cls(
            conv.in_channels,
            conv.out_channels,
            kernel,
            _two(conv.stride),
            padding,
            steps,
            conv.groups,
            conv.padding_mode,
        )

    @property
    def keeps_shape(self) -> bool:
        """Whether the input can be added to the output: as many channels, and as many pixels around a centre."""
        return self.in_channels == self.out_channels and self.stride == (1, 1)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads one input channel."""
        return self.groups == self.in_channels

    @property
    def taps(self) -> int:
        """Numbers of the kernel for each pair of channels."""
        return self.kernel_size[0] * self.kernel_size[1]

    def require_centre(self) -> None:
        """Check that smaller kernels and the identity can read around the same pixels.

        Raises:
            UsageError: the kernel size is even: no padding puts its centre on a pixel.
            BorderError: the padding is not ``dilation · (k − 1) / 2``.
        """
        height, width = self.kernel_size
        if not (height % 2 and width % 2):
            raise UsageError(f"A kernel of {height}x{width} has no centre for the other branches: take an odd size.")
        centred = _centred(self.kernel_size, self.dilation)
        if self.padding != centred:
            raise BorderError(
                f"its padding is {self.padding}, and only with {centred} do a 1x1 and an identity read around the "
                "same pixels"
            )

    def conv(self) -> nn.Conv2d:
        """A fresh convolution of this geometry, without a bias."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return PointwiseConv2d(self.in_channels, self.out_channels, self.stride, self.groups, bias=False)
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            False,
            self.padding_mode,
        )

    def around(self, kernel_size: Size, dilation: Size | None = None) -> nn.Conv2d:
        """A fresh convolution with another kernel around the same pixels, for a geometry that has a centre."""
        other = Geometry.square(
            self.in_channels,
            self.out_channels,
            self.stride,
            self.groups,
            kernel_size=kernel_size,
            dilation=self.dilation if dilation is None else dilation,
            padding_mode=self.padding_mode,
        )
        return other.conv()


def _centred(kernel: Pair, steps: Pair) -> Pair:
    return steps[0] * (kernel[0] - 1) // 2, steps[1] * (kernel[1] - 1) // 2


def _two(value: tuple[int, ...]) -> Pair:
    first, second = value
    return first, second
