"""Memory for weights and feature maps: zeros, aligned to cache lines, in large pages where the system has them.

How feature maps lie in memory: NHWC with channels rounded up to whole vectors, or NCHW; with a border of zeros.

What a caller hands over, a tensor or an array, as the engine reads it: where it lies.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repvgg.engine.graph import Floats, Pair
from repvgg.errors import UsageError

ALIGNMENT = 64
_PAGE = 2**21  # bytes of a large page
_CHUNK = 2**24  # bytes that are asked for at once; what is not touched costs nothing


def zeros(floats: int) -> Floats:
    """So many zeros, the first at the beginning of a cache line."""
    raw = np.zeros(4 * floats + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + 4 * floats].view(np.float32)


@final
class Arena:
    """The memory of one network, which goes when the last of its arrays does.

    Its arrays lie one behind the other. Small pages would lie anywhere, and how they fall together in the second cache
    changes the speed of a whole process by a tenth.
    """

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.uint8)

    def zeros(self, floats: int) -> Floats:
        """So many zeros, the first at the beginning of a cache line."""
        size = -(-4 * floats // ALIGNMENT) * ALIGNMENT
        if size > len(self._rest):
            self._rest = _pages(max(size, _CHUNK))
        found, self._rest = self._rest[: 4 * floats], self._rest[size:]
        return found.view(np.float32)

    def aligned(self, values: Floats) -> Floats:
        """A copy of an array of one axis that begins at the beginning of a cache line."""
        out = self.zeros(values.size)
        out[:] = values
        return out


def _pages(size: int) -> NDArray[np.uint8]:
    """At least so many zeros, in large pages if the system likes."""
    size = -(-size // _PAGE) * _PAGE
    raw = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
    if sys.platform == "linux":
        with suppress(OSError):  # a system without large pages
            raw.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(raw, np.uint8)
    begin = -whole.ctypes.data % _PAGE
    return whole[begin : begin + size]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


@final
@dataclass(frozen=True)
class Images:
    """The layout of feature maps of one size.

    Channels beyond the last are zeros, and so is the border; kernels write neither, or write zeros again.

    Attributes:
        channels: that mean something.
        size: height and width, without the border.
        border: pixels of zeros above and below, and to the left and the right.
        pitch: floats from one pixel to the next, at least ``channels``.
        more: pixels of zeros below and to the right, beyond the border, for tiles that stick out.
        planar: whether one channel lies after the other (NCHW), and the pitch is 1.
    """

    channels: int
    size: Pair
    border: Pair
    pitch: int
    more: Pair = (0, 0)
    planar: bool = False

    @property
    def row(self) -> int:
        """Floats from one row to the next."""
        return (self.size[1] + 2 * self.border[1] + self.more[1]) * self.pitch

    @property
    def plane(self) -> int:
        """Floats of all rows."""
        return (self.size[0] + 2 * self.border[0] + self.more[0]) * self.row

    @property
    def channel(self) -> int:
        """Floats from one channel of a pixel to the next."""
        return self.plane if self.planar else 1

    @property
    def image(self) -> int:
        """Floats from one image to the next."""
        return self.channels * self.plane if self.planar else self.plane

    @property
    def inside(self) -> int:
        """Floats from the corner of the border to the first pixel."""
        return self.border[0] * self.row + self.border[1] * self.pitch


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
