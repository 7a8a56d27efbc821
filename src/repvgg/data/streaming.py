"""Batches of images that come one after the other.

The order depends on the number of processes, those that train and those that load: the same numbers give the same
batches. Every example is read once an epoch, except for what is left when no batch can be filled any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from repvgg.data.bad import BadImages
from repvgg.data.batch_ops import BatchOps
from repvgg.data.batching import Loaded, failed
from repvgg.data.decoding import Bad, decode
from repvgg.data.loading import Batch, HeldOutLoader, Share, TrainLoader, batches_of, check_skip
from repvgg.data.parts import Example, StreamPart
from repvgg.data.workers import data_loader
from repvgg.errors import DataError, UsageError

if TYPE_CHECKING:
    from repvgg.data.image_ops import CentreCrop, PolicyOps, RandomCrop

_PASS = 1 << 32  # a second pass of an epoch draws anew


@final
@dataclass(frozen=True)
class StreamOps:
    """What is done to the images of a stream.

    Attributes:
        crop: makes one size of them.
        ops: augmentation of whole batches, or None to judge.
        policy: augmentation image by image, or None.
        on_bad: "raise", or "skip".
    """

    crop: CentreCrop | RandomCrop
    ops: BatchOps | None
    policy: PolicyOps | None
    on_bad: str


@final
@dataclass(frozen=True)
class StreamImages(IterableDataset[Loaded]):
    """One pass over the share of one process; full batches, then what is left. Goes to the loading processes.

    Attributes:
        part: the stream.
        todo: what is done to its images.
        share: images a batch, and which process of those that train this is.
        epoch: of the order and the augmentation, or None for the order in which examples are stored.
        skipped: batches of all loading processes that nobody wants: they are not decoded, where that is certain.
    """

    part: StreamPart
    todo: StreamOps
    share: Share
    epoch: int | None = None
    skipped: int = 0

    def __iter__(self) -> Iterator[Loaded]:
        here = get_worker_info()
        worker, workers = (0, 1) if here is None else (here.id, here.num_workers)
        shuffle = None if self.epoch is None or self.todo.ops is None else (self.todo.ops.seed, self.epoch)
        examples = self.part.examples(shuffle, self.share.rank * workers + worker, self.share.world_size * workers)
        unwanted = max(0, (self.skipped - worker + workers - 1) // workers)  # batch n of ours is n·workers + worker
        batch: list[tuple[Example, Tensor | None]] = []
        bad: list[Bad] = []
        for example in examples:
            image = self._image(example, decoded=unwanted == 0 or self.todo.on_bad == "skip")
            if isinstance(image, str):
                yield failed(image, bad)
                return
            if isinstance(image, Bad):
                bad.append(image)
                continue
            assert isinstance(example, Example)
            batch.append((example, image))
            if len(batch) == self.share.batch_size:
                yield self._loaded(batch, bad)
                batch, bad, unwanted = [], [], max(0, unwanted - 1)
        if batch or bad:
            yield self._last(batch, bad)

    def _image(self, example: Example | Bad, *, decoded: bool) -> Tensor | Bad | str | None:
        """Pixels, None if they are not wanted, what is wrong with them, or a sentence that ends it all."""
        image = example if isinstance(example, Bad) else self._pixels(example) if decoded else None
        if isinstance(image, Bad):
            return image if self.todo.on_bad == "skip" else image.advice
        if isinstance(example, Example) and not 0 <= example.label < len(self.part.classes):
            classes = len(self.part.classes)
            return f"{example.where!r} has label {example.label}, but there are the classes 0 … {classes - 1}."
        return image

    def _last(self, batch: list[tuple[Example, Tensor | None]], bad: list[Bad]) -> Loaded:
        """A batch that is not full is always wanted: it may fill another one up."""
        whole = []
        for example, image in batch:
            pixels = self._pixels(example) if image is None else image
            if isinstance(pixels, Bad):
                return failed(pixels.advice, bad)
            whole.append((example, pixels))
        return self._loaded(whole, bad)

    def _pixels(self, example: Example) -> Tensor | Bad:
        from repvgg.data.image_ops import CentreCrop

        image = decode(example.data, example.where)
        if isinstance(image, Bad):
            return image
        if isinstance(self.todo.crop, CentreCrop):
            return self.todo.crop(image, example.where)
        return self.todo.crop(image, example.where, self.epoch or 0, _key(example))

    def _loaded(self, batch: Sequence[tuple[Example, Tensor | None]], bad: list[Bad]) -> Loaded:
        labels = torch.tensor([example.label for example, _ in batch], dtype=torch.int64)
        pixels = [image for _, image in batch if image is not None]
        if len(pixels) < len(batch) or not batch:  # nobody wants it: what counts is that it is one
            return Loaded(torch.zeros(len(batch), 0), labels, tuple(bad))
        images, epoch = torch.stack(pixels), self.epoch or 0
        if self.todo.ops is not None:
            keys = torch.tensor([_key(example) for example, _ in batch])
            images = self.todo.ops.move(images, epoch, keys)
            images = images if self.todo.policy is None else self.todo.policy(images, epoch, keys)
            images = self.todo.ops.erase(images, epoch, keys)
        return Loaded(images, labels, tuple(bad))


def _key(example: Example) -> int:
    """63 bits that stand for an image which has no number: a hash of its file."""
    return int.from_bytes(hashlib.blake2b(example.data, digest_size=8).digest(), "big") >> 1


@final
class StreamTrainLoader(TrainLoader):
    """See :class:`TrainLoader`.

    If the length of the stream is known, an epoch has ``length // (batch_size · world_size)`` batches on every rank; a
    rank whose share runs dry starts over in another order. If not, it has what is there, and there is one rank only.
    """

    def __init__(self, part: StreamPart, todo: StreamOps, share: Share, workers: int, bad: BadImages) -> None:
        if part.length is None and share.world_size > 1:
            raise UsageError("Several processes need to know how long the stream is: add ?length=N to its URI.")
        self._batches = None if part.length is None else part.length // share.step
        if self._batches == 0:
            raise UsageError(f"{part.length} training images do not fill one batch of {share}.")
        self._images = StreamImages(part, todo, share, epoch=0)
        self._workers = workers
        self._bad = bad
        self._first = 0

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("Nobody says how long this stream is: add ?length=N to its URI.")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        first, self._first = self._first, 0
        return self._run(replace(self._images, skipped=first), first)

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`TrainLoader.set_epoch`."""
        self._images = replace(self._images, epoch=epoch)

    def skip(self, batches: int) -> None:
        """See :meth:`TrainLoader.skip`; what is skipped is read, but not decoded, unless bad images are skipped.

        Raises:
            UsageError: a negative number, or more than an epoch is known to have.
        """
        check_skip(batches, self._batches)
        self._first = batches

    def _run(self, images: StreamImages, first: int) -> Iterator[Batch]:
        done, passes = 0, 0
        rest: Batch | None = None
        assert images.epoch is not None
        while self._batches is None or done < self._batches:
            before = done, len(rest[1]) if rest else 0
            loader = data_loader(replace(images, epoch=images.epoch + passes * _PASS), self._workers)
            for batch in batches_of(iter(loader), self._bad, self._workers):
                full, rest = _filled(rest, batch, images.share.batch_size, rest_first=passes > 0)
                if full is not None:
                    done += 1
                    if done > first:
                        yield full
                if done == self._batches:
                    return
            if self._batches is None:
                return
            if before == (done, len(rest[1]) if rest else 0):
                raise DataError("The stream has no images that can be read.")
            passes, images = passes + 1, replace(images, skipped=0)


