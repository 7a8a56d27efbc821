"""Loaders of iterable splits.

Each worker of each rank reads another shard, so the order of the images depends on the numbers of ranks and workers;
equal numbers give equal batches. Every example is read once per epoch, except for the remainder that fills no batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from repvgg.data.decode import CorruptImage, CorruptImageLog, decode
from repvgg.data.loaders import (
    Batch,
    LoadedBatch,
    RankShard,
    TrainLoader,
    ValLoader,
    check_skip,
    data_loader,
    delivered,
    failed_batch,
)
from repvgg.data.splits import Example, IterableSplit, Shuffle
from repvgg.data.transforms import BatchTransforms, Crop
from repvgg.errors import DataError, UsageError

_PASS = 1 << 32  # added to the epoch for each further pass over the stream, so that it draws other numbers
_SINGLE_IMAGES = RankShard(batch_size=1)


@final
@dataclass(frozen=True)
class StreamDataset(IterableDataset[LoadedBatch]):
    """One pass over the shard of one worker: full batches, then the remainder. A copy of it lives in each worker."""

    split: IterableSplit
    crop: Crop  # brings the images to one size
    transforms: BatchTransforms | None  # their augmentation; None for validation
    on_bad: str  # "raise" at a corrupt image, or "skip" it
    shard: RankShard = _SINGLE_IMAGES
    epoch: int | None = None  # of order and augmentation; None for the stored order
    # Batches, over all workers of this rank, that the caller drops. They are not decoded, unless corrupt images are
    # skipped: only decoding tells which images a batch holds then.
    skipped: int = 0

    def __iter__(self) -> Iterator[LoadedBatch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        shuffle = None
        if self.epoch is not None and self.transforms is not None:
            shuffle = Shuffle(self.transforms.seed, self.epoch)
        examples = self.split.examples(shuffle, self.shard.rank * workers + worker, self.shard.world_size * workers)
        # DataLoader takes a batch of each worker in turn: batch n of this worker is batch n·workers + worker.
        to_drop = max(0, (self.skipped - worker + workers - 1) // workers)
        batch: list[tuple[Example, Tensor | None]] = []
        corrupt: list[CorruptImage] = []
        for example in examples:
            image = self._load(example, decoded=to_drop == 0 or self.on_bad == "skip")
            if isinstance(image, str):
                yield failed_batch(image, corrupt)
                return
            if isinstance(image, CorruptImage):
                corrupt.append(image)
                continue
            assert isinstance(example, Example)
            batch.append((example, image))
            if len(batch) == self.shard.batch_size:
                yield self._batch(batch, corrupt)
                batch, corrupt, to_drop = [], [], max(0, to_drop - 1)
        if batch or corrupt:
            yield self._remainder(batch, corrupt)

    def _load(self, example: Example | CorruptImage, *, decoded: bool) -> Tensor | CorruptImage | str | None:
        """Return the pixels, None if not ``decoded``, a corrupt image to skip, or an error message."""
        image = example if isinstance(example, CorruptImage) else self._pixels(example) if decoded else None
        if isinstance(image, CorruptImage):
            return image if self.on_bad == "skip" else image.advice
        if isinstance(example, Example) and not 0 <= example.label < len(self.split.classes):
            highest = len(self.split.classes) - 1
            return f"{example.location!r} has label {example.label}, but the classes are 0 … {highest}."
        return image

    def _remainder(self, batch: list[tuple[Example, Tensor | None]], corrupt: list[CorruptImage]) -> LoadedBatch:
        # Always decoded, even among the skipped: it may be joined with another worker's remainder to a full batch.
        complete = []
        for example, image in batch:
            pixels = self._pixels(example) if image is None else image
            if isinstance(pixels, CorruptImage):
                return failed_batch(pixels.advice, corrupt)
            complete.append((example, pixels))
        return self._batch(complete, corrupt)

    def _pixels(self, example: Example) -> Tensor | CorruptImage:
        image = decode(example.data, example.location)
        if isinstance(image, CorruptImage):
            return image
        key = 0 if self.transforms is None else _content_key(example)  # validation crops draw nothing
        return self.crop(image, example.location, self.epoch or 0, key)

    def _batch(self, batch: Sequence[tuple[Example, Tensor | None]], corrupt: list[CorruptImage]) -> LoadedBatch:
        labels = torch.tensor([example.label for example, _ in batch], dtype=torch.int64)
        pixels = [image for _, image in batch if image is not None]
        if len(pixels) < len(batch) or not batch:  # dropped by the caller: only its number of images matters
            return LoadedBatch(torch.zeros(len(batch), 0), labels, tuple(corrupt))
        images = torch.stack(pixels)
        if self.transforms is not None:
            keys = torch.tensor([_content_key(example) for example, _ in batch])
            images = self.transforms(images, self.epoch or 0, keys)
        return LoadedBatch(images, labels, tuple(corrupt))


def _content_key(example: Example) -> int:
    """Return 63 bits that identify an image: a stream has no indices, so hash the content of its file."""
    return int.from_bytes(hashlib.blake2b(example.data, digest_size=8).digest(), "big") >> 1


@final
class StreamTrainLoader(TrainLoader):
    """The :class:`TrainLoader` of an iterable split.

    If the length is known, an epoch has ``length // (batch_size · world_size)`` batches on every rank, and a rank whose
    shard is exhausted starts over in another order. Otherwise an epoch is one pass, and only one rank is allowed:
    ranks with different numbers of batches would wait for each other forever.
    """

    def __init__(self, dataset: StreamDataset, workers: int, log: CorruptImageLog) -> None:
        length, shard = dataset.split.length, dataset.shard
        if length is None and shard.world_size > 1:
            raise UsageError("Training on several ranks needs the length of the stream: add ?length=N to its URI.")
        self._batches = None if length is None else length // shard.global_batch_size
        if self._batches == 0:
            raise UsageError(f"{length} training images do not fill one batch of {shard}.")
        self._dataset = replace(dataset, epoch=0)
        self._workers = workers
        self._log = log
        self._first = 0

    def __len__(self) -> int:
        if self._batches is None:  # TypeError is what len() of an unsized iterable raises
            raise TypeError("The stream's length is unknown: add ?length=N to its URI.")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, 0
        return self._epoch(replace(self._dataset, skipped=first), first)

    def set_epoch(self, epoch: int) -> None:
        self._dataset = replace(self._dataset, epoch=epoch)

    def skip(self, batches: int) -> None:
        """See :meth:`TrainLoader.skip`; skipped examples are read, but not decoded unless corrupt ones are skipped."""
        check_skip(batches, self._batches)
        self._first = batches

    def _epoch(self, dataset: StreamDataset, first: int) -> Iterator[Batch]:
        done, passes = 0, 0
        rest: Batch | None = None
        assert dataset.epoch is not None
        while self._batches is None or done < self._batches:
            before = done, len(rest[1]) if rest else 0
            loader = data_loader(replace(dataset, epoch=dataset.epoch + passes * _PASS), self._workers)
            for batch in delivered(iter(loader), self._log, self._workers):
                # In the first pass full batches overtake the remainders of other workers, so that batch n comes from
                # worker n mod workers and skipping can rely on it. Later passes fill up what is left first.
                full, rest = _fill(rest, batch, dataset.shard.batch_size, rest_first=passes > 0)
                if full is not None:
                    done += 1
                    if done > first:
                        yield full
                if done == self._batches:
                    return
            if self._batches is None:
                return
            if before == (done, len(rest[1]) if rest else 0):  # a pass without any image would repeat forever
                raise DataError("The stream has no readable images.")
            passes, dataset = passes + 1, replace(dataset, skipped=0)  # batches were skipped in the first pass only


@final
class StreamValLoader(ValLoader):
    """The :class:`ValLoader` of an iterable split; in the stored order with at most one worker."""

    def __init__(self, dataset: StreamDataset, workers: int, log: CorruptImageLog) -> None:
        self._dataset = dataset
        length, shard = dataset.split.length, dataset.shard
        # Shards of several ranks are as long as their files: only the length of the complete stream is known.
        self._batches = None if length is None or shard.world_size > 1 else math.ceil(length / shard.batch_size)
        self._workers = workers
        self._log = log

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("The length of this shard of the stream is unknown.")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        rest: Batch | None = None
        for batch in delivered(iter(data_loader(self._dataset, self._workers)), self._log, self._workers):
            full, rest = _fill(rest, batch, self._dataset.shard.batch_size)
            if full is not None:
                yield full
        if rest is not None:
            yield rest


def _fill(
    rest: Batch | None, batch: Batch, size: int, *, rest_first: bool = False
) -> tuple[Batch | None, Batch | None]:
    """Return a full batch, if one can be formed, and the rest; a full batch goes first unless ``rest_first``."""
    if len(batch[1]) == size and (rest is None or not rest_first):
        return batch, rest
    if rest is not None:
        batch = torch.cat((rest[0], batch[0])), torch.cat((rest[1], batch[1]))
    if len(batch[1]) < size:
        return None, batch
    full, left = ((batch[0][:size], batch[1][:size]), (batch[0][size:], batch[1][size:]))
    return full, left if len(left[1]) else None
