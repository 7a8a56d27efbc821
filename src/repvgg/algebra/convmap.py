"""A convolution over n axes as a value: what it computes, what it reads, and what it assumes beyond the border.

n is 0 for a linear map on vectors (N, C), 1 for sequences (N, C, L), 2 for images (N, C, H, W), and 3 for volumes
(N, C, D, H, W). Per-axis values are in the order of the axes: depth, height, width.

Letters in names: O output channels, I input channels per group, K the n sizes of the kernel, X the n sizes of an input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.algebra.axis import Axis
from repvgg.algebra.kernel import Kernel
from repvgg.errors import UsageError

Border: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Ints: TypeAlias = tuple[int, ...]
BORDERS: tuple[Border, ...] = ("zeros", "reflect", "replicate", "circular")
_CONVOLUTIONS: dict[int, Callable[..., Any]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class ConvMap:
    """The affine, shift-invariant map ``y[o, p] = b[o] + Σ_{i,k} W[o, i, k] · x[i, stride·p + dilation·k − padding]``.

    With n = 0 there is no p and no k: ``y[o] = b[o] + Σ_i W[o, i] · x[i]``.

    Attributes:
        kernel: W as a sum that is not yet multiplied out; :attr:`weight` is the tensor.
        bias: b, shape (O,), or None for no bias at all.
        stride: one number per axis; default 1.
        padding: (before, after) per axis in pixels, as in (top, bottom, left, right); negative numbers crop; default
            0.
        dilation: one number per axis; default 1.
        border: how the input continues beyond its border; None iff nothing beyond it is ever read.

    Raises:
        UsageError: the attributes contradict each other.
    """

    kernel: Kernel
    bias: Tensor | None = None
    stride: Ints = ()
    padding: Ints = ()
    dilation: Ints = ()
    border: Border | None = None

    def __post_init__(self) -> None:
        n = self.spatial
        if not len(self.stride) == len(self.dilation) == n == len(self.padding) / 2:
            self._fill_in(n)
        if min(*self.stride, *self.dilation, 1, 1) < 1:
            raise UsageError(f"Stride and dilation must be at least 1, got {self.stride} and {self.dilation}.")
        if self.groups < 1 or self.out_channels % self.groups:
            raise UsageError(f"{self.out_channels} output channels do not split into {self.groups} groups.")
        if self.bias is not None and self.bias.shape != (self.out_channels,):
            raise UsageError(f"A bias for {self.out_channels} channels cannot have shape {tuple(self.bias.shape)}.")
        pads = max(self.padding, default=0) > 0
        if pads and self.border not in BORDERS:
            raise UsageError(f"A padded map needs a border from {BORDERS}, got {self.border!r}.")
        # Without padding nothing beyond the border matters, and any kind of padding may follow.
        if not pads:
            object.__setattr__(self, "border", None)

    def _fill_in(self, n: int) -> None:
        for name, count, default in (("stride", n, 1), ("dilation", n, 1), ("padding", 2 * n, 0)):
            numbers = getattr(self, name)
            if not numbers:
                object.__setattr__(self, name, (default,) * count)
            elif len(numbers) != count:
                raise UsageError(f"A map over {n} axes needs {count} numbers for its {name}, got {numbers}.")

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = (),
        padding: Ints = (),
        dilation: Ints = (),
        groups: int = 1,
        border: Border | None = None,
    ) -> ConvMap:
        """Return a convolution with kernel ``weight`` (O, I, *K), in the dtype of the bias, else of the kernel."""
        if not 2 <= weight.dim() <= 5:
            raise UsageError(f"A kernel must have shape OI, OIW, OIHW or OIDHW, got {tuple(weight.shape)}.")
        dtype = weight.dtype if bias is None else bias.dtype
        return cls(Kernel.of(weight, groups, dtype), bias, stride, padding, dilation, border)

    @classmethod
    def identity(
        cls,
        channels: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        spatial: int = 2,
    ) -> ConvMap:
        """Return ``y = x`` on ``channels`` channels and ``spatial`` axes; it is never multiplied out."""
        # On the meta device, which has no values, torch.empty is much faster.
        make = torch.empty if torch.device(device or "cpu").type == "meta" else torch.ones
        ones = make((channels, 1, *(1,) * spatial), dtype=dtype, device=device)
        return cls(Kernel.of(ones, channels, unit=True))

    @classmethod
    def from_axes(cls, kernel: Kernel, bias: Tensor | None, axes: tuple[Axis, ...], border: Border | None) -> ConvMap:
        """Return a map whose geometry is given per axis; the inverse of :attr:`axes`."""
        # tuple([...]) because a list comprehension is faster than a generator, and this runs for every map.
        strides, dilations = tuple([axis.stride for axis in axes]), tuple([axis.dilation for axis in axes])
        sides = tuple([side for axis in axes for side in (axis.before, axis.after)])
        return cls(kernel, bias, strides, sides, dilations, border)

    @property
    def weight(self) -> Tensor:
        """The kernel W as a tensor, shape (O, I, *K), I being the input channels of one group."""
        return self.kernel.dense()

    @property
    def spatial(self) -> int:
        """n, the number of axes of the kernel."""
        return len(self.kernel.shape) - 2

    @property
    def groups(self) -> int:
        """Number of groups; channel o reads the inputs of group ``o // (O / groups)`` only."""
        return self.kernel.groups

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the map is computed in."""
        return self.kernel.dtype

    @property
    def device(self) -> torch.device:
        """The device that the map is computed on."""
        return self.kernel.device

    @property
    def out_channels(self) -> int:
        """Output channels O."""
        return self.kernel.shape[0]

    @property
    def in_channels(self) -> int:
        """Input channels, of all groups together."""
        return self.kernel.shape[1] * self.groups

    @property
    def kernel_size(self) -> Ints:
        """K, the sizes of the kernel along the axes, without dilation."""
        return self.kernel.shape[2:]

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The geometry along each axis."""
        sides = self.padding
        return tuple(map(Axis, self.kernel_size, self.stride, self.dilation, sides[::2], sides[1::2]))

    @property
    def is_pointwise(self) -> bool:
        """Whether each output pixel is a function of the input pixel at the same position."""
        return max(*self.kernel_size, *self.stride, 1, 1) == 1 and not any(self.padding)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads the input channel of the same index and no other."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds per input pixel, borders aside: ``O · I · Π K / Π stride``."""
        return self.kernel.numel() / math.prod(self.stride)

    def outputs_per_input(self, sizes: Ints | None = None) -> float:
        """Return output pixels per input pixel at the input ``sizes``, or borders aside."""
        if sizes is None:
            return 1 / math.prod(self.stride)
        return math.prod(axis.output_size(n) / n for axis, n in zip(self.axes, sizes, strict=True))

    def bias_or_zeros(self) -> Tensor:
        """Return the bias, shape (O,); zeros if there is none."""
        if self.bias is not None:
            return self.bias
        return torch.zeros(self.out_channels, dtype=self.dtype, device=self.device)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ConvMap:
        """Return the same map, computed in ``dtype`` on ``device``."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return replace(self, kernel=self.kernel.to(device, dtype), bias=bias)

    def __call__(self, x_NCX: Tensor) -> Tensor:
        """Evaluate the map on inputs (N, C, *X); with n = 0 on (..., C)."""
        if not self.spatial:
            return _linear(x_NCX, self.weight, self.bias, self.groups)
        # F.pad counts from the last axis.
        sides = [side for axis in reversed(self.axes) for side in (axis.before, axis.after)]
        if self.border is not None:  # pad before cropping: a reflection reads pixels that are cropped
            mode = "constant" if self.border == "zeros" else self.border
            x_NCX = F.pad(x_NCX, [max(side, 0) for side in sides], mode=mode)
        x_NCX = F.pad(x_NCX, [min(side, 0) for side in sides])
        function = _CONVOLUTIONS[self.spatial]
        y_NCX: Tensor = function(x_NCX, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return y_NCX

    def __repr__(self) -> str:
        """Return one line: channels, kernel, and what differs from the defaults."""
        parts = [f"{self.in_channels}→{self.out_channels}", "x".join(map(str, self.kernel_size)) or "linear"]
        parts += [f"stride={self.stride}"] if any(step > 1 for step in self.stride) else []
        parts += [f"padding={self.padding}"] if any(self.padding) else []
        parts += [f"dilation={self.dilation}"] if any(step > 1 for step in self.dilation) else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"border={self.border}"] if self.border not in (None, "zeros") else []
        return f"ConvMap({', '.join(parts)}{', bias' if self.bias is not None else ''})"


def _linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """``x @ W.T + b`` over the last axis of x (..., C), each group of outputs on its own group of inputs."""
    if groups == 1:
        return F.linear(x, weight_OI, bias)
    parts = x.reshape(*x.shape[:-1], groups, 1, -1)  # (..., g, 1, I)
    y = torch.matmul(parts, weight_OI.view(groups, -1, weight_OI.shape[1]).mT).flatten(-3)  # of (..., g, 1, O/g)
    return y if bias is None else y + bias
