"""Batches of indexed images, the same ones whatever the number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor

from repvgg.data.bad import BadImages
from repvgg.data.batching import HeldOutImages, Loaded, Request, TrainingImages
from repvgg.data.workers import data_loader, told_apart
from repvgg.errors import DataError, UsageError

Batch = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True)
class Share:
    """What a loader is asked for.

    Attributes:
        batch_size: images a batch of this process.
        rank: this process, of those that train.
        world_size: how many there are.

    Raises:
        UsageError: no image a batch, or no such rank.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"A batch has 1 image or more, not {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"Of {self.world_size} processes, rank {self.rank} is none.")

    @property
    def step(self) -> int:
        """Images of one step over all processes."""
        return self.batch_size * self.world_size

    def __str__(self) -> str:
        others = f" on each of {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.batch_size}{others}"


class TrainLoader(ABC):
    """The training batches of one process: images (n, C, H, W), uint8 or float32, and labels (n,) int64.

    Each pass over it is the epoch that :meth:`set_epoch` said last, or epoch 0.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Full batches an epoch."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of ``epoch``, counted from 0."""

    @abstractmethod
    def skip(self, batches: int) -> None:
        """Start the next pass, and only that, behind so many batches: a run that was cut off goes on as it was."""


class HeldOutLoader(ABC):
    """The images to judge by, in order; each is with exactly one process."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches; the last one may be smaller, and so may be one with bad images."""


@final
class IndexedTrainLoader(TrainLoader):
    """See :class:`TrainLoader`: batch t of all processes together is ``order[t·G : (t + 1)·G]``.

    G is ``batch_size · world_size``, and rank r has the slice r of it.
    """

    def __init__(self, dataset: TrainingImages, share: Share, workers: int, bad: BadImages) -> None:
        self._batches = len(dataset) // share.step
        if not self._batches:
            raise UsageError(f"{len(dataset)} training images do not fill one batch of {share}.")
        self._requests = _TrainRequests(self._batches, share)
        self._loader = data_loader(dataset, workers, self._requests)
        self._bad = bad

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._loader)
        self._requests.first = 0
        return batches_of(iterator, self._bad, self._loader.num_workers)

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`TrainLoader.set_epoch`."""
        self._requests.epoch = epoch

    def skip(self, batches: int) -> None:
        """See :meth:`TrainLoader.skip`; nothing is read of what is skipped.

        Raises:
            UsageError: a negative number, or more than an epoch has.
        """
        check_skip(batches, self._batches)
        self._requests.first = batches


class _TrainRequests:
    """The requests of one epoch; a fresh list at every call of ``iter``."""

    def __init__(self, batches: int, share: Share) -> None:
        self.epoch = 0
        self.first = 0
        self._batches = batches
        self._share = share

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Request]:
        size, stride, offset = self._share.batch_size, self._share.step, self._share.batch_size * self._share.rank
        starts = [batch * stride + offset for batch in range(self.first, self._batches)]
        return iter([Request(self.epoch, start, start + size) for start in starts])


@final
class IndexedHeldOutLoader(HeldOutLoader):
    """See :class:`HeldOutLoader`: rank r has the images ``N·r // world_size`` … ``N·(r + 1) // world_size − 1``."""

    def __init__(self, dataset: HeldOutImages, share: Share, workers: int, bad: BadImages) -> None:
        start, stop = (len(dataset) * (share.rank + end) // share.world_size for end in (0, 1))
        size = share.batch_size
        self._requests = [Request(0, first, min(first + size, stop)) for first in range(start, stop, size)]
        self._loader = data_loader(dataset, workers, self._requests)
        self._bad = bad

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        return batches_of(iter(self._loader), self._bad, self._loader.num_workers)


def batches_of(loaded: Iterator[Loaded], bad: BadImages, workers: int) -> Iterator[Batch]:
    """What was loaded, without the rest; empty batches are left out.

    Raises:
        DataError: a process says that something is wrong, or dies.
    """
    with told_apart(workers):
        for images, labels, found, failure in loaded:
            bad.add(found)
            if failure is not None:
                raise DataError(failure)
            if len(labels):
                yield images, labels


def check_skip(batches: int, of: int | None) -> None:
    """Check a number of batches to skip.

    Raises:
        UsageError: a negative number, or more than there are.
    """
    if batches < 0 or (of is not None and batches > of):
        raise UsageError(f"{batches} batches cannot be skipped of an epoch of {'any length' if of is None else of}.")
