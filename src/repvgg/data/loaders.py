"""Loaders of map-style splits: the same batches for any number of workers and ranks.

Batch t of an epoch over all ranks is ``order[t·G : (t + 1)·G]``, with G = batch size · ranks and ``order`` a function
of seed and epoch. The main process sends positions in that order to the workers, so which worker loads a batch is
irrelevant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repvgg.data.cache import CachedImages, ImageStore
from repvgg.data.counter_rng import epoch_order
from repvgg.data.decode import CorruptImage, CorruptImageLog
from repvgg.data.transforms import BatchTransforms, PolicyTransform
from repvgg.data.workers import data_loader, worker_failures
from repvgg.errors import DataError, UsageError

Batch = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True)
class RankShard:
    """The share of each batch that one rank loads.

    Attributes:
        batch_size: images per batch and rank.
        rank: of this process.
        world_size: number of ranks.

    Raises:
        UsageError: a batch size below 1, or a rank out of range.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1 image, got {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank must be in [0, {self.world_size}), got {self.rank}.")

    @property
    def global_batch_size(self) -> int:
        """Images per step over all ranks."""
        return self.batch_size * self.world_size

    def __str__(self) -> str:
        others = f" on each of {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{self.batch_size}{others}"


class TrainLoader(ABC):
    """The training batches of one rank: images (n, C, H, W), uint8 or float32, and labels (n,) int64.

    Each pass loads the epoch that was set last with :meth:`set_epoch`, or epoch 0.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches per epoch; all are full."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Select the order and the augmentation of ``epoch``, counted from 0."""

    @abstractmethod
    def skip(self, batches: int) -> None:
        """Start the next pass, and only that, after ``batches`` batches, to resume an interrupted epoch."""


class ValLoader(ABC):
    """The validation images in order; each is loaded by exactly one rank."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the last one may be smaller, and so may one with corrupt images."""


class LoadedBatch(NamedTuple):
    """What a worker sends for one batch."""

    images: Tensor
    labels: Tensor
    corrupt: tuple[CorruptImage, ...] = ()
    failure: str | None = None


def failed_batch(message: str, corrupt: list[CorruptImage]) -> LoadedBatch:
    """Return an empty batch that carries an error message.

    An exception would leave the worker with its complete traceback as its text.
    """
    return LoadedBatch(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(corrupt), message)


class BatchRequest(NamedTuple):
    """Positions ``start`` … ``stop − 1`` in the order of ``epoch``."""

    epoch: int
    start: int
    stop: int


@final
class TrainDataset(Dataset[LoadedBatch]):
    """Augmented training batches by position in an epoch. A copy of it lives in each worker.

    Args:
        store: the images at their final size.
        labels: (N,) int64.
        transforms: augmentation of batches.
        policy: augmentation of single images, or None.
        on_bad: "raise", or "skip": the next readable image in the order of the epoch replaces a corrupt one.
    """

    def __init__(
        self,
        store: ImageStore,
        labels: Tensor,
        transforms: BatchTransforms,
        policy: PolicyTransform | None,
        on_bad: str,
    ) -> None:
        self._store = store
        self._labels = labels
        self._transforms = transforms
        self._policy = policy
        self._on_bad = on_bad
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> LoadedBatch:
        return self.__getitems__(BatchRequest(0, index, index + 1))

    def __getitems__(self, request: BatchRequest) -> LoadedBatch:  # a hook of DataLoader: one call per batch
        order = self.order(request.epoch)
        indices = order[request.start : request.stop]
        images = self._store.load_batch(indices, request.epoch)
        corrupt: list[CorruptImage] = []
        if images is None:
            found = self._load_each(order, request, corrupt)
            if isinstance(found, str):
                return failed_batch(found, corrupt)
            indices, images = found
        # Erase after the policy: its colour operations would change the grey of the square.
        images = self._transforms.jitter_crop_flip(images, request.epoch, indices)
        if self._policy is not None:
            images = self._policy(images, request.epoch, indices)
        images = self._transforms.erase(images, request.epoch, indices)
        return LoadedBatch(images, self._labels[indices], tuple(corrupt))

    def order(self, epoch: int) -> Tensor:
        """Return the order (N,) of ``epoch``."""
        # Each worker keeps the last permutation: computing it for every batch would cost O(N) per batch.
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self._transforms.seed, epoch, len(self))
        return self._order[1]

    def _load_each(
        self, order: Tensor, request: BatchRequest, corrupt: list[CorruptImage]
    ) -> tuple[Tensor, Tensor] | str:
        """Return indices and images of a request, or an error message; append to ``corrupt``."""
        indices, images = [], []
        for position in range(request.start, request.stop):
            # The replacement depends on the order alone, so it is the same for any number of workers.
            for step in range(len(order)):
                index = int(order[(position + step) % len(order)])
                image = self._store.load(index, request.epoch)
                if not isinstance(image, CorruptImage):
                    break
                corrupt.append(image)
                if self._on_bad == "raise":
                    return image.advice
            else:
                return f"None of the {len(order)} training images can be read: {corrupt[-1]}."
            indices.append(index)
            images.append(image)
        return torch.tensor(indices), torch.stack(images)


