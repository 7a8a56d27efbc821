"""Augmentation of whole batches in memory, every image by numbers of its own; torch only.

Images are uint8 pixels, or float32 that are normalized already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from repvgg.data.affine import jitter_matrices, sample_affine
from repvgg.data.augment import AffineJitter
from repvgg.data.config import Augment
from repvgg.data.drawing import uniforms

_JITTER, _CROP, _FLIP, _ERASE = slice(0, 4), slice(4, 6), 6, slice(7, 10)
_LANES = 10


@final
@dataclass(frozen=True)
class BatchOps:
    """The steps of an :class:`~repvgg.data.Augment` that need no decoder: jitter, pad-crop, flip; and erase.

    Attributes:
        augment: what is drawn.
        seed: of the run.
        black: beyond the border of a jittered image, one number a channel, in the units of the images.
        grey: of an erased square, likewise.
    """

    augment: Augment
    seed: int
    black: tuple[float, ...]
    grey: tuple[float, ...]

    def move(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        """Jitter, pad-crop and flip; ``keys_N`` (int64) are the numbers of the images."""
        augment = self.augment
        if augment.jitter == AffineJitter() and augment.crop != "pad" and augment.flip == 0:
            return x_NCHW
        draws = uniforms(self.seed, epoch, keys_N, _LANES)
        if augment.jitter != AffineJitter():
            x_NCHW = self._jitter(x_NCHW, draws[:, _JITTER])
        flip = draws[:, _FLIP] < augment.flip
        if augment.crop == "pad":
            return pad_crop_flip(x_NCHW, augment.crop_padding, draws[:, _CROP], flip)
        return torch.where(flip.reshape(-1, 1, 1, 1), x_NCHW.flip(3), x_NCHW) if augment.flip else x_NCHW

    def erase(self, x_NCHW: Tensor, epoch: int, keys_N: Tensor) -> Tensor:
        """Grey out a square of some images."""
        if self.augment.erase == 0:
            return x_NCHW
        draws = uniforms(self.seed, epoch, keys_N, _LANES)[:, _ERASE]
        chosen = (draws[:, 0] < self.augment.erase).nonzero().flatten()
        return erase_squares(x_NCHW, chosen, draws[chosen, 1:], self.augment.erase_size, self.grey)

    def _jitter(self, x_NCHW: Tensor, draws_N4: Tensor) -> Tensor:
        matrix = jitter_matrices(draws_N4.T * 2 - 1, self.augment.jitter, x_NCHW.shape[2], x_NCHW.shape[3])
        out = sample_affine(x_NCHW.float(), matrix, self.black)
        return out if x_NCHW.is_floating_point() else out.round().clamp(0, 255).to(x_NCHW.dtype)


def pad_crop_flip(x_NCHW: Tensor, padding: int, draws_N2: Tensor, flip_N: Tensor) -> Tensor:
    """Reflect ``padding`` pixels at every border, cut the old size out of it anywhere, and mirror some images.

    Args:
        x_NCHW: images, larger than ``padding`` both ways.
        padding: pixels.
        draws_N2: in [0, 1), where the part lies, down and to the right.
        flip_N: bool, which images are mirrored after that.
    """
    n, channels, height, width = x_NCHW.shape
    offset_N2 = (draws_N2 * (2 * padding + 1)).long() - padding
    rows_NH = reflected(offset_N2[:, :1] + torch.arange(height), height)
    columns_NW = torch.arange(width).expand(n, width)
    columns_NW = torch.where(flip_N[:, None], width - 1 - columns_NW, columns_NW)
    columns_NW = reflected(offset_N2[:, 1:] + columns_NW, width)
    pixel_NHW = rows_NH[:, :, None] * width + columns_NW[:, None, :]
    index = pixel_NHW.reshape(n, 1, height * width).expand(n, channels, height * width)
    return x_NCHW.reshape(n, channels, height * width).gather(2, index).reshape(x_NCHW.shape)


def reflected(index: Tensor, size: int) -> Tensor:
    """Coordinates mirrored into 0 … size − 1 about the first and the last pixel, which are not repeated."""
    return size - 1 - (size - 1 - index.abs()).abs()


def erase_squares(x_NCHW: Tensor, chosen: Tensor, draws_M2: Tensor, fraction: float, fill: tuple[float, ...]) -> Tensor:
    """Fill a square in the images at ``chosen`` (M,); its centre is any pixel, and what is beyond the border is lost.

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
    out = x_NCHW.clone()
    out[chosen] = torch.where(inside_M1HW, values, x_NCHW[chosen])
    return out
