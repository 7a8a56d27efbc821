"""Data configuration as plain values: where images come from and how they are transformed.

Recipes import this module, so it needs neither PIL nor torchvision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, final, get_args

from repvgg._serde import check_finite
from repvgg.errors import UsageError

Crop = Literal["none", "random-resized", "pad"]
Policy = Literal["none", "autoaugment", "autoaugment-cifar10", "randaugment", "trivialaugment"]
Interpolation = Literal["bilinear", "bicubic"]
OnBad = Literal["raise", "skip"]
Cache = Literal["auto", "memory", "none"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MASK_SCHEMES = ("masks", "cityscapes", "ade20k", "voc")  # images with a label per pixel
SCHEMES = ("imagefolder", "torchvision", "hf", "webdataset", "digits", "fake", *MASK_SCHEMES)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _check_range(name: str, values: tuple[float, float], highest: float) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= highest or math.isinf(values[1]):
        limit = "" if math.isinf(highest) else f" up to {highest:g}"
        raise UsageError(f"{name} must be a pair of positive numbers{limit}, the smaller first, got {values}.")


@final
@dataclass(frozen=True)
class AffineJitter:
    """Ranges of a random affine transform; each amount is drawn uniformly.

    Attributes:
        degrees: rotation in −degrees … +degrees.
        translate: shift by at most this fraction of height and width.
        scale: zoom by 1 − scale … 1 + scale.

    Raises:
        UsageError: a value is negative or too large.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not (0 <= self.degrees <= 180 and 0 <= self.translate < 1 and 0 <= self.scale < 1):
            raise UsageError(f"A jitter takes degrees in [0, 180] and translate and scale in [0, 1), got {self}.")


