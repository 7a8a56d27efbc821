"""Handwritten digits that come with scikit-learn: real scans, no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.errors import UsageError, require

SPLIT_STATE = 0  # of the split alone: a training seed never moves an image from one part to the other
HELD_OUT = 0.2


@final
@dataclass(frozen=True)
class DigitPixels:
    """The digits before they are normalized.

    Attributes:
        pixels: (1797, 1, H, W) float32 in [0, 1].
        labels: (1797,) int64.
        train: indices of the images to learn from.
        held_out: indices of the images to judge by.
        mean: of all pixels to learn from.
        std: of all pixels to learn from.
    """

    pixels: Tensor
    labels: Tensor
    train: Tensor
    held_out: Tensor
    mean: float
    std: float


def digit_pixels(size: int) -> DigitPixels:
    """The 1797 digits of scikit-learn, upscaled: 1437 to train, 360 held out, stratified by class, always the same.

    The scans are 8x8 with 17 grey levels; they are scaled to [0, 1] and resized bilinearly to ``size`` x ``size``. One
    channel, float32.

    Args:
        size: height and width in pixels, at least 8.

    Raises:
        UsageError: ``size`` below 8.
        MissingDependencyError: scikit-learn is not installed.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (its test part), doi 10.24432/C50P49.
    """
    if size < 8:
        raise UsageError(f"The digits are scans of 8x8 pixels and are not made smaller: size {size} is below 8.")
    pixels, labels = _scans(size)
    train, held_out = _split(labels)
    mean, std = float(pixels[train].mean()), float(pixels[train].std(correction=0))
    return DigitPixels(pixels, labels, train, held_out, mean, std)


def _scans(size: int) -> tuple[Tensor, Tensor]:
    """Pixels (1797, 1, size, size) in [0, 1] and labels (1797,)."""
    scans = require("sklearn.datasets").load_digits()
    pixels_N1HW = torch.from_numpy(scans.images).float().div(16).unsqueeze(1)
    pixels_N1HW = F.interpolate(pixels_N1HW, size=(size, size), mode="bilinear", align_corners=False)
    return pixels_N1HW, torch.from_numpy(scans.target).long()


def _split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the two parts, each in ascending order."""
    split = require("sklearn.model_selection").train_test_split
    parts = split(range(len(labels)), test_size=HELD_OUT, stratify=labels.numpy(), random_state=SPLIT_STATE)
    train, held_out = (torch.tensor(sorted(part)) for part in parts)
    return train, held_out
