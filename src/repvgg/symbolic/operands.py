"""What handlers ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repvgg.errors import NotLinearError
from repvgg.symbolic.tensor import SymbolicTensor


def numbers(value: Any, count: int) -> tuple[int, ...]:
    """``count`` whole numbers, where torch takes one for all as well."""
    if isinstance(value, int):
        return (value,) * count
    given = tuple([int(number) for number in value])
    return given * count if len(given) == 1 else given


def constant(value: Any, like: SymbolicTensor) -> Tensor:
    """A number or a real tensor, brought to the dtype and device of the algebra."""
    if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
        raise NotLinearError("complex numbers have no place in a convolution of real ones")
    return torch.as_tensor(value).to(device=like.device, dtype=like.dtype)


def per_channel(value: Any, like: SymbolicTensor) -> Tensor:
    """A constant operand as a vector (O,).

    Raises:
        NotLinearError: it differs along another axis than the channels, or would change the channels or add an axis.
    """
    operand = constant(value, like)
    channels, rank = like.map.out_channels, like.layout.rank
    shape = tuple(operand.shape)
    place = len(shape) + like.layout.axis  # negative where the operand does not reach to the channels
    elsewhere = shape[: max(place, 0)] + shape[place + 1 :]
    fits = place < 0 or shape[place] in (1, channels)
    if not fits or any(size != 1 for size in elsewhere) or len(shape) > (1 if rank is None else rank):
        raise NotLinearError(f"an operand of shape {shape} is not one number a channel of {like.layout}")
    return operand.reshape(-1).expand(channels)


def same_source(symbols: Sequence[SymbolicTensor]) -> SymbolicTensor:
    """The first of several functions of one source, which may be merged."""
    first = symbols[0]
    if any(symbol.source is not first.source for symbol in symbols):
        raise NotLinearError("functions of two different tensors meet here")
    if not first.source.merge_branches:
        raise NotLinearError("branches are to stay apart")
    if any(symbol.layout != first.layout for symbol in symbols):
        raise NotLinearError("tensors of different shapes meet here")
    return first


def require_spatial(symbol: SymbolicTensor, spatial: int, name: str) -> None:
    """Check that a function over ``spatial`` axes, called ``name``, finds the channels of ``symbol`` in their place.

    Raises:
        NotLinearError: it would take other axes for them.
    """
    if symbol.layout.spatial != spatial:
        raise NotLinearError(f"{name} on a tensor {symbol.layout} does not take its channels for channels")
