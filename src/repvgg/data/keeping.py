"""Training images and images to judge by before anything random that works on batches: kept in memory, or decoded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, final

import torch
from PIL import Image
from torch import Tensor

from repvgg.data.decoding import Bad
from repvgg.data.parts import IndexedPart, to_image
from repvgg.data.workers import in_order
from repvgg.errors import DataError, UsageError

if TYPE_CHECKING:
    from repvgg.data.image_ops import CentreCrop, RandomCrop

LIMIT = 2**30  # bytes that "auto" keeps at most, for each part
SMALL = 128  # pixels
_PROBES = 64  # images that are looked at before all are


class BaseImages(ABC):
    """Images of one size, before jitter, flip and the like."""

    @abstractmethod
    def one(self, index: int, epoch: int) -> Tensor | Bad:
        """The image (C, H, W) at ``index``."""

    @abstractmethod
    def all_of(self, indices: Tensor, epoch: int) -> Tensor | None:
        """The images (N, C, H, W) at ``indices``, or None where they have to be asked for one by one."""


@final
class KeptImages(BaseImages):
    """Images that lie in memory.

    Args:
        images: (N, C, H, W), uint8, or float32 that is normalized.
        bad: those that could not be read, by their index.
    """

    def __init__(self, images: Tensor, bad: dict[int, Bad] | None = None) -> None:
        self.images = images
        self._bad = bad or {}

    def one(self, index: int, epoch: int) -> Tensor | Bad:
        """See :meth:`BaseImages.one`."""
        return self._bad.get(index, self.images[index])

    def all_of(self, indices: Tensor, epoch: int) -> Tensor | None:
        """See :meth:`BaseImages.all_of`."""
        if self._bad and not self._bad.keys().isdisjoint(indices.tolist()):
            return None
        return self.images.index_select(0, indices)


@final
class DecodedImages(BaseImages):
    """Images that are decoded when they are asked for.

    Args:
        part: where they come from.
        crop: makes one size of them.
    """

    def __init__(self, part: IndexedPart, crop: CentreCrop | RandomCrop) -> None:
        self._part = part
        self._crop = crop

    def one(self, index: int, epoch: int) -> Tensor | Bad:
        """See :meth:`BaseImages.one`."""
        from repvgg.data.image_ops import CentreCrop

        image = self._part.image(index)
        if isinstance(image, Bad):
            return image
        drawn = () if isinstance(self._crop, CentreCrop) else (epoch, index)
        pixels: Tensor | Bad = self._crop(image, "", *drawn)
        return replace(pixels, where=self._part.where(index)) if isinstance(pixels, Bad) else pixels

    def all_of(self, indices: Tensor, epoch: int) -> Tensor | None:
        """See :meth:`BaseImages.all_of`."""
        return None


@final
class KeptPart(IndexedPart):
    """The decoded images of another part, all of one size, in memory."""

    def __init__(self, part: IndexedPart, images: Tensor, bad: dict[int, Bad]) -> None:
        self.classes = part.classes
        self.labels = part.labels
        self._part = part
        self._images = images
        self._bad = bad

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return self._part.where(index)

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`."""
        return self._bad.get(index) or to_image(self._images[index])


def is_worth_keeping(part: IndexedPart, shape: tuple[int, int, int] | None, channels: int) -> bool:
    """Whether "auto" keeps a part: its images are small and of one size, as far as a look at some of them tells.

    Args:
        part: the images.
        shape: what is kept of each, or None for all of it.
        channels: what it is converted to.
    """
    if shape is not None and len(part) * math.prod(shape) > LIMIT:
        return False
    step = max(1, len(part) // _PROBES)
    sizes: set[tuple[int, int]] = set()
    for index in range(0, len(part), step):
        image = part.image(index)
        if isinstance(image, Bad):
            continue
        sizes.add(image.size)
        if len(sizes) > 1 or max(image.size) > SMALL:
            return False
    return bool(sizes) and len(part) * channels * math.prod(sizes.pop()) <= LIMIT


def decode_all(
    part: IndexedPart, crop: Callable[[Image.Image, str], Tensor | Bad], on_bad: str, workers: int
) -> tuple[Tensor, dict[int, Bad]] | None:
    """All images of a part in one tensor, with those that are bad; None if they are not of one size.

    Raises:
        DataError: an image is bad and ``on_bad`` is "raise", or all are.
    """
    images: Tensor | None = None
    bad: dict[int, Bad] = {}
    for index, pixels in enumerate(in_order(_Cropped(part, crop), len(part), workers)):
        if isinstance(pixels, Bad):
            if on_bad == "raise":
                raise DataError(pixels.advice)
            bad[index] = pixels
            continue
        if images is None:
            images = torch.zeros(len(part), *pixels.shape, dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            return None
        images[index] = pixels
    if images is None:
        raise DataError(f"Not one of {len(part)} images can be read: {next(iter(bad.values()))}.")
    return images, bad


@final
class _Cropped:
    """Index → pixels; a value, so that loading processes can have it."""

    def __init__(self, part: IndexedPart, crop: Callable[[Image.Image, str], Tensor | Bad]) -> None:
        self._part = part
        self._crop = crop

    def __call__(self, index: int) -> Tensor | Bad:
        image = self._part.image(index)
        return image if isinstance(image, Bad) else self._crop(image, self._part.where(index))


def keep_raw(part: IndexedPart, channels: int, on_bad: str, workers: int, *, insist: bool) -> IndexedPart:
    """A part with its images in memory as they are stored, or the part itself if they are not of one size.

    Raises:
        UsageError: they are not of one size, and ``insist``.
    """
    from repvgg.data.image_ops import AsStored

    kept = decode_all(part, AsStored(channels), on_bad, workers)
    if kept is not None:
        return KeptPart(part, *kept)
    if insist:
        raise UsageError(
            "Images of several sizes cannot be kept in memory for random-resized crops: leave cache alone."
        )
    return part
