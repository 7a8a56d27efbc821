"""Where images come from and what is done to them, as two values: part of a recipe, importable without torchvision."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final, get_args

from repvgg.data.augment import AffineJitter
from repvgg.errors import UsageError

Crop = Literal["none", "random-resized", "pad"]
Policy = Literal["none", "autoaugment", "autoaugment-cifar10", "randaugment", "trivialaugment"]
Interpolation = Literal["bilinear", "bicubic"]
OnBad = Literal["raise", "skip"]
Cache = Literal["auto", "memory", "none"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}.")


def _range(name: str, values: tuple[float, float], highest: float) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest or math.isinf(values[1]):
        limit = "" if math.isinf(highest) else f" up to {highest:g}"
        raise UsageError(f"{name} is a pair of positive numbers{limit}, the smaller first, not {values}.")


@final
@dataclass(frozen=True)
class Augment:
    """What is drawn anew for every training image, in this order: crop, jitter, pad-crop, flip, policy, erase.

    Attributes:
        crop: "random-resized": a random part, resized (Inception); "pad": a part of the image with a reflected border;
            "none": the image as it is judged by.
        crop_padding: of "pad", in pixels.
        crop_scale: of "random-resized", the range of the part's area as a fraction of the image's.
        crop_ratio: of "random-resized", the range of width / height of the part; drawn log-uniformly.
        flip: probability that left and right change places.
        policy: a series of colour and geometry changes: AutoAugment as found for ImageNet or for CIFAR-10, RandAugment,
            TrivialAugment (wide).
        randaugment_ops: changes an image of "randaugment".
        randaugment_magnitude: their strength, 0 … 30.
        erase: probability that a square is greyed out (cutout).
        erase_size: side of the square as a fraction of the image's; its centre lies anywhere in the image.
        jitter: turned, moved and resized.

    Raises:
        UsageError: a value out of its range.

    Sources: C. Szegedy et al. 2015 (random-resized), T. DeVries and G. Taylor 2017 (cutout), E. Cubuk et al. 2018
    (AutoAugment) and 2019 (RandAugment), S. Müller and F. Hutter 2021 (TrivialAugment); the policies are torchvision's.
    """

    crop: Crop = "none"
    crop_padding: int = 4
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    policy: Policy = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    erase: float = 0.0
    erase_size: float = 0.25
    jitter: AffineJitter = field(default_factory=AffineJitter)

    def __post_init__(self) -> None:
        _one_of("crop", self.crop, get_args(Crop))
        _one_of("policy", self.policy, get_args(Policy))
        for name, probability in (("flip", self.flip), ("erase", self.erase)):
            if not 0 <= probability <= 1:
                raise UsageError(f"{name} is a probability in [0, 1], not {probability}.")
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding is a number of pixels from 0 on, not {self.crop_padding}.")
        _range("crop_scale", self.crop_scale, highest=1.0)
        _range("crop_ratio", self.crop_ratio, highest=math.inf)
        if not 0 < self.erase_size <= 1:
            raise UsageError(f"erase_size is a fraction of the image's side in (0, 1], not {self.erase_size}.")
        if self.randaugment_ops < 1 or not 0 <= self.randaugment_magnitude <= 30:
            raise UsageError(
                f"RandAugment takes 1 or more operations and a magnitude in 0 … 30, "
                f"not {self.randaugment_ops} and {self.randaugment_magnitude}."
            )


@final
@dataclass(frozen=True)
class DataConfig:
    """Which images, at which size, and how they are loaded.

    Attributes:
        uri: where the images are, see ``repvgg.data.open_data``.
        val: URI of the images to judge by, where ``uri`` holds only one part.
        train_size: height and width of training images; None: the source's own (digits, CIFAR and fake 32, folders,
            hubs and shards 224, other torchvision arrays as they are stored).
        test_size: height and width of the images to judge by; None: ``train_size``.
        crop_fraction: their short side is resized to ``test_size / crop_fraction`` and the centre cut out; images that
            are of ``test_size`` already stay as they are. Training images without a random crop are cut the same way.
        interpolation: of every resize.
        channels: 3, or 1 for grey; None: the source's own.
        mean: subtracted after scaling to [0, 1], one number a channel; None: the source's own.
        std: divided by after that.
        augment: what is drawn for training images.
        workers: loading processes a loader; 0: the process itself loads.
        on_bad: "raise" on an image that cannot be read, or "skip" it and count.
        cache: keep decoded images in memory; "auto": where all have one size of at most 128 pixels and fit 1 GiB.

    Raises:
        UsageError: a value out of its range.
    """

    uri: str = "digits:"
    val: str | None = None
    train_size: int | None = None
    test_size: int | None = None
    crop_fraction: float = 0.875
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment = field(default_factory=Augment)
    workers: int = 0
    on_bad: OnBad = "raise"
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        _one_of("interpolation", self.interpolation, get_args(Interpolation))
        _one_of("on_bad", self.on_bad, get_args(OnBad))
        _one_of("cache", self.cache, get_args(Cache))
        _one_of("channels", self.channels, (None, 1, 3))
        for name, size in (("train_size", self.train_size), ("test_size", self.test_size)):
            if size is not None and size < 1:
                raise UsageError(f"{name} is a number of pixels from 1 on, not {size}.")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop_fraction is in (0, 1], not {self.crop_fraction}.")
        if self.workers < 0:
            raise UsageError(f"workers is a number of processes from 0 on, not {self.workers}.")
        self._check_normalization()

    def _check_normalization(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in ({1, 3} if self.channels is None else {self.channels}):
                raise UsageError(f"{name} holds one number a channel, not {values}.")
        if self.std is not None and not min(self.std) > 0:
            raise UsageError(f"std holds positive numbers, not {self.std}.")