@final
class ValDataset(Dataset[LoadedBatch]):
    """Validation batches by index; corrupt images are left out if ``on_bad`` is "skip"."""

    def __init__(self, store: ImageStore, labels: Tensor, on_bad: str) -> None:
        self.in_memory = isinstance(store, CachedImages)
        self._store = store
        self._labels = labels
        self._on_bad = on_bad

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> LoadedBatch:
        return self.at(torch.tensor([index]))

    def __getitems__(self, request: BatchRequest) -> LoadedBatch:  # a hook of DataLoader: one call per batch
        return self.at(torch.arange(request.start, request.stop))

    def at(self, indices: Tensor) -> LoadedBatch:
        """Return the images at ``indices``."""
        images = self._store.load_batch(indices, 0)
        if images is not None:
            return LoadedBatch(images, self._labels[indices])
        loaded = [self._store.load(int(index), 0) for index in indices]
        corrupt = [image for image in loaded if isinstance(image, CorruptImage)]
        if corrupt and self._on_bad == "raise":
            return failed_batch(corrupt[0].advice, corrupt)
        readable = [image for image in loaded if not isinstance(image, CorruptImage)]
        if not readable:
            return LoadedBatch(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(corrupt))
        labels = self._labels[indices[[not isinstance(image, CorruptImage) for image in loaded]]]
        return LoadedBatch(torch.stack(readable), labels, tuple(corrupt))


@final
class MapTrainLoader(TrainLoader):
    """The :class:`TrainLoader` of a map-style split: rank r loads the slice r of each global batch."""

    def __init__(self, dataset: TrainDataset, shard: RankShard, workers: int, log: CorruptImageLog) -> None:
        self._batches = len(dataset) // shard.global_batch_size
        if not self._batches:
            raise UsageError(f"{len(dataset)} training images do not fill one batch of {shard}.")
        self._sampler = _TrainSampler(self._batches, shard)
        self._loader = data_loader(dataset, workers, self._sampler)
        self._log = log

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._loader)  # lists all requests at once, so the reset below does not affect this pass
        self._sampler.first = 0
        return delivered(iterator, self._log, self._loader.num_workers)

    def set_epoch(self, epoch: int) -> None:
        self._sampler.epoch = epoch

    def skip(self, batches: int) -> None:
        """See :meth:`TrainLoader.skip`; nothing of what is skipped is read.

        Raises:
            UsageError: a negative number, or more than an epoch has.
        """
        check_skip(batches, self._batches)
        self._sampler.first = batches


class _TrainSampler:
    """A batch sampler of one rank. Each ``iter`` lists the requests of the current epoch."""

    def __init__(self, batches: int, shard: RankShard) -> None:
        self.epoch = 0
        self.first = 0
        self._batches = batches
        self._shard = shard

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[BatchRequest]:
        size, stride = self._shard.batch_size, self._shard.global_batch_size
        starts = [batch * stride + self._shard.rank * size for batch in range(self.first, self._batches)]
        return iter([BatchRequest(self.epoch, start, start + size) for start in starts])


@final
class MapValLoader(ValLoader):
    """The :class:`ValLoader` of a map-style split: rank r of R loads the images N·r // R … N·(r + 1) // R − 1."""

    def __init__(self, dataset: ValDataset, shard: RankShard, workers: int, log: CorruptImageLog) -> None:
        # Contiguous, and equal to within one image: the order over all ranks is that of the split.
        start, stop = (len(dataset) * (shard.rank + end) // shard.world_size for end in (0, 1))
        size = shard.batch_size
        self._requests = [BatchRequest(0, first, min(first + size, stop)) for first in range(start, stop, size)]
        self._loader = data_loader(dataset, workers, self._requests)
        self._log = log

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        return delivered(iter(self._loader), self._log, self._loader.num_workers)


def delivered(loaded: Iterator[LoadedBatch], log: CorruptImageLog, workers: int) -> Iterator[Batch]:
    """Yield images and labels of loaded batches that are not empty; record corrupt images in ``log``.

    Raises:
        DataError: a worker reports a failure, or dies.
    """
    with worker_failures(workers):
        for images, labels, corrupt, failure in loaded:
            log.add(corrupt)
            if failure is not None:
                raise DataError(failure)
            if len(labels):  # empty where all images of a validation batch are corrupt
                yield images, labels


def check_skip(batches: int, num_batches: int | None) -> None:
    """Raise UsageError for a number of batches to skip that is negative or more than the epoch has."""
    if batches < 0 or (num_batches is not None and batches > num_batches):
        epoch = "an epoch of unknown length" if num_batches is None else f"an epoch of {num_batches}"
        raise UsageError(f"{batches} batches cannot be skipped of {epoch}.")
