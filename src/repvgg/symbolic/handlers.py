"""The layers of convolutional networks in eval mode, as algebra: one short handler for each torch function.

A handler takes the arguments of the function that it implements, with a :class:`SymbolicTensor` among them, and returns
the symbolic result, or raises the reason why there is none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg import algebra
from repvgg._arguments import per_axis
from repvgg.algebra import ConvMap, Kernel
from repvgg.errors import BorderError, MissingStatisticsError, NotLinearError, TrainingModeError
from repvgg.symbolic.layout import UnknownSize
from repvgg.symbolic.tensor import SymbolicTensor, handles

_T = torch.Tensor


def constant(value: Any, like: SymbolicTensor) -> Tensor:
    """Return a number or a real tensor in the dtype and on the device of the algebra."""
    if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
        raise NotLinearError("a complex operand does not give a convolution of real numbers")
    if isinstance(value, UnknownSize):
        raise NotLinearError("a number depends on the size of the image")
    if not isinstance(value, Tensor):  # by way of the default dtype, a number would lose digits
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.to(device=like.device, dtype=like.dtype)


def per_channel(value: Any, like: SymbolicTensor, channels: int | None = None) -> Tensor:
    """Return a constant operand as a vector (O,); raise NotLinearError if it is not one number per channel.

    ``channels`` is O if the operand is for a part of the channels of ``like`` only.
    """
    # Broadcasting aligns trailing axes, so the channel axis is counted from the end.
    operand = constant(value, like)
    channels, rank = channels or like.map.out_channels, like.layout.rank
    shape = tuple(operand.shape)
    place = len(shape) + like.layout.axis  # negative if the operand has no channel axis
    elsewhere = shape[: max(place, 0)] + shape[place + 1 :]
    fits = place < 0 or shape[place] in (1, channels)
    if not fits or any(size != 1 for size in elsewhere) or len(shape) > (1 if rank is None else rank):
        raise NotLinearError(f"an operand of shape {shape} is not one number per channel of {like.layout}")
    return operand.reshape(-1).expand(channels)


def same_source(symbols: Sequence[SymbolicTensor]) -> SymbolicTensor:
    """Return the first one if ``symbols`` are functions of one source and may merge; else raise NotLinearError."""
    first = symbols[0]
    if any(symbol.source is not first.source for symbol in symbols):
        raise NotLinearError("it combines functions of two different tensors")
    # fold_batch_norms merges chains only; the sum then ends the region.
    if not first.source.merge_branches:
        raise NotLinearError("branches stay unmerged here: only batch norms are folded")
    if any(symbol.arrangement != first.arrangement for symbol in symbols):
        raise NotLinearError("it combines tensors of different layouts")
    return first


def require_spatial(symbol: SymbolicTensor, spatial: int, name: str) -> None:
    """Raise NotLinearError if the function ``name`` over ``spatial`` axes would take another axis as the channels."""
    if symbol.layout.spatial != spatial:
        raise NotLinearError(f"{name} on a tensor {symbol.layout} takes another axis for the channels")


@handles(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    input: Any,
    weight: Any,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> SymbolicTensor:
    """Compose with the kernel of a convolution over one to three axes."""
    _require_constant(input, weight, bias)
    spatial = weight.dim() - 2
    require_spatial(input, spatial, f"a convolution over {spatial} axes")
    steps = per_axis(dilation, spatial)
    sides = _conv_padding(padding, weight.shape[2:], steps)
    return _after(input, weight, bias, groups, per_axis(stride, spatial), sides, steps, "zeros")


@handles(F.linear)
def linear(input: Any, weight: Any, bias: Tensor | None = None) -> SymbolicTensor:
    """Compose with the matrix of a linear layer over the last axis."""
    _require_constant(input, weight, bias)
    require_spatial(input, 0, "a linear layer")
    if weight.dim() != 2:
        raise NotLinearError("a linear layer with a vector as its weight removes an axis")
    return _after(input, weight, bias)


@handles(operator.matmul, torch.matmul, _T.matmul, _T.__matmul__)
def matmul(input: Any, other: Any) -> SymbolicTensor:
    """Compose with a matrix (I, O) on the right: a linear layer without a bias."""
    if not isinstance(other, Tensor) or other.dim() != 2:
        raise NotLinearError("only a product of rows with one constant matrix on its right is a linear layer")
    return linear(input, other.mT)


@handles(torch.addmm, _T.addmm)
def addmm(bias: Any, input: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> SymbolicTensor:
    """Return ``beta·bias + alpha·(input @ weight)``."""
    return add(multiply(matmul(input, weight), alpha), bias * beta)


def _require_constant(symbol: Any, weight: Any, bias: Any) -> None:
    if not isinstance(symbol, SymbolicTensor) or isinstance(weight, SymbolicTensor) or isinstance(bias, SymbolicTensor):
        raise NotLinearError("the kernel of a convolution depends on the image")
    if weight.is_complex():
        raise NotLinearError("the kernel is complex")


def _after(
    symbol: SymbolicTensor, weight: Tensor, bias: Tensor | None, groups: int = 1, *geometry: Any
) -> SymbolicTensor:
    # The dtype of the kernel is converted when it is multiplied out.
    kernel = Kernel.of(weight.to(symbol.device), groups, symbol.dtype)
    outer = ConvMap(kernel, None if bias is None else constant(bias, symbol), *geometry)
    return symbol.then(outer, "conv")


def _conv_padding(padding: Any, kernel: Sequence[int], dilation: tuple[int, ...]) -> tuple[int, ...]:
    if padding == "valid":
        return (0, 0) * len(dilation)
    if padding == "same":  # torch pads an odd total with the larger half at the end
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return tuple(side for total in totals for side in (total // 2, total - total // 2))
    return tuple([side for side in per_axis(padding, len(dilation)) for _ in (0, 1)])


@handles(F.batch_norm, torch.batch_norm)
def batch_norm(
    input: SymbolicTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> SymbolicTensor:
    """Scale and shift each channel: a batch norm in eval mode, ``y = (x − μ)·γ/√(σ² + ε) + β`` (paper, Eq. 2)."""
    if running_mean is None or running_var is None:
        raise MissingStatisticsError("a batch norm without running statistics normalizes with batch statistics")
    if training:
        raise TrainingModeError("a batch norm is in training mode; call .eval() first")
    input.arrangement.known_axes()  # of tensors of unknown rank, axis 1 may be any
    if not input.layout.is_channel_axis(1):
        raise NotLinearError(f"a batch norm has its channels at axis 1, and those of {input.layout} are the last axis")
    if len(running_var) != input.map.out_channels:
        raise NotLinearError(f"a batch norm of {len(running_var)} channels follows {input.map.out_channels}")
    if input.device.type == "meta":  # only geometry is needed: skip the arithmetic
        factor = offset = constant(running_var, input)
    else:
        factor = (constant(running_var, input) + eps).rsqrt()
        factor = factor if weight is None else factor * constant(weight, input)
        offset = -constant(running_mean, input) * factor
        offset = offset if bias is None else offset + constant(bias, input)
    return input.like(algebra.shift(algebra.scale(input.map, factor), offset), "batch_norm")


@handles(F.instance_norm)
def instance_norm(
    input: SymbolicTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> SymbolicTensor:
    """Do what a batch norm does: in eval mode, an instance norm with running statistics is the same function."""
    if use_input_stats:
        raise NotLinearError("an instance norm normalizes with the statistics of each image")
    return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _average_pool(
    spatial: int,
    input: SymbolicTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> SymbolicTensor:
    """Compose with a depthwise convolution of equal weights."""
    require_spatial(input, spatial, f"an average pool over {spatial} axes")
    size, sides = per_axis(kernel_size, spatial), _conv_padding(padding, (), (1,) * spatial)
    # Windows that overhang the border divide by the number of pixels inside, so the map is not shift-invariant.
    if ceil_mode:
        raise BorderError("an average pool in ceil mode divides by fewer pixels at the border")
    if any(sides) and not count_include_pad:
        raise BorderError("an average pool that does not count the padding divides by fewer pixels at the border")
    channels = input.map.out_channels
    part = 1 / (divisor_override or math.prod(size))
    weight = torch.full((channels, 1, *size), part, dtype=input.dtype, device=input.device)
    steps = per_axis(kernel_size if stride is None or stride in ([], ()) else stride, spatial)
    pool = ConvMap.of(weight, None, steps, sides, groups=channels, border="zeros")
    return input.then(pool, "avg_pool")


avg_pool1d = handles(torch.avg_pool1d)(partial(_average_pool, 1))
avg_pool2d = handles(F.avg_pool2d)(partial(_average_pool, 2))
avg_pool3d = handles(F.avg_pool3d)(partial(_average_pool, 3))


@handles(
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout),
)
def dropout(input: SymbolicTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> SymbolicTensor:
    """Return the input: dropout in eval mode."""
    # Dropout with probability 0 is the identity in training mode, too.
    if training and p:
        raise TrainingModeError("a dropout is in training mode; call .eval() first")
    return input


def _in_place(function: Callable[..., SymbolicTensor]) -> Callable[..., SymbolicTensor]:
    """Return the in-place form of a handler: it updates its first argument, so that all aliases see the result."""

    def change(target: Any, *args: Any, **kwargs: Any) -> SymbolicTensor:
        if isinstance(target, Tensor):
            raise NotLinearError("a constant is modified in place")
        if not isinstance(target, SymbolicTensor):  # a number, as in ``total = 0; total += branch(x)``
            return function(target, *args, **kwargs)
        target.write(function(target, *args, **kwargs).map)
        return target

    return change


@handles(operator.add, torch.add, _T.add, _T.__add__, _T.__radd__)
def add(left: Any, right: Any, *, alpha: float = 1) -> SymbolicTensor:
    """Add two functions of one source, or a function and a constant per channel."""
    # torch.add(x, y, alpha=a) is x + a·y.
    if alpha != 1:
        right = right * alpha
    if isinstance(left, SymbolicTensor) and isinstance(right, SymbolicTensor):
        return same_source((left, right)).like(algebra.add(left.map, right.map), "add")
    symbol, other = (left, right) if isinstance(left, SymbolicTensor) else (right, left)
    # sum(branches) starts with 0; a zero bias would needlessly prevent padding after it.
    if isinstance(other, (int, float)) and other == 0:
        return symbol.like(symbol.map, "identity")
    return symbol.like(algebra.shift(symbol.map, per_channel(other, symbol)), "shift")


@handles(operator.neg, torch.neg, torch.negative, _T.neg, _T.negative, _T.__neg__)
def negate(input: SymbolicTensor) -> SymbolicTensor:
    """Return ``−x``."""
    return multiply(input, -1)


@handles(operator.pos, torch.positive, _T.positive, _T.__pos__)
def positive(input: SymbolicTensor) -> SymbolicTensor:
    """Return the input."""
    return input


@handles(operator.sub, torch.sub, torch.subtract, _T.sub, _T.subtract, _T.__sub__)
def subtract(left: Any, right: Any, *, alpha: float = 1) -> SymbolicTensor:
    """Return ``left − alpha·right``."""
    return add(left, right * -alpha)


@handles(_T.__rsub__, torch.rsub)
def reflected_subtract(left: Any, right: Any) -> SymbolicTensor:
    """Return ``right − left``."""
    return subtract(right, left)


@handles(operator.mul, torch.mul, torch.multiply, _T.mul, _T.multiply, _T.__mul__, _T.__rmul__)
def multiply(left: Any, right: Any) -> SymbolicTensor:
    """Multiply by a number or a constant per channel."""
    if isinstance(left, SymbolicTensor) and isinstance(right, SymbolicTensor):
        raise NotLinearError("a product of two functions of the image is not linear")
    symbol, other = (left, right) if isinstance(left, SymbolicTensor) else (right, left)
    return symbol.like(algebra.scale(symbol.map, per_channel(other, symbol)), "scale")


@handles(
    *(operator.truediv, torch.div, torch.divide, torch.true_divide),
    *(_T.div, _T.divide, _T.true_divide, _T.__truediv__),
)
def divide(left: Any, right: Any, *, rounding_mode: str | None = None) -> SymbolicTensor:
    """Divide by a number or a constant per channel."""
    if isinstance(right, SymbolicTensor) or rounding_mode is not None:
        raise NotLinearError("a division by the image, or a rounded one, is not linear")
    divisor = constant(right, left)
    return multiply(left, divisor if divisor.is_meta else 1 / divisor)  # arithmetic on meta tensors is slow


@handles(torch.addcmul, _T.addcmul)
def add_product(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> SymbolicTensor:
    """Return ``input + value·tensor1·tensor2``, as batch norms by hand compute it."""
    return add(input, tensor1 * tensor2 * value)


_IN_PLACE: dict[Callable[..., SymbolicTensor], tuple[Any, ...]] = {
    add: (operator.iadd, _T.add_, _T.__iadd__),
    subtract: (operator.isub, _T.sub_, _T.subtract_, _T.__isub__),
    multiply: (operator.imul, _T.mul_, _T.multiply_, _T.__imul__),
    divide: (operator.itruediv, _T.div_, _T.divide_, _T.__itruediv__),
    negate: (_T.neg_, _T.negative_),
    add_product: (_T.addcmul_,),
}
for _function, _names in _IN_PLACE.items():
    handles(*_names)(_in_place(_function))


@handles(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0) -> SymbolicTensor:
    """Concatenate functions of one source along the channels."""
    parts = [part for part in tensors if isinstance(part, SymbolicTensor)]
    if len(parts) < len(tensors) or not parts[0].layout.is_channel_axis(dim):
        raise NotLinearError("a concatenation along pixels or images, or with constants, is not a convolution")
    return same_source(parts).like(algebra.concatenate([part.map for part in parts]), "cat")
