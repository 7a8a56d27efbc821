"""Map-style splits: image stores, datasets, and loaders that give the same batches for any number of workers and ranks.

Batch t of an epoch over all ranks is ``order[t·G : (t + 1)·G]``, with G = batch size · ranks and ``order`` a function
of seed and epoch. The main process sends positions in that order to the workers, so which worker loads a batch is
irrelevant. Images are either decoded on demand, or decoded once and cached in memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, final

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from repvgg.data.counter_rng import epoch_order
from repvgg.data.decode import CorruptImage, CorruptImageLog, to_pil
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
    parallel_map,
)
from repvgg.data.splits import MapSplit
from repvgg.data.transforms import BatchTransforms, Crop, Uncropped
from repvgg.errors import DataError, UsageError, is_out_of_memory

# What "auto" caches: above these, reading a file costs little next to training on it, and memory is short.
MAX_BYTES = 2**30  # per split
MAX_SIDE = 128  # pixels
_PROBES = 64  # images that are decoded to find out whether all have one size


class ImageStore(ABC):
    """Images of one size by index, before the batch transforms."""

    @abstractmethod
    def load(self, index: int, epoch: int) -> Tensor | CorruptImage:
        """Return the image (C, H, W) at ``index``."""

    @abstractmethod
    def load_batch(self, indices: Tensor, epoch: int) -> Tensor | None:
        """Return the images (N, C, H, W) at ``indices``, or None where they have to be loaded one by one."""


@final
class CachedImages(ImageStore):
    """Images in memory.

    Args:
        images: (N, C, H, W), uint8, or normalized float32.
        corrupt: the images that could not be read, by index.
    """

    def __init__(self, images: Tensor, corrupt: dict[int, CorruptImage] | None = None) -> None:
        self.images = images
        self._corrupt = corrupt or {}

    def load(self, index: int, epoch: int) -> Tensor | CorruptImage:
        return self._corrupt.get(index, self.images[index])

    def load_batch(self, indices: Tensor, epoch: int) -> Tensor | None:
        if self._corrupt and not self._corrupt.keys().isdisjoint(indices.tolist()):
            return None  # one by one, so that the caller can replace the corrupt ones
        return self.images.index_select(0, indices)


@final
class DecodedImages(ImageStore):
    """Images that are decoded at each access, and brought to one size by ``crop``."""

    def __init__(self, split: MapSplit, crop: Crop) -> None:
        self._split = split
        self._crop = crop

    def load(self, index: int, epoch: int) -> Tensor | CorruptImage:
        image = self._split.image(index)
        if isinstance(image, CorruptImage):
            return image
        pixels = self._crop(image, "", epoch, index)
        # The location is looked up for corrupt images only: for Hugging Face datasets it reads the row again.
        return replace(pixels, location=self._split.location(index)) if isinstance(pixels, CorruptImage) else pixels

    def load_batch(self, indices: Tensor, epoch: int) -> Tensor | None:
        return None


@final
class CachedSplit(MapSplit):
    """The decoded images of another split, all of one size, in memory."""

    def __init__(self, split: MapSplit, cached: CachedImages) -> None:
        self.classes = split.classes
        self.labels = split.labels
        self._split = split
        self._cached = cached

    def location(self, index: int) -> str:
        return self._split.location(index)

    def image(self, index: int) -> Image.Image | CorruptImage:
        pixels = self._cached.load(index, 0)
        return pixels if isinstance(pixels, CorruptImage) else to_pil(pixels)


def should_cache(split: MapSplit, shape: tuple[int, int, int] | None, channels: int) -> bool:
    """Return whether "auto" caches a split: a sample of its images is small and of one size, and all fit in memory.

    Args:
        split: the images.
        shape: (C, H, W) that is cached of each image, or None for the complete image.
        channels: of the cached images.
    """
    if shape is not None and len(split) * math.prod(shape) > MAX_BYTES:
        return False
    step = max(1, len(split) // _PROBES)  # spread over all classes, whose images may differ in size
    sizes: set[tuple[int, int]] = set()
    for index in range(0, len(split), step):
        image = split.image(index)
        if isinstance(image, CorruptImage):
            continue
        sizes.add(image.size)
        if len(sizes) > 1 or max(image.size) > MAX_SIDE:
            return False
    return bool(sizes) and len(split) * channels * math.prod(sizes.pop()) <= MAX_BYTES


def decode_all(split: MapSplit, crop: Crop, on_bad: str, workers: int) -> CachedImages | None:
    """Decode all images into memory; None if they have several sizes.

    Raises:
        DataError: an image is corrupt and ``on_bad`` is "raise", or all are.
        UsageError: they do not fit into memory.
    """
    images: Tensor | None = None
    corrupt: dict[int, CorruptImage] = {}
    # partial, not a closure: worker processes unpickle it.
    for index, pixels in enumerate(parallel_map(partial(_decode_and_crop, split, crop), len(split), workers)):
        if isinstance(pixels, CorruptImage):
            if on_bad == "raise":
                raise DataError(pixels.advice)
            corrupt[index] = pixels
            continue
        if images is None:  # the first readable image gives the size
            images = _allocate(len(split), pixels)
        if pixels.shape != images.shape[1:]:
            return None
        images[index] = pixels
    if images is None:
        raise DataError(f"None of the {len(split)} images can be read: {next(iter(corrupt.values()))}.")
    return CachedImages(images, corrupt)


def _allocate(number: int, like: Tensor) -> Tensor:
    try:
        return torch.zeros(number, *like.shape, dtype=torch.uint8)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = number * like.numel() / 2**30
        raise UsageError(f"{number:,} images take {size:,.0f} GiB of memory: use cache='none'.") from error


def _decode_and_crop(split: MapSplit, crop: Crop, index: int) -> Tensor | CorruptImage:
    image = split.image(index)
    return image if isinstance(image, CorruptImage) else crop(image, split.location(index))


def cache_uncropped(split: MapSplit, channels: int, on_bad: str, workers: int, *, required: bool) -> MapSplit:
    """Return a split with its images cached at their stored size, or ``split`` itself if they have several sizes.

    Raises:
        UsageError: they have several sizes, and caching is ``required``.
    """
    cached = decode_all(split, Uncropped(channels), on_bad, workers)
    if cached is not None:
        return CachedSplit(split, cached)
    if required:
        raise UsageError(
            "Images of several sizes cannot be cached in memory for random-resized crops: use cache='auto' or 'none'."
        )
    return split


class BatchRequest(NamedTuple):
    """Positions ``start`` … ``stop − 1`` in the order of ``epoch``."""

    epoch: int
    start: int
    stop: int


class TrainDataset(Dataset[LoadedBatch]):
    """Augmented training batches by position in an epoch. A copy of it lives in each worker.

    Args:
        store: the images at their final size.
        labels: (N,) int64.
        transforms: augmentation of the images.
        on_bad: "raise", or "skip": the next readable image in the order of the epoch replaces a corrupt one.
    """

    def __init__(self, store: ImageStore, labels: Tensor, transforms: BatchTransforms, on_bad: str) -> None:
        self._store = store
        self._labels = labels
        self._transforms = transforms
        self._on_bad = on_bad
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._labels)

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
        images = self._transforms(images, request.epoch, indices)
        return LoadedBatch(images, self._labels[indices], tuple(corrupt))

    def order(self, epoch: int) -> Tensor:
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


class ValDataset(Dataset[LoadedBatch]):
    """Validation batches by index; corrupt images are left out if ``on_bad`` is "skip"."""

    def __init__(self, store: ImageStore, labels: Tensor, on_bad: str) -> None:
        self.in_memory = isinstance(store, CachedImages)
        self._store = store
        self._labels = labels
        self._on_bad = on_bad

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, request: BatchRequest) -> LoadedBatch:  # a hook of DataLoader: one call per batch
        return self.at(torch.arange(request.start, request.stop))

    def at(self, indices: Tensor) -> LoadedBatch:
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
        """See :meth:`TrainLoader.skip`; skipped images are not read."""
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
    """The :class:`ValLoader` of a map-style split: rank r of R loads the images N·r // R … N·(r + 1) // R − 1.

    Args:
        dataset: the images.
        shard: batch size and rank.
        workers: processes that load.
        log: takes the corrupt images.
        sizes: of the images where they differ: a batch ends where the size changes.
    """

    def __init__(
        self,
        dataset: ValDataset,
        shard: RankShard,
        workers: int,
        log: CorruptImageLog,
        sizes: Sequence[object] | None = None,
    ) -> None:
        # Contiguous, and equal to within one image: the order over all ranks is that of the split.
        start, stop = (len(dataset) * (shard.rank + end) // shard.world_size for end in (0, 1))
        self._requests: list[BatchRequest] = []
        for index in range(start, stop):
            last = self._requests[-1] if self._requests else None
            fits = last is not None and last.stop - last.start < shard.batch_size
            if last is not None and fits and (sizes is None or sizes[index] == sizes[last.start]):
                self._requests[-1] = last._replace(stop=index + 1)
            else:
                self._requests.append(BatchRequest(0, index, index + 1))
        self._loader = data_loader(dataset, workers, self._requests)
        self._log = log

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Batch]:
        return delivered(iter(self._loader), self._log, self._loader.num_workers)
