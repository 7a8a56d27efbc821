"""What convolutional networks do in eval mode, as algebra: one short handler for each torch function.

A handler takes the arguments of the function that it speaks for, with a :class:`SymbolicTensor` among them, and
returns the symbolic outcome or raises the reason why there is none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg import algebra
from repvgg.algebra import ConvMap, Kernel
from repvgg.errors import BorderError, MissingStatisticsError, NotLinearError, TrainingModeError
from repvgg.symbolic.tensor import SymbolicTensor, handles

_T = torch.Tensor


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return int(first), int(rest[0] if rest else first)


def _constant(value: Any, like: SymbolicTensor) -> Tensor:
    """A number or a real tensor, brought to the dtype and device of the algebra."""
    if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
        raise NotLinearError("complex numbers have no place in a convolution of real ones")
    return torch.as_tensor(value).to(device=like.device, dtype=like.dtype)


def _per_channel(value: Any, like: SymbolicTensor) -> Tensor:
    """A constant operand as a vector (O,).

    Raises:
        NotLinearError: it differs from pixel to pixel or from image to image, or would change the channels.
    """
    constant = _constant(value, like)
    channels = like.map.out_channels
    shape = (1,) * (4 - constant.dim()) + tuple(constant.shape)
    if len(shape) != 4 or shape[0] != 1 or shape[2:] != (1, 1) or shape[1] not in (1, channels):
        raise NotLinearError(f"an operand of shape {tuple(constant.shape)} is not one number a channel")
    return constant.reshape(-1).expand(channels)


def _same_source(symbols: Sequence[SymbolicTensor]) -> SymbolicTensor:
    if any(symbol.source is not symbols[0].source for symbol in symbols):
        raise NotLinearError("functions of two different tensors meet here")
    if not symbols[0].source.merge_branches:
        raise NotLinearError("branches are to stay apart")
    return symbols[0]


def _in_place(function: Callable[..., SymbolicTensor]) -> Callable[..., SymbolicTensor]:
    """The in-place form of a handler: the first argument becomes the outcome, for all who hold it."""

    def change(target: Any, *args: Any, **kwargs: Any) -> SymbolicTensor:
        if isinstance(target, Tensor):
            raise NotLinearError("a constant is changed in place")
        if not isinstance(target, SymbolicTensor):  # a number, as in ``total = 0; total += branch(x)``
            return function(target, *args, **kwargs)
        if target.is_source or target.is_view:
            raise NotLinearError("the input, or a view of a tensor, is changed in place")
        target.map = function(target, *args, **kwargs).map
        return target

    return change


@handles(torch.conv2d)
def conv2d(
    input: Any,  # noqa: A002 - torch's own name
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> SymbolicTensor:
    """Convolution: composition with its kernel."""
    if not isinstance(input, SymbolicTensor) or isinstance(weight, SymbolicTensor):
        raise NotLinearError("the kernel of a convolution depends on the image")
    if weight.is_complex():
        raise NotLinearError("the kernel is complex")
    sides = _conv_padding(padding, weight.shape[2:], _pair(dilation))
    offset = None if bias is None else _constant(bias, input)
    kernel = Kernel.of(weight.to(input.device), groups, input.dtype)  # it is converted when it is multiplied out
    outer = ConvMap(kernel, offset, _pair(stride), sides, _pair(dilation), "zeros")
    return input.like(algebra.compose(input.map, outer), "conv", outer)


def _conv_padding(padding: Any, kernel: Sequence[int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # an odd total leaves the larger half behind, as torch does
        height, width = (step * (size - 1) for step, size in zip(dilation, kernel, strict=True))
        return height // 2, height - height // 2, width // 2, width - width // 2
    y, x = _pair(padding)
    return y, y, x, x


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
    if len(running_var) != input.map.out_channels:
        raise NotLinearError(f"a batch norm of {len(running_var)} channels follows {input.map.out_channels}")
    if input.device.type == "meta":  # geometry only
        factor = offset = _constant(running_var, input)
    else:
        factor = (_constant(running_var, input) + eps).rsqrt()
        factor = factor if weight is None else factor * _constant(weight, input)
        offset = -_constant(running_mean, input) * factor
        offset = offset if bias is None else offset + _constant(bias, input)
    return input.like(algebra.shift(algebra.scale(input.map, factor), offset), "batch_norm")


@handles(operator.add, torch.add, _T.add, _T.__add__, _T.__radd__)
def add(left: Any, right: Any, *, alpha: float = 1) -> SymbolicTensor:
    """Sum of two functions of one source, or of one and a constant per channel."""
    if alpha != 1:
        right = right * alpha
    if isinstance(left, SymbolicTensor) and isinstance(right, SymbolicTensor):
        source = _same_source((left, right))
        return source.like(algebra.add(left.map, right.map), "add")
    symbol, constant = (left, right) if isinstance(left, SymbolicTensor) else (right, left)
    if isinstance(constant, (int, float)) and constant == 0:
        return symbol.like(symbol.map, "identity")
    return symbol.like(algebra.shift(symbol.map, _per_channel(constant, symbol)), "shift")


@handles(operator.neg, torch.neg, _T.neg, _T.__neg__)
def negate(input: SymbolicTensor) -> SymbolicTensor:  # noqa: A002
    """``−x``."""
    return multiply(input, -1)


@handles(operator.sub, torch.sub, _T.sub, _T.__sub__)
def subtract(left: Any, right: Any, *, alpha: float = 1) -> SymbolicTensor:
    """``left − alpha·right``."""
    return add(left, right * -alpha)


@handles(_T.__rsub__, torch.rsub)
def reflected_subtract(left: Any, right: Any) -> SymbolicTensor:
    """``right − left``."""
    return subtract(right, left)


@handles(operator.mul, torch.mul, _T.mul, _T.__mul__, _T.__rmul__)
def multiply(left: Any, right: Any) -> SymbolicTensor:
    """Product with a number or a constant per channel."""
    if isinstance(left, SymbolicTensor) and isinstance(right, SymbolicTensor):
        raise NotLinearError("a product of two functions of the image is not linear")
    symbol, constant = (left, right) if isinstance(left, SymbolicTensor) else (right, left)
    return symbol.like(algebra.scale(symbol.map, _per_channel(constant, symbol)), "scale")


@handles(operator.truediv, torch.div, torch.true_divide, _T.div, _T.true_divide, _T.__truediv__)
def divide(left: Any, right: Any, *, rounding_mode: str | None = None) -> SymbolicTensor:
    """Quotient by a number or a constant per channel."""
    if isinstance(right, SymbolicTensor) or rounding_mode is not None:
        raise NotLinearError("a division by the image, or a rounded one, is not linear")
    return multiply(left, 1 / _constant(right, left))


for _function, _names in {
    add: (operator.iadd, _T.add_, _T.__iadd__),
    subtract: (operator.isub, _T.sub_, _T.__isub__),
    multiply: (operator.imul, _T.mul_, _T.__imul__),
    divide: (operator.itruediv, _T.div_, _T.__itruediv__),
}.items():
    handles(*_names)(_in_place(_function))


@handles(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0) -> SymbolicTensor:
    """Concatenation along the channels of functions of one source."""
    if dim not in (1, -3) or not all(isinstance(part, SymbolicTensor) for part in tensors):
        raise NotLinearError("a concatenation along pixels or images, or with constants, is not a convolution")
    return _same_source(tensors).like(algebra.concatenate([part.map for part in tensors]), "cat")


@handles(F.pad, torch.constant_pad_nd)
def pad(
    input: SymbolicTensor,  # noqa: A002
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> SymbolicTensor:
    """Padding or cropping of height and width."""
    sides = [int(side) for side in pad] + [0] * (4 - len(pad))
    if any(sides[4:]):
        raise NotLinearError("a padding of channels or images is not a convolution")
    if mode == "constant" and value not in (None, 0):
        raise BorderError(f"the image is padded with {value}, and a convolution pads with 0")
    if mode != "constant" and min(sides) < 0 < max(sides):
        raise BorderError(f"a {mode} padding that crops as well is not a convolution")
    border: Any = "zeros" if mode == "constant" else mode
    left, right, top, bottom = sides[:4]
    axes = algebra.Axis(before=top, after=bottom), algebra.Axis(before=left, after=right)
    return input.like(algebra.resample(input.map, axes, border), "pad")


@handles(F.avg_pool2d, torch._C._nn.avg_pool2d)
def avg_pool2d(
    input: SymbolicTensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> SymbolicTensor:
    """Average pooling: a depthwise convolution with equal weights."""
    (height, width), (y, x) = _pair(kernel_size), _pair(padding)
    if ceil_mode:
        raise BorderError("an average pool in ceil mode divides by fewer pixels at the border")
    if (y or x) and not count_include_pad:
        raise BorderError("an average pool that does not count the padding divides by fewer pixels at the border")
    channels = input.map.out_channels
    part = 1 / (divisor_override or height * width)
    weight = torch.full((channels, 1, height, width), part, dtype=input.dtype, device=input.device)
    steps = _pair(kernel_size if stride is None or stride == [] else stride)
    pool = ConvMap.of(weight, None, steps, (y, y, x, x), groups=channels, border="zeros")
    return input.like(algebra.compose(input.map, pool), "avg_pool", pool)


@handles(_T.contiguous, _T.clone, torch.clone)
def unchanged(input: SymbolicTensor, *_: Any, memory_format: Any = None) -> SymbolicTensor:  # noqa: A002
    """Functions that change the layout in memory and no value; the outcome may be the same tensor, or another one."""
    input.is_view = True
    return input.like(input.map, "identity", is_view=True)


@handles(F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout, torch.feature_dropout)
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
