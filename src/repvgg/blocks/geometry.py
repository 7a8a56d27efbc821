"""The geometry of a convolution: everything but its weights, and new convolutions of that geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.errors import BorderError, UsageError

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Pair: TypeAlias = tuple[int, int]  # height, width
Size: TypeAlias = int | Pair


def pair(size: int | tuple[int, ...]) -> Pair:
    """Return (height, width); a single number stands for both."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution that applies its stride by subsampling the input.

    ``y = W * x[:, :, ::s, ::s] + b``: the same function as ``nn.Conv2d(..., kernel_size=1, stride=s)``, computed as a
    stride-1 convolution of a strided view.
    """

    # Why: oneDNN's weight gradient of a strided 1x1 convolution with few channels writes past its workspace in
    # channels_last on x86 CPUs (uxlfoundation/oneDNN#6035). A stride-1 convolution never reaches that code.

    def __init__(
        self, in_channels: int, out_channels: int, stride: Size = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, groups=groups, bias=bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d uses
        step_h, step_w = self.stride
        if self.stride != (1, 1):
            input = input[:, :, ::step_h, ::step_w]  # noqa: A001
        out: Tensor = F.conv2d(input, self.weight, self.bias, groups=self.groups)
        return out


@dataclass(frozen=True)
class Geometry:
    """Shape parameters of a convolution. Its kernel is (out_channels, in_channels / groups, *kernel_size).

    All pairs are (height, width).

    Raises:
        UsageError: a size is below 1, or the groups do not divide the channels.
    """

    in_channels: int  # C of the input
    out_channels: int  # C of the output
    kernel_size: Pair  # size of the kernel
    stride: Pair  # step between output pixels
    padding: Pair  # pixels added above and below, and to the left and right
    dilation: Pair  # distance between neighbouring taps in pixels
    groups: int  # a divisor of both channel counts
    padding_mode: PaddingMode  # how the image is extended beyond its border

    def __post_init__(self) -> None:
        sizes = (self.in_channels, self.out_channels, self.groups, *self.kernel_size, *self.stride, *self.dilation)
        if min(sizes) < 1 or min(self.padding) < 0:
            raise UsageError(
                f"Channels, groups, kernel size, stride and dilation must be at least 1 and padding at least 0: {self}."
            )
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise UsageError(
                f"{self.groups} groups do not divide {self.in_channels} and {self.out_channels} channels: choose a "
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
        """Build a geometry from numbers that apply to both height and width.

        The default padding keeps the image size at stride 1: ``dilation · (k − 1) / 2``, rounded down.
        """
        kernel, steps = pair(kernel_size), pair(dilation)
        sides = _same_padding(kernel, steps) if padding is None else pair(padding)
        return cls(in_channels, out_channels, kernel, pair(stride), sides, steps, groups, padding_mode)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """Return the geometry of ``conv``.

        Raises:
            UsageError: "same" padding of an even kernel, which is asymmetric.
        """
        kernel, steps = pair(conv.kernel_size), pair(conv.dilation)
        # PyTorch pads "same" with one more pixel at the end if the total is odd; Geometry has one number per side pair.
        if conv.padding == "same" and any(step * (size - 1) % 2 for size, step in zip(kernel, steps, strict=True)):
            raise UsageError("'same' padding of an even kernel is asymmetric: set the padding to a number.")
        named = {"same": _same_padding(kernel, steps), "valid": (0, 0)}
        padding = named[conv.padding] if isinstance(conv.padding, str) else pair(conv.padding)
        return cls(
            conv.in_channels,
            conv.out_channels,
            kernel,
            pair(conv.stride),
            padding,
            steps,
            conv.groups,
            conv.padding_mode,
        )

    @property
    def keeps_shape(self) -> bool:
        """Whether the input can be added to the output: equal channels and stride 1."""
        return self.in_channels == self.out_channels and self.stride == (1, 1)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads a single input channel."""
        return self.groups == self.in_channels

    @property
    def taps(self) -> int:
        """Number of kernel elements per pair of channels, kH · kW."""
        return self.kernel_size[0] * self.kernel_size[1]

    def require_centre(self) -> None:
        """Check that smaller kernels and the identity can be centred on the pixels that this kernel is centred on.

        Raises:
            UsageError: the kernel size is even, so that no padding centres it on a pixel.
            BorderError: the padding is not ``dilation · (k − 1) / 2``.
        """
        height, width = self.kernel_size
        if not (height % 2 and width % 2):
            raise UsageError(
                f"A {height}x{width} kernel has no centre to align the other branches with: use odd sizes."
            )
        # With any other padding, the pixel under the centre of the kernel is not the one that an identity copies.
        centred = _same_padding(self.kernel_size, self.dilation)
        if self.padding != centred:
            raise BorderError(
                f"its padding is {self.padding}, but a 1x1 kernel and an identity are aligned with it only at "
                f"padding {centred}"
            )

    def conv(self) -> nn.Conv2d:
        """Create a convolution of this geometry, without a bias."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            # Subsampling before a padded 1x1 would read other pixels, so only unpadded ones qualify.
            return PointwiseConv2d(self.in_channels, self.out_channels, self.stride, self.groups, bias=False)
        return nn.Conv2d(**vars(self), bias=False)  # the fields have the names of its parameters

    def around(self, kernel_size: Size, dilation: Size | None = None) -> nn.Conv2d:
        """Create a convolution with another kernel size, centred on the same pixels; needs a geometry with a centre."""
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


def _same_padding(kernel: Pair, dilation: Pair) -> Pair:
    return dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2
