"""Transforms of an image together with its mask: one affine map for both, then blur and colours of the image.

Every random number comes from :mod:`repvgg.data.counter_rng`: a transform is a function of seed, epoch and image key.
"""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from repvgg.data.config import MaskAugment
from repvgg.data.counter_rng import uniforms
from repvgg.data.label_sets import IGNORE_INDEX
from repvgg.data.mask_files import Pair

# Columns of the uniforms of an image. Always all are drawn, so that enabling one transform leaves the numbers of the
# others unchanged.
_SCALE, _ROTATE, _ANGLE, _TOP, _LEFT, _FLIP, _BLUR, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(11)
_NUM_UNIFORMS = 11
_MARGIN = 2  # pixels around the sampled region: bicubic interpolation reads 2 neighbours

Matrix = NDArray[np.float64]  # (2, 3): (x, y) of the image = matrix · (x, y, 1) of the crop, in pixels, centres at ½


@final
class MaskCrop:
    """Random scale, rotation, crop and flip of an image and its mask, then blur and colours of the image.

    The image is scaled and rotated about its centre on a canvas of the scaled size, or of the crop's where that is
    larger; the crop is a window of the canvas. What lies beyond the image is ``fill`` in the image, and ignored in the
    mask. Bilinear sampling reads 2x2 pixels where it shrinks the image, too, as in PSPNet's code.

    Args:
        augment: the ranges.
        flip: probability of a horizontal flip.
        size: height and width of the crop.
        fill: colour beyond the image, 0 … 255, one number per channel.
        interpolation: "bilinear" or "bicubic", of the image.
        seed: of the run.
    """

    def __init__(
        self, augment: MaskAugment, flip: float, size: int, fill: tuple[int, ...], interpolation: str, seed: int
    ) -> None:
        self._augment = augment
        self._flip = flip
        self._size = size
        self._fill_C11 = torch.tensor(fill, dtype=torch.float32).reshape(-1, 1, 1)
        self._interpolation = interpolation
        self._seed = seed

    def __call__(self, pair: Pair, epoch: int, key: int) -> Tensor:
        """Return the crop (C + 1, S, S) uint8: the channels of the image, then the mask."""
        draws = uniforms(self._seed, epoch, torch.tensor([key]), _NUM_UNIFORMS)[0].tolist()
        height, width = pair.mask.shape
        visible, matrix = _visible(pair, self._matrix(draws, height, width), self._size)
        image, mask = self._sample(visible, matrix)
        outside = mask < 0
        if self._augment.blur > draws[_BLUR]:
            image = gaussian_blur(image, self._augment.blur_sigma)
        colours = self._colour_map(image, outside, draws)
        if colours is not None:
            image = torch.addmm(colours[1], colours[0], image.flatten(1)).reshape(image.shape)
        both = torch.empty(len(image) + 1, *mask.shape, dtype=torch.uint8)
        # After the colours: what lies beyond the image keeps the mean, as in a padded image at test time.
        both[:-1] = torch.where(outside, self._fill_C11, image.clamp_(0, 255).add_(0.5))
        both[-1] = mask.masked_fill_(outside, IGNORE_INDEX)
        return both

    def _matrix(self, draws: list[float], height: int, width: int) -> Matrix:
        augment, size = self._augment, self._size
        zoom = augment.scale[0] + draws[_SCALE] * (augment.scale[1] - augment.scale[0])
        degrees = (2 * draws[_ANGLE] - 1) * augment.degrees if draws[_ROTATE] < augment.rotation else 0.0
        # Whole pixels, and half of an odd rest rounded down: without zoom and rotation, pixels map to pixels.
        scaled = np.array([max(1, round(zoom * side)) for side in (width, height)])
        canvas = np.maximum(scaled, size)
        offset = np.floor(np.array([draws[_LEFT], draws[_TOP]]) * (canvas - size + 1))
        from_centre = offset - ((canvas - scaled) // 2 + scaled / 2)
        cos, sin = math.cos(math.radians(degrees)) / zoom, math.sin(math.radians(degrees)) / zoom
        rotation = np.array([[cos, sin], [-sin, cos]])
        mirror = 1.0
        if draws[_FLIP] < self._flip:
            mirror, from_centre[0] = -1.0, from_centre[0] + size
        shift = rotation @ from_centre + np.array([width / 2, height / 2])
        return np.column_stack((rotation[:, 0] * mirror, rotation[:, 1], shift))

    def _sample(self, pair: Pair, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Return the crop of the image (C, S, S) and of the mask (S, S), float32.

        Beyond the image, the former repeats its border, and the latter is −1.
        """
        grid_1SS2 = self._grid(matrix, *pair.mask.shape)
        image_1CHW = torch.from_numpy(pair.pixels).permute(2, 0, 1).unsqueeze(0).float()
        image = F.grid_sample(image_1CHW, grid_1SS2, self._interpolation, "border", align_corners=False)[0]
        # One more than each class, so that the zeros of the padding are none.
        shifted_11HW = torch.from_numpy(pair.mask)[None, None].float().add_(1)
        mask = F.grid_sample(shifted_11HW, grid_1SS2, "nearest", "zeros", align_corners=False)[0, 0]
        return image, mask.sub_(1)

    def _grid(self, matrix: Matrix, height: int, width: int) -> Tensor:
        """Return the position (1, S, S, 2) of each pixel of the crop in the image, in [−1, 1]."""
        steps = torch.arange(self._size, dtype=torch.float64) + 0.5
        grid_1SS2 = torch.empty(1, self._size, self._size, 2)
        for axis, length in enumerate((width, height)):
            along_x, along_y, shift = (matrix[axis] * (2 / length)).tolist()
            grid_1SS2[0, :, :, axis] = (along_x * steps)[None, :] + (along_y * steps + (shift - 1))[:, None]
        return grid_1SS2

    def _colour_map(self, image: Tensor, outside: Tensor, draws: list[float]) -> tuple[Tensor, Tensor] | None:
        """Return matrix and shift of the map of colours; None for the identity."""
        augment = self._augment
        strengths = augment.brightness, augment.contrast, augment.saturation, augment.hue
        if not any(strengths):
            return None
        columns = _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE
        amounts = [(2 * draws[column] - 1) * strength for column, strength in zip(columns, strengths, strict=True)]
        inside = (~outside).float()
        means_C = image.flatten(1) @ inside.flatten() / inside.sum().clamp_min(1)
        return colour_map(means_C, 1 + amounts[0], 1 + amounts[1], 1 + amounts[2], amounts[3])


_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
_YIQ = ((*_LUMA,), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # of NTSC: the last two are the plane of hues


def colour_map(
    means_C: Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[Tensor, Tensor]:
    """Return matrix A (C, C) and shift t (C, 1) of the colours ``A·x + t``.

    x is multiplied by ``brightness``, then blended with the mean grey of the image (weight ``contrast`` of the pixel),
    then with the grey of the pixel (``saturation``), then turned by ``hue`` of a circle about the grey axis. Nothing is
    rounded or clipped in between; greys stay grey.

    Args:
        means_C: mean of each channel.
        brightness: factor.
        contrast: factor.
        saturation: factor; greyscale images have none.
        hue: part of the circle; greyscale images have none.
    """
    if len(means_C) == 1:
        shift = (1 - contrast) * brightness * means_C
        return torch.full((1, 1), contrast * brightness), shift[:, None]
    luma, identity = torch.tensor(_LUMA), torch.eye(3)
    shift = (1 - contrast) * brightness * (luma @ means_C)
    saturate = saturation * identity + (1 - saturation) * luma.expand(3, 3)
    yiq, angle = torch.tensor(_YIQ), 2 * math.pi * hue
    turn = torch.eye(3)
    turn[1:, 1:] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = torch.linalg.solve(yiq, turn @ yiq) @ saturate * (contrast * brightness)
    return matrix, shift.expand(3, 1)


def gaussian_blur(image_CHW: Tensor, sigma: float) -> Tensor:
    """Blur an image with a Gaussian kernel, which ends at the pixel nearest to 2 sigma; the border is repeated."""
    radius = max(1, round(2 * sigma))
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(-radius, radius + 1)]
    taps = [weight / sum(weights) for weight in weights]
    for axis in (1, 2):
        length = image_CHW.shape[axis]
        padded = image_CHW.index_select(axis, torch.arange(-radius, length + radius).clamp_(0, length - 1))
        image_CHW = taps[0] * padded.narrow(axis, 0, length)
        # Sums of shifted images: several times faster than conv2d with one channel.
        for tap in range(1, len(taps)):
            image_CHW.add_(padded.narrow(axis, tap, length), alpha=taps[tap])
    return image_CHW


def _visible(pair: Pair, matrix: Matrix, size: int) -> tuple[Pair, Matrix]:
    """Return the part of an image that a crop shows, and the matrix for it: all of it would be converted to floats."""
    height, width = pair.mask.shape
    corners_24 = matrix @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], float)
    left, right = _clip(corners_24[0].min(), corners_24[0].max(), width)
    top, bottom = _clip(corners_24[1].min(), corners_24[1].max(), height)
    local = matrix.copy()
    local[:, 2] -= (left, top)
    return Pair(pair.pixels[top:bottom, left:right], pair.mask[top:bottom, left:right]), local


def _clip(first: float, last: float, length: int) -> tuple[int, int]:
    """Return the pixels of 0 … length that cover a range with a margin, at least one."""
    start = min(max(math.floor(first) - _MARGIN, 0), length - 1)
    return start, max(start + 1, min(math.ceil(last) + _MARGIN, length))


def packed(pair: Pair) -> Tensor:
    """Return an image and its mask as one tensor (C + 1, H, W) uint8, the mask last."""
    height, width, channels = pair.pixels.shape
    both = np.empty((channels + 1, height, width), np.uint8)
    both[:-1], both[-1] = pair.pixels.transpose(2, 0, 1), pair.mask
    return torch.from_numpy(both)
