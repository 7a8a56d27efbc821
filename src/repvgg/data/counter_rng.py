"""Counter-based random numbers: each is a hash of (seed, epoch, image, stream), independent of earlier draws.

An image gets the same numbers in a given epoch whichever worker loads it, in whichever batch, resumed or not. The hash
is the finalizer of SplitMix64 (G. Steele, D. Lea and C. Flood 2014, with the constants of D. Stafford), chained over
the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_INCREMENT, _MASK = 0x9E3779B97F4A7C15, 0xFFFF_FFFF_FFFF_FFFF  # 2^64 / golden ratio; 64 bits
_GAMMA = np.uint64(_INCREMENT)

# No two uses share a stream. Batch transforms take the streams from _UNIFORMS on; 4 to 15 are free.
_ORDER, CROP_STREAM, POLICY_STREAM, _UNIFORMS = 1, 2, 3, 16


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finalizer: a bijection in which each input bit flips half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_bits(seed: int, epoch: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 random bits for each of ``keys`` (any shape) in ``epoch`` of the run ``seed``."""
    # Arrays of one element wrap around silently at 2^64; NumPy scalars would warn about the overflow.
    state = _mix(np.array([seed & _MASK], np.uint64) + _GAMMA)
    state = _mix((state ^ np.array([epoch], np.uint64)) + _GAMMA)
    return _mix((state ^ _mix(keys + _GAMMA)) + _GAMMA)


def uniforms(seed: int, epoch: int, images: Tensor, count: int) -> Tensor:
    """Return ``count`` float32 numbers in [0, 1) for each of ``images`` (N,) int64, as (N, count)."""
    keys = images.numpy().astype(np.uint64)
    streams = np.arange(_UNIFORMS, _UNIFORMS + count, dtype=np.uint64)
    bits = _mix(random_bits(seed, epoch, keys)[:, None] + streams * _GAMMA)
    # The upper 24 bits fill the mantissa of a float32 exactly, so the product never rounds up to 1.
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """Return a permutation (length,) int64, a function of seed and epoch only."""
    bits = int(random_bits(seed, epoch, np.array([_ORDER], np.uint64) * _GAMMA)[0])
    return torch.randperm(length, generator=torch.Generator().manual_seed(bits >> 1))  # 63 bits: not negative


def image_bits(seed: int, epoch: int, image: int, stream: int) -> int:
    """Return 64 random bits of one image and stream: :func:`random_bits`, mixed once more with the stream."""
    # Python integers: for a single key they are several times faster than arrays of one element.
    state = _mix_int((seed & _MASK) + _INCREMENT)
    state = _mix_int((state ^ epoch) + _INCREMENT)
    state = _mix_int((state ^ _mix_int(image + _INCREMENT)) + _INCREMENT)
    return _mix_int(state + stream * _INCREMENT)


def _mix_int(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@contextmanager
def image_rng(seed: int, epoch: int, image: int, stream: int) -> Iterator[None]:
    """Seed torch's global CPU generator for one image and stream, and restore its state on exit.

    torchvision's transforms accept no generator: they draw from the global one.
    """
    bits = image_bits(seed, epoch, image, stream)
    before = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(bits >> 1)
        yield
    finally:
        torch.default_generator.set_state(before)
