"""Random numbers as a function of the seed and the position in a run.

A step of a resumed run draws what the same step of an uninterrupted run draws, without any saved generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*keys: int | str) -> int:
    """Hash ``keys`` into a seed of 63 bits, the same on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes int64 seeds


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Seed torch's CPU generator from ``keys`` inside the context, and restore its state afterwards.

    Use it around the creation of a model too, which draws the initial weights::

        with seeded("model", 0):
            model = create_model("repvgg_t0", num_classes=10, in_channels=1)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*keys))
        yield
