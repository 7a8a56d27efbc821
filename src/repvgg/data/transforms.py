"""Image transforms: crops and policies per image (torchvision), jitter, pad-crop, flip and erase per batch (torch).

Every random number comes from :mod:`repvgg.data.counter_rng`: a transform is a function of seed, epoch and image key.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from repvgg.data.config import AffineJitter, Augment, DataConfig
from repvgg.data.counter_rng import CROP_STREAM, POLICY_STREAM, image_rng, uniforms
from repvgg.data.decode import CorruptImage, to_channels, to_pil
from repvgg.errors import require

# Columns of the uniforms of an image. Always all are drawn, so that enabling one transform leaves the numbers of the
# others unchanged.
_JITTER, _CROP, _FLIP, _ERASE = slice(0, 4), slice(4, 6), 6, slice(7, 10)
_NUM_UNIFORMS = 10


# torchvision is loaded at the first transform: its import takes longer than that of all of repvgg.
def _v2() -> Any:
    return require("torchvision.transforms.v2", "train")


def _interpolation(name: str) -> Any:
    return require("torchvision.transforms", "train").InterpolationMode(name)


def pixels_of(image: Image.Image) -> Tensor:
    """Return the pixels (C, H, W) uint8 of an image."""
    pixels_CHW: Tensor = _v2().functional.pil_to_tensor(image)
    return pixels_CHW


class Crop(ABC):
    """Converts decoded images to pixels (C, H, W) uint8 of a fixed size.

    Args:
        channels: 1 or 3.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def __call__(self, image: Image.Image, location: str, epoch: int = 0, key: int = 0) -> Tensor | CorruptImage:
        """Return the pixels; ``epoch`` and ``key`` seed a random crop."""
        converted = to_channels(image, self._channels, location)
        return converted if isinstance(converted, CorruptImage) else pixels_of(self._crop(converted, epoch, key))

    @abstractmethod
    def _crop(self, image: Image.Image, epoch: int, key: int) -> Image.Image: ...


@final
class CenterCrop(Crop):
    """Resize the short side to ``floor(size / crop_fraction)`` and crop the centre, bitwise as torchvision does.

    Images that are ``size`` x ``size`` already are left unchanged.

    Args:
        config: supplies ``crop_fraction`` and ``interpolation``.
        size: height and width of the result.
        channels: 1 or 3.
    """

    def __init__(self, config: DataConfig, size: int, channels: int) -> None:
        super().__init__(channels)
        self._size = [size, size]
        # 1e-6: a quotient one rounding error below an integer counts as that integer.
        self._short_side = math.floor(size / config.crop_fraction + 1e-6)
        self._interpolation = _interpolation(config.interpolation)

    def _crop(self, image: Image.Image, epoch: int, key: int) -> Image.Image:
        if list(image.size) == self._size:
            return image
        functional = _v2().functional
        resized = functional.resize(image, [self._short_side], self._interpolation, antialias=True)
        cropped: Image.Image = functional.center_crop(resized, self._size)
        return cropped


@final
class RandomResizedCrop(Crop):
    """torchvision's transform of that name, with the region drawn from seed, epoch and image key.

    Args:
        config: supplies scale, ratio and ``interpolation``.
        size: height and width of the result.
        channels: 1 or 3.
        seed: of the run.
    """

    def __init__(self, config: DataConfig, size: int, channels: int, seed: int) -> None:
        super().__init__(channels)
        augment = config.augment
        self._seed = seed
        self._transform = _v2().RandomResizedCrop(
            size, augment.crop_scale, augment.crop_ratio, _interpolation(config.interpolation), antialias=True
        )

    def _crop(self, image: Image.Image, epoch: int, key: int) -> Image.Image:
        with image_rng(self._seed, epoch, key, CROP_STREAM):
            cropped: Image.Image = self._transform(image)
        return cropped


@final
class Uncropped(Crop):
    """Keep the stored size."""

    def _crop(self, image: Image.Image, epoch: int, key: int) -> Image.Image:
        return image


