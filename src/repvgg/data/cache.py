"""Images of one size by index, either decoded on demand or decoded once and cached in memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from PIL import Image
from torch import Tensor

from repvgg.data.decode import CorruptImage, to_pil
from repvgg.data.splits import MapSplit
from repvgg.data.transforms import Crop, Uncropped
from repvgg.data.workers import parallel_map
from repvgg.errors import DataError, UsageError

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
    """Images that are decoded at each access.

    Args:
        split: the encoded images.
        crop: brings them to one size.
    """

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
    """
    images: Tensor | None = None
    corrupt: dict[int, CorruptImage] = {}
    for index, pixels in enumerate(parallel_map(_DecodeAndCrop(split, crop), len(split), workers)):
        if isinstance(pixels, CorruptImage):
            if on_bad == "raise":
                raise DataError(pixels.advice)
            corrupt[index] = pixels
            continue
        if images is None:  # the first readable image gives the size
            images = torch.zeros(len(split), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            return None
        images[index] = pixels
    if images is None:
        raise DataError(f"None of the {len(split)} images can be read: {next(iter(corrupt.values()))}.")
    return CachedImages(images, corrupt)


@final
@dataclass(frozen=True)
class _DecodeAndCrop:
    """Index → pixels; a class instead of a closure, because worker processes unpickle it."""

    split: MapSplit
    crop: Crop

    def __call__(self, index: int) -> Tensor | CorruptImage:
        image = self.split.image(index)
        return image if isinstance(image, CorruptImage) else self.crop(image, self.split.location(index))


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
