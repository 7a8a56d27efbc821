"""What is done to one decoded image: torchvision's transforms (v2), under a seed of the image's own."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from repvgg.data.config import Augment, DataConfig
from repvgg.data.decoding import Bad, to_channels
from repvgg.data.drawing import CROP_LANE, POLICY_LANE, drawing_for
from repvgg.data.parts import to_image


@final
class CentreCrop:
    """Resize the short side to ``size / fraction`` (rounded down), and cut out the centre; bitwise as torchvision does.

    Images that are of ``size`` x ``size`` already stay as they are.

    Args:
        config: size and channels are given beside it, the rest comes from here.
        size: height and width that come out.
        channels: 1 or 3.
    """

    def __init__(self, config: DataConfig, size: int, channels: int) -> None:
        self.size = size
        self.channels = channels
        self._short = math.floor(size / config.crop_fraction + 1e-6)
        self._interpolation = InterpolationMode(config.interpolation)

    def __call__(self, image: Image.Image, where: str) -> Tensor | Bad:
        """Pixels (C, H, W) uint8."""
        converted = to_channels(image, self.channels, where)
        if isinstance(converted, Bad):
            return converted
        if converted.size != (self.size, self.size):
            converted = TF.resize(converted, [self._short], self._interpolation, antialias=True)
            converted = TF.center_crop(converted, [self.size, self.size])
        return pixels_of(converted)


@final
class RandomCrop:
    """A random part of the image, resized: the part is drawn by seed, epoch and number of the image.

    Args:
        config: what is drawn.
        size: height and width that come out.
        channels: 1 or 3.
        seed: of the run.
    """

    def __init__(self, config: DataConfig, size: int, channels: int, seed: int) -> None:
        augment = config.augment
        self.channels = channels
        self._seed = seed
        self._crop = v2.RandomResizedCrop(
            size, augment.crop_scale, augment.crop_ratio, InterpolationMode(config.interpolation), antialias=True
        )

    def __call__(self, image: Image.Image, where: str, epoch: int, key: int) -> Tensor | Bad:
        """Pixels (C, H, W) uint8."""
        converted = to_channels(image, self.channels, where)
        if isinstance(converted, Bad):
            return converted
        with drawing_for(self._seed, epoch, key, CROP_LANE):
            return pixels_of(self._crop(converted))


@final
class PolicyOps:
    """A policy of torchvision, applied to every image of a batch under a seed of its own.

    Args:
        augment: which policy.
        interpolation: of its geometric changes.
        seed: of the run.
    """

    def __init__(self, augment: Augment, interpolation: str, seed: int) -> None:
        self._policy = _policy(augment, InterpolationMode(interpolation))
        self._seed = seed

    def __call__(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        """Change images (N, C, H, W) uint8, each as its number says."""
        changed = []
        for pixels, key in zip(x_NCHW, keys_N.tolist(), strict=True):
            with drawing_for(self._seed, epoch, key, POLICY_LANE):
                changed.append(pixels_of(self._policy(to_image(pixels))))
        return torch.stack(changed)


def _policy(augment: Augment, interpolation: InterpolationMode) -> Any:
    match augment.policy:
        case "autoaugment":
            return v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, interpolation=interpolation)
        case "autoaugment-cifar10":
            return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, interpolation=interpolation)
        case "randaugment":
            return v2.RandAugment(augment.randaugment_ops, augment.randaugment_magnitude, interpolation=interpolation)
        case "trivialaugment":
            return v2.TrivialAugmentWide(interpolation=interpolation)
        case _:
            return v2.Identity()


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels (C, H, W) uint8 of an image."""
    pixels_CHW: Tensor = TF.pil_to_tensor(image)
    return pixels_CHW


@final
class AsStored:
    """An image in RGB or grey, at the size that it is stored at.

    Args:
        channels: 1 or 3.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def __call__(self, image: Image.Image, where: str) -> Tensor | Bad:
        """Pixels (C, H, W) uint8."""
        converted = to_channels(image, self._channels, where)
        return converted if isinstance(converted, Bad) else pixels_of(converted)
