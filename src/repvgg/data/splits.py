"""Splits as their sources store them: labelled images by index (``MapSplit``) or in sequence (``IterableSplit``)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import torch
from PIL import Image
from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.data.decode import CorruptImage, decode, to_pil
from repvgg.errors import DataError

DEFAULT_SIZE = 224  # pixels, of sources whose images have various sizes


class MapSplit(ABC):
    """Labelled images with random access.

    Attributes:
        classes: one name per label.
        labels: (N,) int64.
    """

    classes: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def location(self, index: int) -> str:
        """Return the path, or a description, of the image at ``index``, for messages."""

    @abstractmethod
    def image(self, index: int) -> Image.Image | CorruptImage:
        """Decode the image at ``index``, in the mode in which it is stored."""

    def select(self, indices: Tensor) -> MapSplit:
        return SubsetSplit(self, indices)


@final
class SubsetSplit(MapSplit):
    """Some of the images of another split."""

    def __init__(self, parent: MapSplit, indices: Tensor) -> None:
        self.classes = parent.classes
        self.labels = parent.labels[indices]
        self._parent = parent
        self._indices = indices

    def location(self, index: int) -> str:
        return self._parent.location(int(self._indices[index]))

    def image(self, index: int) -> Image.Image | CorruptImage:
        return self._parent.image(int(self._indices[index]))


@final
class JoinedSplit(MapSplit):
    """Two splits of the same classes, one after the other."""

    def __init__(self, first: MapSplit, second: MapSplit) -> None:
        self.classes = first.classes
        self.labels = torch.cat([first.labels, second.labels])
        self._splits = first, second

    def location(self, index: int) -> str:
        split, inside = self._find(index)
        return split.location(inside)

    def image(self, index: int) -> Image.Image | CorruptImage:
        split, inside = self._find(index)
        return split.image(inside)

    def _find(self, index: int) -> tuple[MapSplit, int]:
        first, second = self._splits
        return (first, index) if index < len(first) else (second, index - len(first))


@final
class FileSplit(MapSplit):
    """Image files below the folder ``root``; ``paths`` are relative to it."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.labels = labels
        self.root = root
        self._paths = PackedStrings(paths)

    def location(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def image(self, index: int) -> Image.Image | CorruptImage:
        path = self.root / self._paths[index]
        return decode(path, str(path))


@final
class TensorSplit(MapSplit):
    """Images in one tensor.

    Args:
        name: of the dataset, for messages.
        pixels: (N, C, H, W), uint8, or float32 in [0, 1]; C is 1 or 3.

    Raises:
        DataError: other shapes or dtypes.
    """

    def __init__(self, name: str, pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        if pixels.ndim != 4 or pixels.dtype not in (torch.uint8, torch.float32) or pixels.shape[1] not in (1, 3):
            raise DataError(f"{name} must hold images (N, C, H, W), got {pixels.dtype} {tuple(pixels.shape)}.")
        if labels.shape != pixels.shape[:1]:
            raise DataError(f"{name} has {len(pixels)} images but {len(labels)} labels.")
        self.name = name
        self.classes = classes
        self.labels = labels
        self.pixels = pixels

    def location(self, index: int) -> str:
        return f"{self.name} image {index}"

    def image(self, index: int) -> Image.Image | CorruptImage:
        """Return the image at ``index``; float32 pixels are rounded to 8 bits."""
        pixels = self.pixels[index]
        if pixels.dtype == torch.float32:
            pixels = (pixels * 255).round().to(torch.uint8)
        return to_pil(pixels)

    def select(self, indices: Tensor) -> MapSplit:
        # A tensor again, so that the fast path for images in memory still applies.
        return TensorSplit(self.name, self.pixels[indices], self.labels[indices], self.classes)


@final
@dataclass(frozen=True)
class Example:
    """One encoded image of a stream."""

    location: str  # path of the archive and the entry, for messages
    data: bytes  # content of the image file
    label: int  # index of the class


class Shuffle(NamedTuple):
    """The key of a random order."""

    seed: int
    epoch: int


class IterableSplit(ABC):
    """Labelled images that are read in sequence.

    Attributes:
        classes: one name per label.
        length: number of images; None where it is unknown.
    """

    classes: tuple[str, ...]
    length: int | None

    @abstractmethod
    def examples(self, shuffle: Shuffle | None, shard: int, num_shards: int) -> Iterator[Example | CorruptImage]:
        """Yield the examples of one of ``num_shards`` disjoint shards, which together hold every example once.

        Args:
            shuffle: key of the order, or None for the stored order.
            shard: index, 0 … num_shards − 1.
            num_shards: number of ranks times number of workers per rank.
        """


Split = MapSplit | IterableSplit


@final
@dataclass(frozen=True)
class Source:
    """The splits of an opened URI and the source's defaults."""

    train: Split  # the training images
    val: Split | None  # the validation images; None where the URI holds a single split
    channels: int = 3  # default number of channels
    size: int = DEFAULT_SIZE  # default height and width of training images
    mean: tuple[float, ...] = IMAGENET_MEAN  # default mean, one number per channel
    std: tuple[float, ...] = IMAGENET_STD  # default standard deviation, one number per channel
    notes: tuple[str, ...] = ()  # remarks for the user on how the splits were chosen, a sentence each


@final
class PackedStrings:
    """A sequence of strings in two tensors.

    Tensors are shared with worker processes; a list of a million ``str`` would be pickled and copied to each of them.

    Args:
        strings: paths; bytes that are not valid text survive as surrogates.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        # frombuffer refuses an empty buffer, hence the single spare byte.
        self._bytes = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        self._ends = torch.tensor([len(one) for one in encoded], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0  # ends, not offsets: N numbers for N strings
        return os.fsdecode(self._bytes[start : int(self._ends[index])].numpy().tobytes())


def num_images(split: Split) -> int | None:
    """Return the number of images; None for a stream of unknown length."""
    return len(split) if isinstance(split, MapSplit) else split.length
