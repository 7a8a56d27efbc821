"""What every data set hands over: images with labels, in two parts, with what was done to the pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repvgg.errors import DataError


class LabelledImages(Dataset[tuple[Tensor, Tensor]], ABC):
    """A sized, indexable set of normalized images (C, H, W) in float32, each with its label, an int64 scalar."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The image (C, H, W) and the label () at ``index``."""


@final
class ImagesInMemory(LabelledImages):
    """Images (N, C, H, W) and labels (N,) that lie in memory as two tensors.

    Raises:
        DataError: no images, not four axes, not float32, or not one int64 label an image.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or images.dtype != torch.float32 or len(images) == 0:
            raise DataError(
                f"Images are a float32 tensor (N, C, H, W) with N > 0, not {images.dtype} {tuple(images.shape)}."
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise DataError(
                f"{len(images)} images need as many int64 labels, not {labels.dtype} {tuple(labels.shape)}."
            )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@final
@dataclass(frozen=True)
class ImageSplit:
    """A data set in two parts that share classes and normalization: ``x = (pixel − mean) / std``, pixels in [0, 1].

    Attributes:
        name: what the data set is called, its URI where it has one.
        train: the images to learn from.
        held_out: the images to judge by; never used for a choice.
        classes: one name a label, in the order of the labels.
        mean: one number a channel.
        std: one number a channel, positive.
        input_shape: (C, H, W) of every image.

    Raises:
        DataError: a part is empty, fewer than two classes, or normalization that does not fit the channels.
    """

    name: str
    train: LabelledImages
    held_out: LabelledImages
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if len(self.train) == 0 or len(self.held_out) == 0:
            raise DataError(
                f"{self.name} has an empty part: {len(self.train)} to train, {len(self.held_out)} held out."
            )
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has {len(self.classes)} class: there is nothing to tell apart.")
        channels = self.input_shape[0]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise DataError(
                f"{self.name} needs a mean and a positive std for each of {channels} channels, "
                f"not {self.mean} and {self.std}."
            )

    def normalize(self, pixels: Tensor) -> Tensor:
        """Map pixels (…, C, H, W) in [0, 1] to what a model takes."""
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map normalized images (…, C, H, W) back to pixels in [0, 1], to look at."""
        pixels = images * self._per_channel(self.std, images) + self._per_channel(self.mean, images)
        return pixels.clamp(0, 1)

    @property
    def black(self) -> tuple[float, ...]:
        """The value of a pixel of 0 after normalization, one number a channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
