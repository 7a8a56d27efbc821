"""Memory of compiled models: the layout of feature maps, arenas, and views of the caller's images.

Sizes, strides and offsets of layouts are in floats (4 bytes).
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repvgg.engine.graph import Floats, Pair
from repvgg.errors import UsageError

ALIGNMENT = 64  # bytes: a cache line, and a vector of AVX-512
FLOAT_BYTES = 4

_HUGE_PAGE = 2**21  # bytes
_CHUNK = 2**24  # bytes of a mapping, at least; pages that are never touched use no memory


# Layouts


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``number``."""
    return -(-number // multiple) * multiple


@final
@dataclass(frozen=True)
class FeatureMapLayout:
    """Layout of one image of a feature map: NHWC with padded channels, or NCHW, with a border of zeros.

    The border is the padding of the convolution that reads the map, so that its kernel needs no bounds checks. Border
    and overhang are zeros: kernels write nothing there, or zeros. Channels from ``channels`` up to ``pixel_stride`` may
    have any value: what kernels compute of them goes there again.

    Attributes:
        channels: logical channels.
        size: (height, width) without border.
        border: pixels of zeros (above and below, left and right).
        pixel_stride: from one pixel to the next, at least ``channels``; 1 if ``planar``.
        overhang: additional pixels of zeros (below, right), where Winograd tiles extend beyond the border.
        planar: NCHW rather than NHWC.
    """

    channels: int
    size: Pair
    border: Pair
    pixel_stride: int
    overhang: Pair = (0, 0)
    planar: bool = False

    @property
    def has_border(self) -> bool:
        """Whether readers rely on pixels of zeros around the map."""
        return self.border != (0, 0) or self.overhang != (0, 0)

    @property
    def row_stride(self) -> int:
        return (self.size[1] + 2 * self.border[1] + self.overhang[1]) * self.pixel_stride

    @property
    def plane_size(self) -> int:
        """Floats of one channel (NCHW) or of all channels (NHWC), with border and overhang."""
        return (self.size[0] + 2 * self.border[0] + self.overhang[0]) * self.row_stride

    @property
    def channel_stride(self) -> int:
        return self.plane_size if self.planar else 1

    @property
    def image_stride(self) -> int:
        return self.channels * self.plane_size if self.planar else self.plane_size

    @property
    def interior_offset(self) -> int:
        """Floats from the corner of the border to the first pixel."""
        return self.border[0] * self.row_stride + self.border[1] * self.pixel_stride


# Aligned memory


def aligned_zeros(floats: int) -> Floats:
    """Return zeros that begin at a cache line."""
    raw = np.zeros(FLOAT_BYTES * floats + ALIGNMENT, np.uint8)  # NumPy guarantees 16 bytes only
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + FLOAT_BYTES * floats].view(np.float32)


@final
class Arena:
    """Bump allocator for one compiled model. Its mappings are freed with the last array in them."""

    def __init__(self) -> None:
        self._free = np.zeros(0, np.uint8)

    def zeros(self, floats: int) -> Floats:
        """Return zeros that begin at a cache line."""
        size = round_up(FLOAT_BYTES * floats, ALIGNMENT)
        if size > len(self._free):
            self._free = _map_pages(max(size, _CHUNK))
        found, self._free = self._free[: FLOAT_BYTES * floats], self._free[size:]
        return found.view(np.float32)

    def aligned_copy(self, values: Floats) -> Floats:
        """Return a copy of a 1-d array that begins at a cache line."""
        out = self.zeros(values.size)
        out[:] = values
        return out


def _map_pages(size: int) -> NDArray[np.uint8]:
    """Map at least ``size`` bytes of zeros, aligned to huge pages."""
    # The physical addresses of 4 KiB pages are arbitrary, and so is which of them share sets of the L2 cache: that
    # changed the speed of a process by up to 10 %. Huge pages are contiguous.
    size = round_up(size, _HUGE_PAGE)
    # Private: Linux backs shared anonymous mappings by tmpfs, which has small pages unless it is configured otherwise.
    raw = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # the kernel is built without transparent huge pages
            raw.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(raw, np.uint8)
    begin = -whole.ctypes.data % _HUGE_PAGE
    return whole[begin : begin + size]


# The caller's images

Images: TypeAlias = "Tensor | Floats"


class InputView(NamedTuple):
    """The caller's images, in memory that the engine reads in place."""

    address: int  # of the first float
    shape: tuple[int, int, int, int]  # (n, C, H, W)
    strides: tuple[int, ...]  # floats from one element to the next along each axis
    owner: Images  # keeps the memory alive


