"""What a source hands over: parts of labelled images, indexed or streamed, as they are stored."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from PIL import Image
from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.data.decoding import Bad, decode
from repvgg.errors import DataError

FOLDER_SIZE = 224


class IndexedPart(ABC):
    """Labelled images of which any can be had at any time."""

    classes: tuple[str, ...]
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def where(self, index: int) -> str:
        """Where the image at ``index`` lies, for people."""

    @abstractmethod
    def image(self, index: int) -> Image.Image | Bad:
        """The image at ``index``, decoded, in the mode that it is stored in."""

    def select(self, indices: Tensor) -> IndexedPart:
        """A part that holds some of the images only, in the order of ``indices`` (M,) int64."""
        return SelectedPart(self, indices)


@final
class SelectedPart(IndexedPart):
    """Some of the images of another part."""

    def __init__(self, whole: IndexedPart, indices: Tensor) -> None:
        self.classes = whole.classes
        self.labels = whole.labels[indices]
        self._whole = whole
        self._indices = indices

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return self._whole.where(int(self._indices[index]))

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`."""
        return self._whole.image(int(self._indices[index]))


@final
class FilesPart(IndexedPart):
    """Images that are files below one folder.

    Args:
        root: the folder.
        paths: relative to it.
        labels: (N,) int64.
        classes: names of the labels.
    """

    def __init__(self, root: Path, paths: Sequence[str], labels: Tensor, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.labels = labels
        self.root = root
        self._paths = PackedStrings(paths)

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return str(self.root / self._paths[index])

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`."""
        path = self.root / self._paths[index]
        return decode(path, str(path))


@final
class ArrayPart(IndexedPart):
    """Images that lie in memory.

    Args:
        name: what the data set is called.
        pixels: (N, C, H, W), uint8, or float32 in [0, 1].
        labels: (N,) int64.
        classes: names of the labels.

    Raises:
        DataError: other shapes or dtypes.
    """

    def __init__(self, name: str, pixels: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        if pixels.ndim != 4 or pixels.dtype not in (torch.uint8, torch.float32) or pixels.shape[1] not in (1, 3):
            raise DataError(f"{name} holds no images but {pixels.dtype} {tuple(pixels.shape)}.")
        if labels.shape != pixels.shape[:1]:
            raise DataError(f"{name} has {len(pixels)} images and {len(labels)} labels.")
        self.name = name
        self.classes = classes
        self.labels = labels
        self.pixels = pixels

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return f"{self.name} image {index}"

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`; pixels in float32 are rounded to 8 bits."""
        pixels = self.pixels[index]
        if pixels.dtype == torch.float32:
            pixels = (pixels * 255).round().to(torch.uint8)
        return to_image(pixels)

    def select(self, indices: Tensor) -> IndexedPart:
        """See :meth:`IndexedPart.select`."""
        return ArrayPart(self.name, self.pixels[indices], self.labels[indices], self.classes)


@final
@dataclass(frozen=True)
class Example:
    """One image of a stream, not decoded yet.

    Attributes:
        where: where it lies, for people.
        data: its file.
        label: its class.
    """

    where: str
    data: bytes
    label: int


class StreamPart(ABC):
    """Labelled images that come one after the other."""

    classes: tuple[str, ...]
    length: int | None  # None: nobody says

    @abstractmethod
    def examples(self, shuffle: tuple[int, int] | None, share: int, shares: int) -> Iterator[Example | Bad]:
        """The examples of one of ``shares`` disjoint shares that together hold every example once.

        Args:
            shuffle: seed and epoch of the order, or None for the order in which they are stored.
            share: which share, 0 … shares − 1.
            shares: how many there are: processes that train, times loading processes of each.
        """

    @abstractmethod
    def shards(self) -> int:
        """How many shares at most are not empty."""


Part = IndexedPart | StreamPart


@final
@dataclass(frozen=True)
class Source:
    """What is behind a URI.

    Attributes:
        train: the images to learn from.
        held_out: the images to judge by; None where the URI holds one part only.
        channels: of the images, unless another number is asked for.
        size: height and width of training images, unless others are asked for.
        mean: one number a channel.
        std: one number a channel.
        notes: what a person should know about how the parts came about.
    """

    train: Part
    held_out: Part | None
    channels: int = 3
    size: int = FOLDER_SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: tuple[str, ...] = ()


@final
class PackedStrings:
    """Many strings in two tensors: processes share them, and none copies a million objects.

    Args:
        strings: paths; bytes that are no text survive.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        self._ends = torch.tensor([len(one) for one in encoded], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])].numpy().tobytes())


def to_image(pixels_CHW: Tensor) -> Image.Image:
    """An image of uint8 pixels, RGB or grey."""
    array = pixels_CHW.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def length_of(part: Part) -> int | None:
    """Number of images of a part; None for a stream that does not know."""
    return len(part) if isinstance(part, IndexedPart) else part.length
