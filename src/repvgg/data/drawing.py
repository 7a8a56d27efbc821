"""Random numbers that depend on where they are used, and on nothing that was drawn before.

A number is a hash of (seed, epoch, image, lane): the same image of the same epoch gets the same numbers whichever
process loads it, in whichever batch, resumed or not. The hash is SplitMix64's finalizer (G. Steele et al. 2014, as
improved by D. Stafford), chained over the keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_STEP, _MASK = 0x9E3779B97F4A7C15, 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = np.uint64(_STEP)
_ORDER, _CROP, _POLICY, _LANES = 1, 2, 3, 16  # no two uses share a lane

CROP_LANE = _CROP
POLICY_LANE = _POLICY


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: a bijection of 64 bits in which every bit of the input moves half of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hashed(seed: int, epoch: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits for each of ``keys``, any shape, in ``epoch`` of the run ``seed``."""
    state = _mixed(np.array([seed & _MASK], np.uint64) + _GOLDEN)
    state = _mixed((state ^ np.array([epoch], np.uint64)) + _GOLDEN)
    return _mixed((state ^ _mixed(keys + _GOLDEN)) + _GOLDEN)


def uniforms(seed: int, epoch: int, images: Tensor, lanes: int) -> Tensor:
    """Numbers (N, lanes) in [0, 1), float32, ``lanes`` for each image of ``images`` (N,) int64."""
    keys = images.numpy().astype(np.uint64)
    bits = hashed(seed, epoch, keys)[:, None] + np.arange(_LANES, _LANES + lanes, dtype=np.uint64) * _GOLDEN
    return torch.from_numpy((_mixed(bits) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    """A permutation (length,) int64 of all images, a function of seed and epoch only."""
    bits = int(hashed(seed, epoch, np.array([_ORDER], np.uint64) * _GOLDEN)[0])
    return torch.randperm(length, generator=torch.Generator().manual_seed(bits >> 1))


def image_bits(seed: int, epoch: int, image: int, lane: int) -> int:
    """What :func:`hashed` gives for one image, hashed once more with a lane; integers are quicker than arrays here."""
    state = _mixed_int((seed & _MASK) + _STEP)
    state = _mixed_int((state ^ epoch) + _STEP)
    state = _mixed_int((state ^ _mixed_int(image + _STEP)) + _STEP)
    return _mixed_int(state + lane * _STEP)


def _mixed_int(value: int) -> int:
    """See :func:`_mixed`."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@contextmanager
def drawing_for(seed: int, epoch: int, image: int, lane: int) -> Iterator[None]:
    """Seed torch's global generator for one image inside; outside it goes on as if nothing had happened."""
    bits = image_bits(seed, epoch, image, lane)
    before = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(bits >> 1)
        yield
    finally:
        torch.default_generator.set_state(before)


def name_key(name: str) -> int:
    """63 bits that stand for an image that has a name and no number."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big") >> 1


def fixed_order(length: int) -> Tensor:
    """A permutation (length,) that is always the same: it splits a data set in two, whatever the seed of a run."""
    return epoch_order(0, 0, length)