@final
class PolicyTransform:
    """An augmentation policy of torchvision, applied to each image of a batch with the image's own seed.

    Args:
        augment: names the policy and its parameters.
        interpolation: of the geometric operations.
        seed: of the run.
    """

    def __init__(self, augment: Augment, interpolation: str, seed: int) -> None:
        self._policy = _policy(augment, _interpolation(interpolation))
        self._seed = seed

    def __call__(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        """Transform images (N, C, H, W) uint8, each by the numbers of its key."""
        transformed = []
        for pixels, key in zip(x_NCHW, keys_N.tolist(), strict=True):
            with image_rng(self._seed, epoch, key, POLICY_STREAM):
                # As PIL images, for which the policies were defined.
                transformed.append(pixels_of(self._policy(to_pil(pixels))))
        return torch.stack(transformed)


def _policy(augment: Augment, interpolation: Any) -> Any:
    v2 = _v2()
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


@final
@dataclass(frozen=True)
class BatchTransforms:
    """The steps of an :class:`~repvgg.data.Augment` after its crop: jitter, pad-crop, flip, policy, erase.

    Images are uint8 pixels, or normalized float32; fills are one number per channel in the units of the images.
    """

    augment: Augment
    seed: int  # of the run
    black: tuple[float, ...]  # fill beyond the border of a jittered image
    grey: tuple[float, ...]  # fill of an erased square
    policy: PolicyTransform | None = None  # augmentation of single images; needs uint8

    def __call__(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        """Apply all steps; ``keys_N`` (int64) identify the images."""
        x_NCHW = self.jitter_crop_flip(x_NCHW, epoch, keys_N)
        if self.policy is not None:
            x_NCHW = self.policy(x_NCHW, epoch, keys_N)
        # Erase after the policy: its colour operations would change the grey of the square.
        return self.erase(x_NCHW, epoch, keys_N)

    def jitter_crop_flip(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        augment = self.augment
        if augment.jitter == AffineJitter() and augment.crop != "pad" and augment.flip == 0:
            return x_NCHW
        draws = uniforms(self.seed, epoch, keys_N, _NUM_UNIFORMS)
        if augment.jitter != AffineJitter():
            x_NCHW = self._jitter(x_NCHW, draws[:, _JITTER])
        flip = self._flips(draws, epoch, keys_N)
        if augment.crop == "pad":
            return pad_crop_flip(x_NCHW, augment.crop_padding, draws[:, _CROP], flip)
        return torch.where(flip.reshape(-1, 1, 1, 1), x_NCHW.flip(3), x_NCHW) if augment.flip else x_NCHW

    def _flips(self, draws: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        """Return which images (N,) bool are flipped."""
        if not self.augment.alternate_flip:
            return draws[:, _FLIP] < self.augment.flip
        first = uniforms(self.seed, 0, keys_N, _NUM_UNIFORMS)[:, _FLIP] < self.augment.flip
        return first.logical_not() if epoch % 2 else first

    def erase(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        if self.augment.erase == 0:
            return x_NCHW
        draws = uniforms(self.seed, epoch, keys_N, _NUM_UNIFORMS)[:, _ERASE]
        chosen = (draws[:, 0] < self.augment.erase).nonzero().flatten()
        return erase_squares(x_NCHW, chosen, draws[chosen, 1:], self.augment.erase_size, self.grey)

    def _jitter(self, x_NCHW: Tensor, draws_N4: Tensor) -> Tensor:
        matrix = jitter_matrices(draws_N4.T * 2 - 1, self.augment.jitter, x_NCHW.shape[2], x_NCHW.shape[3])
        out = sample_affine(x_NCHW.float(), matrix, self.black)
        return out if x_NCHW.is_floating_point() else out.round().clamp(0, 255).to(x_NCHW.dtype)


def pad_crop_flip(x_NCHW: Tensor, padding: int, draws_N2: Tensor, flip_N: Tensor) -> Tensor:
    """Pad by reflection, crop a random window of the original size, and flip some images horizontally.

    Args:
        x_NCHW: images, larger than ``padding`` in both directions.
        padding: pixels at each border.
        draws_N2: numbers in [0, 1) for the vertical and the horizontal offset of the window.
        flip_N: bool, the images that are flipped after the crop.
    """
    n, channels, height, width = x_NCHW.shape
    # One gather with per-image source indices: nothing is padded in memory, and no loop runs over the images.
    offset_N2 = (draws_N2 * (2 * padding + 1)).long() - padding
    rows_NH = reflect(offset_N2[:, :1] + torch.arange(height), height)
    columns_NW = torch.arange(width).expand(n, width)
    columns_NW = torch.where(flip_N[:, None], width - 1 - columns_NW, columns_NW)  # of the window: crop, then flip
    columns_NW = reflect(offset_N2[:, 1:] + columns_NW, width)
    pixel_NHW = rows_NH[:, :, None] * width + columns_NW[:, None, :]
    index = pixel_NHW.reshape(n, 1, height * width).expand(n, channels, height * width)
    return x_NCHW.reshape(n, channels, height * width).gather(2, index).reshape(x_NCHW.shape)


def reflect(index: Tensor, size: int) -> Tensor:
    """Mirror coordinates into 0 … size − 1 about the first and the last pixel, which are not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()


def erase_squares(x_NCHW: Tensor, chosen: Tensor, draws_M2: Tensor, fraction: float, fill: tuple[float, ...]) -> Tensor:
    """Fill a square in the images at ``chosen`` (M,); its centre is any pixel, and it is clipped at the border.

    The side is ``round(fraction · height)`` pixels, at least 1.
    """
    height, width = x_NCHW.shape[2:]
    side = max(1, round(fraction * height))
    top_M = (draws_M2[:, 0] * height).long() - side // 2
    left_M = (draws_M2[:, 1] * width).long() - side // 2
    rows, columns = torch.arange(height), torch.arange(width)
    inside_MH = (rows >= top_M[:, None]) & (rows < top_M[:, None] + side)
    inside_MW = (columns >= left_M[:, None]) & (columns < left_M[:, None] + side)
    inside_M1HW = (inside_MH[:, :, None] & inside_MW[:, None, :]).unsqueeze(1)
    values = torch.tensor(fill, dtype=x_NCHW.dtype).reshape(1, -1, 1, 1)
    out = x_NCHW.clone()  # never in place: the caller may hold the only copy of the images
    out[chosen] = torch.where(inside_M1HW, values, x_NCHW[chosen])
    return out


def jitter_matrices(draw_4N: Tensor, jitter: AffineJitter, height: int, width: int) -> Tensor:
    """Return an affine matrix (N, 2, 3) per image, from output to input coordinates, both in [−1, 1].

    Args:
        draw_4N: numbers in [−1, 1]: rotation, zoom, shift to the right, shift down.
        jitter: the range of each amount.
        height: of the images.
        width: of the images.
    """
    n = draw_4N.shape[1]
    angle = draw_4N[0] * math.radians(jitter.degrees)
    zoom = 1 / (1 + draw_4N[1] * jitter.scale)  # the inverse, as the matrix maps output to input
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    # Normalized coordinates have different units along height and width: rotate in pixels.
    rotation_N22 = torch.stack((cos, sin * height / width, -sin * width / height, cos), 1).reshape(n, 2, 2)
    shift_N21 = draw_4N[2:].T.unsqueeze(2) * (2 * jitter.translate)  # 2: the image spans [−1, 1]
    return torch.cat((rotation_N22, -rotation_N22 @ shift_N21), 2)


def sample_affine(x_NCHW: Tensor, matrix_N23: Tensor, fill: tuple[float, ...]) -> Tensor:
    """Sample float images bilinearly at the coordinates of the matrices; pixels beyond the border are ``fill``."""
    border = torch.tensor(fill, dtype=x_NCHW.dtype, device=x_NCHW.device).reshape(1, -1, 1, 1)
    grid_NHW2 = F.affine_grid(matrix_N23.to(x_NCHW), list(x_NCHW.shape), align_corners=False)
    # grid_sample pads with zeros only, so shift the images such that the fill is zero.
    return F.grid_sample(x_NCHW - border, grid_NHW2, align_corners=False) + border
