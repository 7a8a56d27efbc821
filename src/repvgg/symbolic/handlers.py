"""The layers of convolutional networks in eval mode, as algebra: one short handler for each torch function.

A handler takes the arguments of the function that it speaks for, with a :class:`SymbolicTensor` among them, and
returns the symbolic outcome or raises the reason why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg import algebra
from repvgg.algebra import ConvMap, Kernel
from repvgg.errors import BorderError, MissingStatisticsError, NotLinearError, TrainingModeError
from repvgg.symbolic.operands import constant, numbers, require_spatial
from repvgg.symbolic.tensor import RANK_UNKNOWN, SymbolicTensor, handles


@handles(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    input: Any,  # noqa: A002 - torch's own name
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> SymbolicTensor:
    """Convolution over one to three axes: composition with its kernel."""
    _require_constant(input, weight, bias)
    spatial = weight.dim() - 2
    require_spatial(input, spatial, f"a convolution over {spatial} axes")
    steps = numbers(dilation, spatial)
    outer = ConvMap(
        _kernel(weight, groups, input),
        None if bias is None else constant(bias, input),
        numbers(stride, spatial),
        _conv_padding(padding, weight.shape[2:], steps),
        steps,
        "zeros",
    )
    return _after(input, outer)


@handles(F.linear)
def linear(input: Any, weight: Any, bias: Tensor | None = None) -> SymbolicTensor:  # noqa: A002
    """Linear layer over the last axis: composition with its matrix."""
    _require_constant(input, weight, bias)
    require_spatial(input, 0, "a linear layer")
    if weight.dim() != 2:
        raise NotLinearError("a linear layer with one output takes away an axis")
    outer = ConvMap(_kernel(weight, 1, input), None if bias is None else constant(bias, input))
    return _after(input, outer)


def _after(symbol: SymbolicTensor, outer: ConvMap) -> SymbolicTensor:
    return symbol.like(algebra.compose(symbol.map, outer), "conv", outer)


def _require_constant(symbol: Any, weight: Any, bias: Any) -> None:
    if not isinstance(symbol, SymbolicTensor) or isinstance(weight, SymbolicTensor) or isinstance(bias, SymbolicTensor):
        raise NotLinearError("the kernel of a convolution depends on the image")
    if weight.is_complex():
        raise NotLinearError("the kernel is complex")


def _kernel(weight: Tensor, groups: int, like: SymbolicTensor) -> Kernel:
    return Kernel.of(weight.to(like.device), groups, like.dtype)  # it is converted when it is multiplied out


def _conv_padding(padding: Any, kernel: Sequence[int], dilation: tuple[int, ...]) -> tuple[int, ...]:
    if padding == "valid":
        return (0, 0) * len(dilation)
    if padding == "same":  # an odd total leaves the larger half behind, as torch does
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return tuple(side for total in totals for side in (total // 2, total - total // 2))
    return tuple([side for side in numbers(padding, len(dilation)) for _ in (0, 1)])


@handles(F.batch_norm, torch.batch_norm)
def batch_norm(
    input: SymbolicTensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> SymbolicTensor:
    """Batch norm in eval mode, ``y = (x − μ)·γ/√(σ² + ε) + β``: a scale and a shift for each channel (Eq. 2)."""
    if running_mean is None or running_var is None:
        raise MissingStatisticsError("a batch norm without running statistics normalizes with those of the batch")
    if training:
        raise TrainingModeError("a batch norm is in training mode; call .eval() first")
    if input.layout.rank is None:
        raise NotLinearError(RANK_UNKNOWN)
    if not input.layout.is_channel_axis(1):
        raise NotLinearError(f"a batch norm counts its channels along axis 1, and in {input.layout} they are the last")
    if len(running_var) != input.map.out_channels:
        raise NotLinearError(f"a batch norm of {len(running_var)} channels follows {input.map.out_channels}")
    if input.device.type == "meta":  # geometry only
        factor = offset = constant(running_var, input)
    else:
        factor = (constant(running_var, input) + eps).rsqrt()
        factor = factor if weight is None else factor * constant(weight, input)
        offset = -constant(running_mean, input) * factor
        offset = offset if bias is None else offset + constant(bias, input)
    return input.like(algebra.shift(algebra.scale(input.map, factor), offset), "batch_norm")


@handles(torch.avg_pool1d)
def avg_pool1d(*args: Any, **kwargs: Any) -> SymbolicTensor:
    """Average pooling of sequences."""
    return _average_pool(1, *args, **kwargs)


@handles(F.avg_pool2d)
def avg_pool2d(*args: Any, **kwargs: Any) -> SymbolicTensor:
    """Average pooling of images."""
    return _average_pool(2, *args, **kwargs)


@handles(F.avg_pool3d)
def avg_pool3d(*args: Any, **kwargs: Any) -> SymbolicTensor:
    """Average pooling of volumes."""
    return _average_pool(3, *args, **kwargs)


def _average_pool(
    spatial: int,
    input: SymbolicTensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> SymbolicTensor:
    """A depthwise convolution with equal weights."""
    require_spatial(input, spatial, f"an average pool over {spatial} axes")
    size, sides = numbers(kernel_size, spatial), _conv_padding(padding, (), (1,) * spatial)
    if ceil_mode:
        raise BorderError("an average pool in ceil mode divides by fewer pixels at the border")
    if any(sides) and not count_include_pad:
        raise BorderError("an average pool that does not count the padding divides by fewer pixels at the border")
    channels = input.map.out_channels
    part = 1 / (divisor_override or math.prod(size))
    weight = torch.full((channels, 1, *size), part, dtype=input.dtype, device=input.device)
    steps = numbers(kernel_size if stride is None or stride in ([], ()) else stride, spatial)
    pool = ConvMap.of(weight, None, steps, sides, groups=channels, border="zeros")
    return input.like(algebra.compose(input.map, pool), "avg_pool", pool)


@handles(
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout),
)
def dropout(
    input: SymbolicTensor,  # noqa: A002
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> SymbolicTensor:
    """Dropout in eval mode: nothing."""
    if training and p:
        raise TrainingModeError("a dropout is in training mode; call .eval() first")
    return input
