"""A convolution as a value: what it computes, where it reads, and what it assumes beyond the border.

Letters in names: O output channels, I input channels per group, H and W the kernel's height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.algebra.axis import Axis
from repvgg.algebra.kernel import Kernel
from repvgg.errors import UsageError

Border: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Pair: TypeAlias = tuple[int, int]
Sides: TypeAlias = tuple[int, int, int, int]
BORDERS: tuple[Border, ...] = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True, eq=False)
class ConvMap:
    """The affine, shift-invariant map ``y[o, p] = b[o] + Σ_{i,k} W[o, i, k] · x[i, stride·p + dilation·k − padding]``.

    Attributes:
        kernel: W as a sum not yet multiplied out; :attr:`weight` is it as a tensor.
        bias: b, shape (O,), or None for no bias at all.
        stride: (height, width).
        padding: (top, bottom, left, right) in pixels; negative numbers crop.
        dilation: (height, width).
        border: how the input goes on beyond its border; None iff nothing beyond it is ever read.

    Raises:
        UsageError: the parts do not fit each other.
    """

    kernel: Kernel
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    padding: Sides = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    border: Border | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or self.out_channels % self.groups:
            raise UsageError(f"{self.out_channels} output channels do not split into {self.groups} groups.")
        if self.bias is not None and self.bias.shape != (self.out_channels,):
            raise UsageError(f"A bias for {self.out_channels} channels cannot have shape {tuple(self.bias.shape)}.")
        if min(*self.stride, *self.dilation) < 1:
            raise UsageError(f"Stride and dilation are at least 1, not {self.stride} and {self.dilation}.")
        pads = any(side > 0 for side in self.padding)
        if pads and self.border not in BORDERS:
            raise UsageError(f"A padded map needs a border from {BORDERS}, not {self.border!r}.")
        if not pads:
            object.__setattr__(self, "border", None)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Pair = (1, 1),
        padding: Sides = (0, 0, 0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        border: Border | None = None,
    ) -> ConvMap:
        """A convolution with kernel ``weight`` (OIHW), computed with in the dtype of the bias, else of the kernel."""
        if weight.dim() != 4:
            raise UsageError(f"A kernel has shape OIHW, not {tuple(weight.shape)}.")
        dtype = weight.dtype if bias is None else bias.dtype
        return cls(Kernel.of(weight, groups, dtype), bias, stride, padding, dilation, border)

    @classmethod
    def identity(
        cls, channels: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> ConvMap:
        """``y = x`` on ``channels`` channels; it is never multiplied out."""
        ones = torch.ones(channels, 1, 1, 1, dtype=dtype, device=device)
        return cls(Kernel.of(ones, channels, unit=True))

    @classmethod
    def from_axes(cls, kernel: Kernel, bias: Tensor | None, axes: tuple[Axis, Axis], border: Border | None) -> ConvMap:
        """A map whose geometry is given axis by axis (height, width); the inverse of :attr:`axes`."""
        y, x = axes
        strides, dilations = (y.stride, x.stride), (y.dilation, x.dilation)
        return cls(kernel, bias, strides, (y.before, y.after, x.before, x.after), dilations, border)

    @property
    def weight(self) -> Tensor:
        """The kernel W as a tensor, shape OIHW, I being the input channels of one group."""
        return self.kernel.dense()

    @property
    def groups(self) -> int:
        """Number of groups; channel o reads the inputs of group ``o // (O / groups)`` only."""
        return self.kernel.groups

    @property
    def dtype(self) -> torch.dtype:
        """What the map is computed in."""
        return self.kernel.dtype

    @property
    def device(self) -> torch.device:
        """Where the map is computed."""
        return self.kernel.device

    @property
    def out_channels(self) -> int:
        """O."""
        return self.kernel.shape[0]

    @property
    def in_channels(self) -> int:
        """Input channels, of all groups together."""
        return self.kernel.shape[1] * self.groups

    @property
    def kernel_size(self) -> Pair:
        """(height, width) of the kernel, without dilation."""
        return self.kernel.shape[2:]

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The geometry along the height and along the width."""
        top, bottom, left, right = self.padding
        (height, width), (sy, sx), (dy, dx) = self.kernel_size, self.stride, self.dilation
        return Axis(height, sy, dy, top, bottom), Axis(width, sx, dx, left, right)

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel is a function of the input pixel at its own place."""
        return self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0, 0, 0)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads the input channel of its own number and no other."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds per input pixel, borders aside: ``O · I · H · W / (stride_h · stride_w)``."""
        return self.kernel.numel() / (self.stride[0] * self.stride[1])

    def bias_or_zeros(self) -> Tensor:
        """The bias, shape (O,), zeros where there is none."""
        if self.bias is not None:
            return self.bias
        return torch.zeros(self.out_channels, dtype=self.dtype, device=self.device)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ConvMap:
        """The same map, computed in ``dtype`` on ``device``."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return replace(self, kernel=self.kernel.to(device, dtype), bias=bias)

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        """Evaluate the map on images (N, C, H, W)."""
        top, bottom, left, right = self.padding
        if self.border is not None:  # pad first, crop afterwards: what is cropped still counts as image
            mode = "constant" if self.border == "zeros" else self.border
            x_NCHW = F.pad(x_NCHW, [max(side, 0) for side in (left, right, top, bottom)], mode=mode)
        x_NCHW = F.pad(x_NCHW, [min(side, 0) for side in (left, right, top, bottom)])
        return F.conv2d(x_NCHW, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def __repr__(self) -> str:
        """One line: channels, kernel and whatever is not the default."""
        height, width = self.kernel_size
        parts = [f"{self.in_channels}→{self.out_channels}", f"{height}x{width}"]
        parts += [f"stride={self.stride}"] if self.stride != (1, 1) else []
        parts += [f"padding={self.padding}"] if any(self.padding) else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1, 1) else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"border={self.border}"] if self.border not in (None, "zeros") else []
        return f"ConvMap({', '.join(parts)}{', bias' if self.bias is not None else ''})"
