"""Randomness that depends on the seed and the place in the run, and on nothing that happened before.

A step of a resumed run draws what the same step of an uninterrupted run draws, without any saved generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import final

import torch
from torch.utils.data import Sampler


def derived_seed(*keys: int | str) -> int:
    """A seed of 63 bits from ``keys``: other keys, another seed, the same on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Seed torch's generator of the CPU by ``keys`` inside; outside it goes on as if nothing had happened.

    Use it around the creation of a model too, which draws the first weights::

        with seeded("model", 0):
            model = create_model("repvgg_t0", num_classes=10, in_channels=1)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*keys))
        yield


@final
class EpochShuffle(Sampler[int]):
    """All indices in an order that depends on the seed and the epoch only.

    Lightning calls :meth:`set_epoch` as every epoch starts.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        self._length = len(dataset)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of ``epoch``, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed("shuffle", self._seed, self._epoch))
        return iter(torch.randperm(self._length, generator=generator).tolist())
