"""``fake:[N][xCLASSES]``: images that are made up, can be learned, and need no file; and the digits."""

from __future__ import annotations

import math
import re
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repvgg.data.decoding import Bad
from repvgg.data.digits import digit_pixels
from repvgg.data.drawing import hashed
from repvgg.data.parts import ArrayPart, IndexedPart, Source, to_image
from repvgg.data.uri import DataUri
from repvgg.errors import UsageError

FAKE_SIZE, DIGITS_SIZE = 32, 32
_IMAGES, _CLASSES = 1000, 10
_IN_MEMORY = 64 * 2**20  # bytes
_NOISE = 40.0  # standard deviation, of 255


def open_fake(uri: DataUri, size: int | None) -> Source:
    """N training images (1000) of CLASSES classes (10), and a fifth as many to judge by, always the same ones.

    Every class has a colour and a wave of its own direction, frequency and phase; every image has another contrast,
    and noise. Labels take turns: image i is of class ``i mod CLASSES``.

    Raises:
        UsageError: what follows the colon is no number, or there are fewer than two images a class.
    """
    uri.check_options()
    match = re.fullmatch(r"(\d+)?(?:x(\d+))?", uri.rest)
    if not match:
        raise UsageError(f"{uri.text!r} is not understood: write fake:IMAGESxCLASSES, as in fake:1000x10.")
    number, classes = int(match[1] or _IMAGES), int(match[2] or _CLASSES)
    if classes < 2 or number < classes:
        raise UsageError(f"{uri.text!r} needs two classes or more, and an image a class.")
    parts = [FakePart(first, count, classes, size or FAKE_SIZE) for first, count in _ranges(number, classes)]
    train, held_out = (part.in_memory() for part in parts)
    return Source(train, held_out, 3, FAKE_SIZE)


def _ranges(number: int, classes: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First image and number of images of both parts; the second starts with class 0 too."""
    return (0, number), (math.ceil(number / classes) * classes, max(classes, number // 5))


@final
class FakePart(IndexedPart):
    """Images that are computed when they are asked for, from their number alone."""

    def __init__(self, first: int, count: int, classes: int, size: int) -> None:
        self.classes = tuple(map(str, range(classes)))
        self.labels = torch.arange(first, first + count) % classes
        self._first = first
        self._size = size

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return f"fake image {self._first + index}"

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`."""
        return to_image(self.pixels(index))

    def pixels(self, index: int) -> Tensor:
        """The image (3, H, W) uint8 at ``index``."""
        generator = torch.Generator().manual_seed(self._first + index)
        clean = _class_image(int(self.labels[index]), self._size)
        contrast = 0.5 + torch.rand((), generator=generator)
        noise = torch.randn(clean.shape, generator=generator) * _NOISE
        return (127.5 + contrast * clean + noise).round().clamp(0, 255).to(torch.uint8)

    def in_memory(self) -> IndexedPart:
        """The same part as one tensor, if that is small."""
        if len(self) * 3 * self._size**2 > _IN_MEMORY:
            return self
        images = torch.stack([self.pixels(index) for index in range(len(self))])
        return ArrayPart("fake", images, self.labels, self.classes)


def _class_image(label: int, size: int) -> Tensor:
    """What all images of a class (3, H, W) share, around 0."""
    bits = hashed(0, 0, np.arange(6, dtype=np.uint64) + np.uint64(6) * np.uint64(label))
    draws = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).float()
    angle, phase, waves = draws[0] * math.pi, draws[1] * 2 * math.pi, 1 + 3 * draws[2]
    colour_311 = (draws[3:] * 2 - 1).reshape(3, 1, 1)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    wave = torch.sin(2 * math.pi * waves * (x * angle.cos() + y * angle.sin()) + phase)
    return 40 * colour_311 + 35 * wave


def open_digits(uri: DataUri, train_size: int | None, test_size: int | None) -> Source:
    """The digits of scikit-learn, see :func:`repvgg.data.digits.digit_pixels`, normalized by the part to learn from.

    Raises:
        UsageError: something follows the colon, or a size below 8.
        MissingDependencyError: scikit-learn is not installed.
    """
    if uri.rest or uri.options:
        raise UsageError(f"Nothing follows the colon of 'digits:', not {uri.rest!r}.")
    size = train_size or DIGITS_SIZE
    scans = digit_pixels(size)
    judged = scans if test_size in (None, size) else digit_pixels(test_size or size)
    classes = tuple("0123456789")
    train = ArrayPart("digits", scans.pixels[scans.train], scans.labels[scans.train], classes)
    held_out = ArrayPart("digits", judged.pixels[judged.held_out], judged.labels[judged.held_out], classes)
    return Source(train, held_out, 1, DIGITS_SIZE, (scans.mean,), (scans.std,))
