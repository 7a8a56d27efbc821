"""Images and their masks: listed as files, decoded together, and cached in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repvgg.data.decode import CorruptImage, decode, stored_size, to_channels
from repvgg.data.label_sets import Bytes, LabelSet
from repvgg.data.loaders import parallel_map
from repvgg.data.splits import PackedStrings
from repvgg.errors import DataError, UsageError, is_out_of_memory

MAX_CACHE_BYTES = 2**30
_PROBES = 64  # masks whose size is read to estimate that of all images
_NO_COLOUR_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@final
@dataclass(frozen=True)
class MaskFiles:
    """The files of one image: its name in reports, and the paths of image and mask."""

    name: str
    image: str
    mask: str


class Pair(NamedTuple):
    """An image and the classes of its pixels."""

    pixels: Bytes  # (H, W, C)
    mask: Bytes  # (H, W)


@final
class MaskSplit:
    """Images with a mask each.

    Args:
        files: the images.
        labels: what the values of the masks mean.
        unmasked: images without a mask, which are no part of the split.
        unused: masks without an image.
    """

    def __init__(
        self, files: Sequence[MaskFiles], labels: LabelSet, unmasked: Sequence[str] = (), unused: Sequence[str] = ()
    ) -> None:
        self.labels = labels
        self.unmasked = tuple(unmasked)
        self.unused = tuple(unused)
        self._names = PackedStrings([one.name for one in files])
        self._images = PackedStrings([one.image for one in files])
        self._masks = PackedStrings([one.mask for one in files])

    def __len__(self) -> int:
        return len(self._names)

    def files(self, index: int) -> MaskFiles:
        return MaskFiles(self._names[index], self._images[index], self._masks[index])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> MaskSplit:
        return MaskSplit([self.files(index) for index in indices], self.labels, self.unmasked, self.unused)

    def joined(self, other: MaskSplit) -> MaskSplit:
        """Return the images of both splits, those of ``other`` last."""
        files = [split.files(index) for split in (self, other) for index in range(len(split))]
        return MaskSplit(files, self.labels, self.unmasked + other.unmasked, self.unused + other.unused)

    def with_labels(self, labels: LabelSet) -> MaskSplit:
        files = [self.files(index) for index in range(len(self))]
        return MaskSplit(files, labels, self.unmasked, self.unused)

    def size(self, index: int) -> tuple[int, int] | None:
        """Return width and height from the header of the mask; None if it cannot be read."""
        return stored_size(Path(self._masks[index]))

    def probed_sizes(self) -> list[tuple[int, int]]:
        """Return width and height of a sample of the images, evenly spaced."""
        sizes = (self.size(index) for index in range(0, len(self), max(1, len(self) // _PROBES)))
        return [size for size in sizes if size is not None]

    def pair(self, index: int, channels: int) -> Pair | CorruptImage:
        """Decode an image to ``channels`` channels, and its mask to classes."""
        files = self.files(index)
        decoded = decode(Path(files.image), files.image)
        if isinstance(decoded, CorruptImage):
            return decoded
        image = to_channels(decoded, channels, files.image)
        if isinstance(image, CorruptImage):
            return image
        labels = self.stored_labels(index)
        if isinstance(labels, CorruptImage):
            return labels
        if image.size != labels.shape[::-1]:
            height, width = labels.shape
            reason = f"has {width}x{height} pixels, but its image {files.image!r} has {image.size[0]}x{image.size[1]}"
            return CorruptImage(files.mask, "mask", reason)
        classes = self.labels.to_classes(labels)
        if isinstance(classes, str):
            advice = "correct the mask or the classes, or set ignore_index to that label if it marks unlabelled pixels"
            return CorruptImage(files.mask, "mask", classes, advice)
        pixels = np.array(image)  # a copy: arrays of PIL images are read-only, which torch refuses
        return Pair(pixels if pixels.ndim == 3 else pixels[:, :, None], classes)

    def stored_labels(self, index: int) -> Bytes | CorruptImage:
        """Decode a mask to labels as its file stores them."""
        path = self._masks[index]
        mask = decode(Path(path), path)
        return mask if isinstance(mask, CorruptImage) else _labels_of(mask, self.labels, path)


def _labels_of(mask: Image.Image, labels: LabelSet, path: str) -> Bytes | CorruptImage:
    if mask.mode in _NO_COLOUR_MODES:
        stored = np.asarray(mask)  # of a palette image: its indices
        if stored.dtype != np.uint8 and stored.max() > 255:
            return CorruptImage(path, "mask", f"holds label {stored.max()}, but labels go up to 255")
        return stored.astype(np.uint8)
    if labels.colours is None:
        return CorruptImage(
            path,
            "mask",
            f"has colours (mode {mask.mode}) in place of labels",
            "convert it to a PNG of label indices, or give each line of classes.txt a colour, as in 'road 128 64 128'",
        )
    rgb_HW3 = np.asarray(mask.convert("RGB")).astype(np.int32)
    codes_HW = rgb_HW3[:, :, 0] << 16 | rgb_HW3[:, :, 1] << 8 | rgb_HW3[:, :, 2]
    found = np.full(codes_HW.shape, -1, np.int16)
    for (red, green, blue), label in labels.colours.items():
        found[codes_HW == (red << 16 | green << 8 | blue)] = label
    missing = found < 0
    if missing.any():
        colour = tuple(rgb_HW3[missing][0].tolist())
        reason = f"has the colour {colour} in {int((codes_HW == codes_HW[missing][0]).sum())} pixels"
        return CorruptImage(path, "mask", f"{reason}, which classes.txt does not list", "add a line for it")
    return found.astype(np.uint8)


def largest_label(split: MaskSplit, workers: int, *, strict: bool) -> int:
    """Return the largest label in any mask of a split, without the ignored one.

    Raises:
        DataError: a mask cannot be read and ``strict`` is set, or none can.
    """
    largest, corrupt = -1, None
    # partial, not a closure: worker processes unpickle it.
    for found in parallel_map(partial(_largest_label, split), len(split), workers):
        if not isinstance(found, CorruptImage):
            largest = max(largest, found)
        elif strict:
            raise DataError(found.advice)
        else:
            corrupt = corrupt or found
    if largest < 0 and corrupt is not None:
        raise DataError(corrupt.advice)
    return largest


def _largest_label(split: MaskSplit, index: int) -> int | CorruptImage:
    labels = split.stored_labels(index)
    if isinstance(labels, CorruptImage):
        return labels
    present = np.flatnonzero(np.bincount(labels.reshape(-1), minlength=256))
    return int(max((label for label in present if label != split.labels.ignore_index), default=0))


class PairSource(ABC):
    """Images and masks by index."""

    @abstractmethod
    def pair(self, index: int) -> Pair | CorruptImage:
        """Return the image at ``index`` at its stored size, and its mask."""


@final
class DecodedPairs(PairSource):
    """Files that are decoded at each access."""

    def __init__(self, split: MaskSplit, channels: int) -> None:
        self._split = split
        self._channels = channels

    def pair(self, index: int) -> Pair | CorruptImage:
        return self._split.pair(index, self._channels)


@final
class CachedPairs(PairSource):
    """Decoded images and masks of any sizes, in one tensor, which worker processes share.

    Args:
        split: the images.
        channels: of the images.
        on_bad: "raise", or "skip" corrupt images.
        workers: processes that decode.

    Raises:
        DataError: an image is corrupt and ``on_bad`` is "raise".
        UsageError: they do not fit into memory.
    """

    def __init__(self, split: MaskSplit, channels: int, on_bad: str, workers: int) -> None:
        self._channels = channels
        self._corrupt: dict[int, CorruptImage] = {}
        # The headers of the masks give the sizes; where one cannot be read, the image is corrupt.
        sizes = [split.size(index) or (0, 0) for index in range(len(split))]
        self._sizes = torch.tensor(sizes, dtype=torch.int64).reshape(len(split), 2)
        self._ends = (self._sizes.prod(1) * (channels + 1)).cumsum(0)
        self._bytes = _allocate(int(self._ends[-1]) if len(split) else 0, len(split))
        for index, pair in enumerate(parallel_map(partial(split.pair, channels=channels), len(split), workers)):
            if isinstance(pair, CorruptImage):
                if on_bad == "raise":
                    raise DataError(pair.advice)
                self._corrupt[index] = pair
                continue
            image, mask = self._views(index)
            image[:], mask[:] = pair.pixels, pair.mask

    def pair(self, index: int) -> Pair | CorruptImage:
        return self._corrupt[index] if index in self._corrupt else self._views(index)

    def _views(self, index: int) -> Pair:
        width, height = self._sizes[index].tolist()
        stop, pixels = int(self._ends[index]), width * height
        stored = self._bytes[stop - pixels * (self._channels + 1) : stop].numpy()
        image = stored[: pixels * self._channels].reshape(height, width, self._channels)
        return Pair(image, stored[pixels * self._channels :].reshape(height, width))


def _allocate(number_of_bytes: int, images: int) -> Tensor:
    try:
        return torch.empty(number_of_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        size = number_of_bytes / 2**30
        raise UsageError(f"{images:,} images take {size:,.0f} GiB of memory: use cache='none'.") from error


def fits_in_cache(split: MaskSplit, channels: int) -> bool:
    """Return whether all images and masks take at most :data:`MAX_CACHE_BYTES`, estimated from a sample."""
    sizes = split.probed_sizes()
    pixels = sum(width * height for width, height in sizes)
    return bool(sizes) and pixels / len(sizes) * len(split) * (channels + 1) <= MAX_CACHE_BYTES