@final
class StreamHeldOutLoader(HeldOutLoader):
    """See :class:`HeldOutLoader`; in the order of the stream with at most one loading process."""

    def __init__(self, part: StreamPart, todo: StreamOps, share: Share, workers: int, bad: BadImages) -> None:
        self._images = StreamImages(part, todo, share)
        self._batches = None if part.length is None or share.world_size > 1 else -(-part.length // share.batch_size)
        self._workers = workers
        self._bad = bad

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("Nobody says how long this share of the stream is.")
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        rest: Batch | None = None
        for batch in batches_of(iter(data_loader(self._images, self._workers)), self._bad, self._workers):
            full, rest = _filled(rest, batch, self._images.share.batch_size)
            if full is not None:
                yield full
        if rest is not None:
            yield rest


def _filled(
    rest: Batch | None, batch: Batch, size: int, *, rest_first: bool = False
) -> tuple[Batch | None, Batch | None]:
    """A full batch, if one can be made, and what is left; a full batch overtakes the rest unless ``rest_first``."""
    if len(batch[1]) == size and (rest is None or not rest_first):
        return batch, rest
    if rest is not None:
        batch = torch.cat((rest[0], batch[0])), torch.cat((rest[1], batch[1]))
    if len(batch[1]) < size:
        return None, batch
    full, left = ((batch[0][:size], batch[1][:size]), (batch[0][size:], batch[1][size:]))
    return full, left if len(left[1]) else None