def view_inputs(inputs: Sequence[Images], channels: Sequence[int]) -> list[InputView]:
    """Check the inputs of a network, one for each number of channels, and return a view of each.

    Raises:
        UsageError: as :func:`view_input`, or there are other numbers of inputs, or of images in them.
    """
    if len(inputs) != len(channels):
        raise UsageError(f"This model takes {len(channels)} inputs, got {len(inputs)}.")
    views = [view_input(x, count) for x, count in zip(inputs, channels, strict=True)]
    if len({view.shape[0] for view in views}) > 1:
        raise UsageError(f"All inputs need the same number of images, got {[view.shape[0] for view in views]}.")
    return views


def view_input(x: Images, channels: int) -> InputView:
    """Check images and return a view of their memory. They are copied only if they are not aligned to floats.

    Raises:
        UsageError: ``x`` is not float32 of shape (n, channels, H, W) on the CPU, an axis other than n is empty, or it
            is a tensor without memory of its own; n may be 0.
    """
    if isinstance(x, Tensor):
        if x.is_nested:  # its shape cannot be asked for
            raise UsageError(f"The engine takes one tensor of images: {_REASONS['Nested']}.")
        valid = x.dtype is torch.float32 and x.is_cpu and x.layout is torch.strided
    else:
        valid = isinstance(x, np.ndarray) and x.dtype == np.float32 and not isinstance(x, np.ma.MaskedArray)
    if not valid or x.ndim != 4 or 0 in x.shape[1:] or x.shape[1] != channels:
        raise UsageError(
            f"This model takes float32 images of shape (n, {channels}, H, W) on the CPU, got {_describe(x)}."
        )
    return _view_tensor(x) if isinstance(x, Tensor) else _view_array(x)


def _view_tensor(x: Tensor) -> InputView:
    reason = why_unreadable(x)
    if reason is not None:
        raise UsageError(f"The engine reads the memory of its images, and it cannot here: {reason}.")
    if x.is_neg():  # a lazy negation, as of the imaginary part of a conjugate: the sign in memory is the opposite
        x = x.resolve_neg()
    batch, channels, height, width = x.shape
    return InputView(x.data_ptr(), (batch, channels, height, width), x.stride(), x)


# PyTorch's dispatch keys of tensors that are nothing but numbers in memory, and why others are not.
_PLAIN_KEYS = frozenset({"CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU", "Negative"})
_REASONS = {
    "FuncTorch": "torch.func.vmap, grad and jvp pass wrapped tensors; call the model outside of them",
    "Functionalize": "torch.func.functionalize passes wrapped tensors; call the model outside of it",
    "ZeroTensor": "a zero tensor of autograd has no memory; call torch.zeros_like",
    "Nested": "a nested tensor is several tensors; pass each of them",
    "Sparse": "a sparse tensor has no zeros in memory; call to_dense()",
    "Quantized": "a quantized tensor has no floats in memory; call dequantize()",
}


def why_unreadable(x: Tensor) -> str | None:
    """Return why a tensor of the CPU is not an array of numbers in memory that holds all its elements, or None."""
    reason = _why_wrapped(torch._C._dispatch_keys(x).raw_repr(), x)
    if reason is None and x.numel() > 0:
        last = x.storage_offset() + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        size = x.untyped_storage().nbytes()
        if size < (last + 1) * x.element_size() or x.data_ptr() == 0:
            return f"the tensor of shape {tuple(x.shape)} has {size:,} bytes of storage: its memory was freed"
    return reason


def _why_wrapped(keys: int, x: Tensor) -> str | None:
    if keys not in _known_keys:
        names = str(torch._C._dispatch_keys(x)).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
        _known_keys[keys] = next((name for name in names if name not in _PLAIN_KEYS), None)
    strange = _known_keys[keys]
    if strange is None:
        return None
    otherwise = f"a {type(x).__name__} ({strange}) has no memory of its own; pass an ordinary tensor"
    return next((reason for prefix, reason in _REASONS.items() if strange.startswith(prefix)), otherwise)


_known_keys: dict[int, str | None] = {}  # the first unusual key of a set of dispatch keys


def _view_array(x: Floats) -> InputView:
    # NumPy's strides are in bytes, and may not be multiples of 4, as of a field of a packed structured array.
    if not x.flags.aligned or any(step % FLOAT_BYTES for step in x.strides):
        x = np.ascontiguousarray(x)
    batch, channels, height, width = x.shape
    strides = tuple(step // FLOAT_BYTES for step in x.strides)
    return InputView(x.ctypes.data, (batch, channels, height, width), strides, x)


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        kind = "" if x.layout == torch.strided else f"{x.layout} "
        return f"{kind}{x.dtype} of shape {tuple(x.shape)} on {x.device.type}"
    if isinstance(x, np.ndarray):
        return f"an array of {x.dtype} of shape {x.shape}"
    return f"a {type(x).__name__}"
