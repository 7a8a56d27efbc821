"""Batches of indexed images, the same ones whatever the number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repvgg.data.bad import BadImages
from repvgg.data.batch_ops import BatchOps
from repvgg.data.decoding import Bad
from repvgg.data.drawing import epoch_order
from repvgg.data.keeping import BaseImages, KeptImages
from repvgg.data.workers import data_loader, told_apart
from repvgg.errors import DataError, UsageError

if TYPE_CHECKING:
    from repvgg.data.image_ops import PolicyOps

Batch = tuple[Tensor, Tensor]


class Loaded(NamedTuple):
    """What a loading process hands over for a batch."""

    images: Tensor
    labels: Tensor
    bad: tuple[Bad, ...] = ()
    failure: str | None = None


class Request(NamedTuple):
    """Positions ``start`` … ``stop − 1`` of the order of ``epoch``."""

    epoch: int
    start: int
    stop: int


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
class TrainingImages(Dataset[Loaded]):
    """Augmented training images by their positions in an epoch; goes to the loading processes.

    Args:
        base: the images at their size.
        labels: (N,) int64.
        ops: augmentation of whole batches.
        policy: augmentation image by image, or None.
        on_bad: "raise", or "skip": the next good image in the order of the epoch takes the place of a bad one.
    """

    def __init__(self, base: BaseImages, labels: Tensor, ops: BatchOps, policy: PolicyOps | None, on_bad: str) -> None:
        self._base = base
        self._labels = labels
        self._ops = ops
        self._policy = policy
        self._on_bad = on_bad
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Loaded:
        return self.__getitems__(Request(0, index, index + 1))

    def __getitems__(self, request: Request) -> Loaded:
        order = self.order(request.epoch)
        indices = order[request.start : request.stop]
        images = self._base.all_of(indices, request.epoch)
        bad: list[Bad] = []
        if images is None:
            found = self._one_by_one(order, request, bad)
            if isinstance(found, str):
                return failed(found, bad)
            indices, images = found
        images = self._ops.move(images, request.epoch, indices)
        if self._policy is not None:
            images = self._policy(images, request.epoch, indices)
        images = self._ops.erase(images, request.epoch, indices)
        return Loaded(images, self._labels[indices], tuple(bad))

    def order(self, epoch: int) -> Tensor:
        """The order of ``epoch`` (N,); the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self._ops.seed, epoch, len(self))
        return self._order[1]

    def _one_by_one(self, order: Tensor, request: Request, bad: list[Bad]) -> tuple[Tensor, Tensor] | str:
        """Indices and images of a request, or what is wrong."""
        indices, images = [], []
        for position in range(request.start, request.stop):
            for step in range(len(order)):
                index = int(order[(position + step) % len(order)])
                image = self._base.one(index, request.epoch)
                if not isinstance(image, Bad):
                    break
                bad.append(image)
                if self._on_bad == "raise":
                    return advice(image)
            else:
                return f"Not one of {len(order)} training images can be read: {bad[-1]}."
            indices.append(index)
            images.append(image)
        return torch.tensor(indices), torch.stack(images)


@final
class HeldOutImages(Dataset[Loaded]):
    """Images to judge by; those that are bad are left out if ``on_bad`` is "skip"."""

    def __init__(self, base: BaseImages, labels: Tensor, on_bad: str) -> None:
        self.in_memory = isinstance(base, KeptImages)
        self._base = base
        self._labels = labels
        self._on_bad = on_bad

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Loaded:
        return self.at(torch.tensor([index]))

    def __getitems__(self, request: Request) -> Loaded:
        return self.at(torch.arange(request.start, request.stop))

    def at(self, indices: Tensor) -> Loaded:
        """The images at ``indices``."""
        images = self._base.all_of(indices, 0)
        if images is not None:
            return Loaded(images, self._labels[indices])
        ones = [self._base.one(int(index), 0) for index in indices]
        bad = [image for image in ones if isinstance(image, Bad)]
        if bad and self._on_bad == "raise":
            return failed(advice(bad[0]), bad)
        good = [image for image in ones if not isinstance(image, Bad)]
        if not good:
            return Loaded(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(bad))
        labels = self._labels[indices[[not isinstance(image, Bad) for image in ones]]]
        return Loaded(torch.stack(good), labels, tuple(bad))


def advice(bad: Bad) -> str:
    """What is wrong with an image, and what can be done about it."""
    return f"{bad}: mend or remove it, or skip bad images."


def failed(what: str, bad: list[Bad]) -> Loaded:
    """No batch but a sentence: an exception would come out of a process with its whole traceback as its text."""
    return Loaded(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(bad), what)


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