@final
@dataclass(frozen=True)
class MaskAugment:
    """Random transforms of an image together with its mask, and of its colours alone.

    Geometry is one affine map per image, sampled bilinearly (or bicubically) from the image and at the nearest pixel
    from the mask: zoom and rotation about the centre, then a crop of ``train_size`` at a random position. Beyond the
    image, the crop holds the mean colour and ignored pixels. Then blur, brightness, contrast, saturation and hue, in
    that order.

    Attributes:
        scale: range of the zoom, drawn uniformly; 0.5 halves the image.
        degrees: rotation in −degrees … +degrees.
        rotation: probability of a rotation.
        blur: probability of a Gaussian blur.
        blur_sigma: its standard deviation in pixels, of a kernel that ends at twice that; 1.1 gives OpenCV's 5x5.
        brightness: factor in 1 − brightness … 1 + brightness.
        contrast: factor in 1 − contrast … 1 + contrast.
        saturation: factor in 1 − saturation … 1 + saturation.
        hue: turn about the grey axis by −hue … +hue, as a fraction of the circle.

    Raises:
        UsageError: a value is out of its range.

    Source: H. Zhao et al., Pyramid Scene Parsing Network, 2017: scale 0.5 … 2, 10 degrees and blur, each of the latter
    with probability 0.5.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    degrees: float = 0.0
    rotation: float = 0.5
    blur: float = 0.0
    blur_sigma: float = 1.1
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        check_finite(self)
        _check_range("scale", self.scale, highest=math.inf)
        if not 0 <= self.degrees <= 180:
            raise UsageError(f"degrees must be in [0, 180], got {self.degrees}.")
        for name in ("rotation", "blur", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.blur_sigma <= 100:
            raise UsageError(f"blur_sigma must be in (0, 100] pixels, got {self.blur_sigma}.")
        if not 0 <= self.hue <= 0.5:
            raise UsageError(f"hue must be in [0, 0.5], got {self.hue}.")


@final
@dataclass(frozen=True)
class Augment:
    """Random transforms of training images, applied in this order: crop, jitter, pad-crop, flip, policy, erase.

    Images with masks take ``mask`` and ``flip`` only.

    Attributes:
        crop: "random-resized": a random region, resized (Inception); "pad": a window of the image padded by
            reflection; "none": the deterministic crop of validation images.
        crop_padding: pixels of padding of "pad".
        crop_scale: range of the region's area for "random-resized", as a fraction of the image's area.
        crop_ratio: range of the region's width / height for "random-resized"; drawn log-uniformly.
        flip: probability of a horizontal flip.
        alternate_flip: draw the flips of the first epoch only, and reverse each in every second epoch: any two
            successive epochs show both orientations of an image. Needs flip in (0, 1).
        policy: a sequence of colour and geometry operations: the AutoAugment policies of ImageNet or CIFAR-10,
            RandAugment, or TrivialAugment (wide).
        randaugment_ops: operations per image of "randaugment".
        randaugment_magnitude: their magnitude, 0 … 30.
        erase: probability that a square is filled with grey (cutout).
        erase_size: side of the square as a fraction of the image's; its centre may be any pixel.
        jitter: rotation, shift and zoom.
        mask: transforms of images that have masks.

    Raises:
        UsageError: a value is out of its range.

    Sources: C. Szegedy et al. 2015 (random-resized), T. DeVries and G. Taylor 2017 (cutout), E. Cubuk et al. 2018
    (AutoAugment) and 2019 (RandAugment), S. Müller and F. Hutter 2021 (TrivialAugment). The policies are torchvision's.
    Alternating flips: K. Jordan 2024 (arXiv 2404.00498).
    """

    crop: Crop = "none"
    crop_padding: int = 4
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    alternate_flip: bool = False
    policy: Policy = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    erase: float = 0.0
    erase_size: float = 0.25  # 8 of the 32 pixels of CIFAR
    jitter: AffineJitter = field(default_factory=AffineJitter)
    mask: MaskAugment = field(default_factory=MaskAugment)

    def __post_init__(self) -> None:
        check_finite(self)
        _check_choice("crop", self.crop, get_args(Crop))
        _check_choice("policy", self.policy, get_args(Policy))
        for name, probability in (("flip", self.flip), ("erase", self.erase)):
            if not 0 <= probability <= 1:
                raise UsageError(f"{name} must be a probability in [0, 1], got {probability}.")
        if self.alternate_flip and not 0 < self.flip < 1:
            raise UsageError(f"alternate_flip needs a flip in (0, 1), such as 0.5, got {self.flip}.")
        if self.crop_padding < 0:
            raise UsageError(f"crop_padding must be at least 0 pixels, got {self.crop_padding}.")
        _check_range("crop_scale", self.crop_scale, highest=1.0)
        _check_range("crop_ratio", self.crop_ratio, highest=math.inf)
        if not 0 < self.erase_size <= 1:
            raise UsageError(f"erase_size must be a fraction of the image's side in (0, 1], got {self.erase_size}.")
        if self.randaugment_ops < 1 or not 0 <= self.randaugment_magnitude <= 30:
            raise UsageError(
                f"RandAugment takes at least 1 operation and a magnitude in 0 … 30, "
                f"got {self.randaugment_ops} and {self.randaugment_magnitude}."
            )


@final
@dataclass(frozen=True)
class DataConfig:
    """A dataset, the size of its images, and how they are loaded.

    Attributes:
        uri: the dataset, such as imagefolder:PATH or masks:PATH; see ``repvgg.data.open_data``.
        val: URI of the validation images, where ``uri`` holds a single split.
        train_size: height and width of training images; None: the source's default (digits, CIFAR and fake 32,
            folders, Hugging Face and WebDataset 224, other torchvision arrays their stored size, images with masks
            321, ade20k and voc 473, cityscapes 713).
        test_size: height and width of validation images; None: ``train_size``. Validation images with masks keep
            their stored size.
        crop_fraction: validation images are resized so that the short side is ``test_size / crop_fraction``, and
            cropped at the centre; images that already have ``test_size`` are left unchanged. Training images without a
            random crop are cropped the same way.
        interpolation: of every resize.
        channels: 3, or 1 for greyscale; None: the source's default.
        mean: subtracted from pixels in [0, 1], one number per channel; None: the source's default.
        std: divisor after that.
        augment: random transforms of training images.
        workers: worker processes per loader; 0 loads in the main process.
        on_bad: "raise" at a corrupt image, or "skip" and count it.
        cache: "memory" keeps decoded images in memory, "none" decodes them every epoch; "auto" caches where all images
            have one size of at most 128 pixels and take at most 1 GiB. Images with masks may have any sizes; "auto"
            caches the training images if they take at most 1 GiB.
        allow_commands: run the shell command of ``webdataset:pipe:COMMAND``. Config files cannot set it, because they
            may be untrusted.
        ignore_index: label of the pixels of stored masks that are left out of loss and metrics; None: the source's
            (255, and 0 for ade20k). Masks are delivered with 255 there.

    Raises:
        UsageError: a value is out of its range.
    """

    uri: str = "digits:"
    val: str | None = None
    train_size: int | None = None
    test_size: int | None = None
    crop_fraction: float = 0.875  # 224 / 256, the usual protocol of ImageNet
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment = field(default_factory=Augment)
    workers: int = 0
    on_bad: OnBad = "raise"
    cache: Cache = "auto"
    allow_commands: bool = False
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        _check_choice("interpolation", self.interpolation, get_args(Interpolation))
        _check_choice("on_bad", self.on_bad, get_args(OnBad))
        _check_choice("cache", self.cache, get_args(Cache))
        _check_choice("channels", self.channels, (None, 1, 3))
        for name, size in (("train_size", self.train_size), ("test_size", self.test_size)):
            if size is not None and size < 1:
                raise UsageError(f"{name} must be at least 1 pixel, got {size}.")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}.")
        if self.workers < 0:
            raise UsageError(f"workers must be at least 0 processes, got {self.workers}.")
        if self.ignore_index is not None and not 0 <= self.ignore_index <= 255:
            raise UsageError(f"ignore_index must be a label in 0 … 255, got {self.ignore_index}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            # Where the source decides the channels, both counts are possible: ImageData checks the final one.
            if values is not None and len(values) not in ({1, 3} if self.channels is None else {self.channels}):
                raise UsageError(f"{name} must hold one number per channel, got {values}.")
        if self.std is not None and not min(self.std) > 0:
            raise UsageError(f"std must hold positive numbers, got {self.std}.")


@final
@dataclass(frozen=True)
class DataUri:
    """A parsed dataset URI, ``scheme:rest?option=value&flag``."""

    text: str  # the complete URI
    scheme: str  # one of SCHEMES
    rest: str  # the text after the colon, without options
    options: dict[str, str] = field(default_factory=dict)  # the options by name; a flag without a value maps to ""

    def check_options(self, *allowed: str) -> None:
        """Raise UsageError for an option that the source does not take."""
        for name in self.options:
            if name not in allowed:
                known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
                raise UsageError(f"{self.text!r} has an unknown option {name!r}: {known}.")

    def number(self, name: str) -> int | None:
        """Return an option that is a positive integer, or None where it is absent.

        Raises:
            UsageError: the value is something else.
        """
        if name not in self.options:
            return None
        value = self.options[name]
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"Option {name!r} of {self.text!r} must be a positive integer, got {value!r}.")
        return int(value)


def is_mask_uri(uri: str) -> bool:
    """Return whether a dataset URI names images with masks."""
    return uri.partition(":")[0] in MASK_SCHEMES


def parse_uri(text: str) -> DataUri:
    """Split a URI into scheme, rest and options.

    Raises:
        UsageError: the scheme is missing or unknown.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES:
        known = ", ".join(f"{name}:" for name in SCHEMES)
        raise UsageError(f"{text!r} is not a dataset: start the URI with one of {known}, as in imagefolder:PATH.")
    if scheme == "imagefolder":  # takes no options, and a path may contain "?"
        return DataUri(text, scheme, rest)
    before, mark, query = rest.rpartition("?")
    # A question mark may also be a wildcard in a file name: options have names that are identifiers.
    if not mark or not all(part.partition("=")[0].isidentifier() for part in query.split("&")):
        return DataUri(text, scheme, rest)
    pairs = (part.partition("=") for part in query.split("&"))
    return DataUri(text, scheme, before, {name: value for name, _, value in pairs})


def per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one number per channel: greyscale takes the average of three, and RGB repeats a single one.

    Raises:
        UsageError: another number of values.
    """
    if len(values) == channels:
        return tuple(values)
    if channels == 1:
        return (sum(values) / len(values),)
    if len(values) == 1:
        return tuple(values) * channels
    raise UsageError(f"{name} holds {len(values)} numbers, but the images have {channels} channels.")
