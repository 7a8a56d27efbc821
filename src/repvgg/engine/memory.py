"""Memory for weights and feature maps: zeros, aligned to cache lines."""

from __future__ import annotations

import numpy as np

from repvgg.engine.layers import Floats

ALIGNMENT = 64


def zeros(floats: int, guard: int = 0) -> Floats:
    """So many zeros, the first at the beginning of a cache line, with ``guard`` bytes more on either side."""
    raw = np.zeros(4 * floats + 2 * guard + ALIGNMENT, np.uint8)
    begin = guard + (-(raw.ctypes.data + guard)) % ALIGNMENT
    return raw[begin : begin + 4 * floats].view(np.float32)


def aligned(values: Floats) -> Floats:
    """A copy of an array of one axis that begins at the beginning of a cache line."""
    out = zeros(values.size)
    out[:] = values
    return out
