"""The images on which an exported file is compared: photographs, and images whose errors show at borders and limits.

Noise alone is not enough: a file can be equal on noise and wrong on photographs, whose channels differ and whose
neighbouring pixels are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.deploy.preprocessing import PIXEL_MAX, Preprocessing
from repvgg.errors import MissingDependencyError, require
from repvgg.verify import border_inputs

Shape = tuple[int, int, int]

_BATCH = 3  # not 2, that of the capture: a constant that it left in the graph would not show
_CROPS = ((0, 0), (1, 1))  # corners of each photograph that is cropped, as fractions of what is left over
_GREY = 128.0


@final
class NoPhotographsError(MissingDependencyError):
    """The package that ships photographs is not installed."""


def photographs(shape: Shape) -> Tensor:
    """Return photographs as pixels in [0, 255], float32 (6, C, H, W): two whole ones, and two crops of each.

    They are the two that scikit-learn ships, a building and a flower (427 x 640 pixels), resized with antialiasing.
    Grey images are the mean of the channels; of other numbers of channels, the three are repeated.

    Raises:
        NoPhotographsError: scikit-learn is not installed.
    """
    channels, height, width = shape
    try:
        loaded = require("sklearn.datasets", "train").load_sample_images()
    except ImportError as error:
        raise NoPhotographsError(
            "No photographs were compared: pip install 'repvgg[train]', or name your own with --images or --data."
        ) from error
    found = []
    for pixels in loaded.images:
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()[None]
        image = image.mean(1, keepdim=True) if channels == 1 else image.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
        side = min(image.shape[2:]) // 2
        parts = [image]
        for down, right in _CROPS:
            top, left = down * (image.shape[2] - side), right * (image.shape[3] - side)
            parts.append(image[:, :, top : top + side, left : left + side])
        found += [F.interpolate(part, (height, width), mode="bilinear", antialias=True) for part in parts]
    return torch.cat(found).round().clamp(0, PIXEL_MAX)


def border_images(shape: Shape, preprocessing: Preprocessing | None, *, pixels: bool) -> list[Tensor]:
    """Return batches of 3, 1 and 5 images that reveal errors at borders and limits.

    The first two are random, with large values at the border (:func:`repvgg.verify.border_inputs`). The last holds
    images of constant 0 and of grey, black and white ones (the limits of the range), and one that is black but for the
    pixels at its corners.

    Args:
        shape: (C, H, W) of an image.
        preprocessing: of pixels; None takes the normalization that the random images have, a mean of 0.
        pixels: return pixels in [0, 255] instead of normalized images.
    """
    drawn = [border_inputs((batch, *shape), batches=1, seed=batch)[0] for batch in (_BATCH, 1)]
    black, white, grey = (torch.full((1, *shape), value) for value in (0.0, PIXEL_MAX, _GREY))
    corners = black.clone()
    corners[..., :: max(1, shape[1] - 1), :: max(1, shape[2] - 1)] = PIXEL_MAX
    limits = torch.cat([black, white, grey, corners])
    if pixels:
        # A quarter of the range is a deviation of photographs.
        return [*(batch * PIXEL_MAX / 4 for batch in drawn), torch.cat([limits, limits[:1]])]
    limits = limits / PIXEL_MAX if preprocessing is None else preprocessing.apply(limits)
    return [*drawn, torch.cat([limits, torch.zeros(1, *shape)])]


def split_to(batches: Sequence[Tensor], at_once: int | None) -> list[Tensor]:
    """Return the batches in parts of at most ``at_once`` images, of exactly so many where the size is fixed to 1."""
    return list(batches) if at_once is None else [part for batch in batches for part in torch.split(batch, at_once)]
