"""What a caller hands over, a tensor or an array, as the engine reads it: where it lies."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from repvgg.engine.layers import Floats
from repvgg.errors import UsageError

Given: TypeAlias = "Tensor | Floats"
_FLOAT_BYTES = 4


class Input(NamedTuple):
    """Images in memory.

    Attributes:
        address: of the first number.
        shape: (n, C, H, W).
        strides: floats from one to the next along each axis.
        owner: keeps the memory alive.
    """

    address: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, ...]
    owner: Given


def read_input(x: Given, channels: int) -> Input:
    """Check images, and say where they lie. Only arrays that are not aligned to floats are copied.

    Raises:
        UsageError: they are no float32 numbers on the CPU, or of no shape (n, C, H, W).
    """
    if isinstance(x, Tensor):
        fits = x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided
    else:
        fits = isinstance(x, np.ndarray) and x.dtype == np.float32
    if not fits or x.ndim != 4 or 0 in x.shape or x.shape[1] != channels:
        raise UsageError(
            f"This network takes float32 images of shape (n, {channels}, H, W) on the CPU, not {_told(x)}."
        )
    return _of_tensor(x) if isinstance(x, Tensor) else _of_array(x)


def _of_tensor(x: Tensor) -> Input:
    if x.is_neg():  # such as the imaginary part of a conjugate
        x = x.resolve_neg()
    batch, channels, height, width = x.shape
    return Input(x.data_ptr(), (batch, channels, height, width), x.stride(), x)


def _of_array(x: Floats) -> Input:
    if not x.flags.aligned or any(step % _FLOAT_BYTES for step in x.strides):
        x = np.ascontiguousarray(x)
    batch, channels, height, width = x.shape
    strides = tuple(step // _FLOAT_BYTES for step in x.strides)
    return Input(x.ctypes.data, (batch, channels, height, width), strides, x)


def _told(x: object) -> str:
    if isinstance(x, Tensor):
        kind = "" if x.layout == torch.strided else f"{x.layout} "
        return f"{kind}{x.dtype} of shape {tuple(x.shape)} on {x.device.type}"
    if isinstance(x, np.ndarray):
        return f"an array of {x.dtype} of shape {x.shape}"
    return f"a {type(x).__name__}"
