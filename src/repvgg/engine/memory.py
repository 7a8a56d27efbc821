"""Memory for weights and feature maps: zeros, aligned to cache lines, in large pages where the system has them."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import final

import numpy as np
from numpy.typing import NDArray

from repvgg.engine.layers import Floats

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
