"""Masks as pictures: index PNGs with a palette, overlays with a legend, and maps of errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from repvgg._files import atomic_write
from repvgg.errors import printable

Palette: TypeAlias = Sequence[Sequence[int]]
Bytes: TypeAlias = NDArray[np.uint8]

#: Colours of an error map.
RIGHT_COLOUR, WRONG_COLOUR, IGNORED_COLOUR = (214, 219, 224), (197, 43, 32), (255, 255, 255)
_OPACITY = 0.55  # of the colours in an overlay
_ROW, _MARGIN, _SWATCH = 18, 8, 12  # pixels of a legend
_COLUMN = 150  # pixels of an entry of a legend


def write_mask(path: Path, mask_HW: Bytes, palette: Palette, *, overwrite: bool = False) -> None:
    """Write an 8-bit PNG whose pixels are class indices, with their colours as its palette.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is not set.
        OutputError: it cannot be written.
    """
    image = Image.fromarray(mask_HW, "P")
    image.putpalette([int(value) for colour in _complete(palette) for value in colour])
    with atomic_write(path, overwrite=overwrite) as part:
        image.save(part, "PNG")


def colours_of(mask_HW: Bytes, palette: Palette) -> Bytes:
    """Return the colours (H, W, 3) of a mask; labels without one are white."""
    table: Bytes = np.asarray(_complete(palette), dtype=np.uint8)
    return table[mask_HW]


def error_map(prediction_HW: Bytes, truth_HW: Bytes, ignore_index: int) -> Bytes:
    """Return (H, W, 3): grey where the prediction is right, red where it is wrong, white where the truth is ignored."""
    codes = np.where(prediction_HW == truth_HW, 0, 1)
    codes[truth_HW == ignore_index] = 2
    table: Bytes = np.asarray([RIGHT_COLOUR, WRONG_COLOUR, IGNORED_COLOUR], dtype=np.uint8)
    return table[codes]


def overlay(image_HWC: Bytes, mask_HW: Bytes, palette: Palette, classes: Sequence[str]) -> Image.Image:
    """Return the image with the colours of its mask over it, and below it the classes that the mask has.

    The classes are listed from the largest to the smallest, each with its share of the pixels.

    Args:
        image_HWC: RGB pixels.
        mask_HW: class indices.
        palette: a colour per class.
        classes: a name per class.
    """
    mixed = (1 - _OPACITY) * image_HWC + _OPACITY * colours_of(mask_HW, palette)
    height, width = mask_HW.shape
    counts = np.bincount(mask_HW.reshape(-1), minlength=256)
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    columns = max(1, (width - _MARGIN) // _COLUMN)
    rows = -(-len(present) // columns)
    picture = Image.new("RGB", (width, height + 2 * _MARGIN + rows * _ROW), "white")
    picture.paste(Image.fromarray(mixed.round().astype(np.uint8)))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_SWATCH)
    for position, index in enumerate(present):
        row, column = divmod(position, columns)
        left, top = _MARGIN + column * _COLUMN, height + _MARGIN + row * _ROW
        draw.rectangle((left, top + 2, left + _SWATCH, top + 2 + _SWATCH), tuple(palette[index]), "black")
        name = classes[index] if index < len(classes) else str(index)
        label = f"{printable(name)} {counts[index] / mask_HW.size:.1%}"
        draw.text((left + _SWATCH + 5, top), label, "black", font)
    return picture


def _complete(palette: Palette) -> list[Sequence[int]]:
    """Return 256 colours: those given, then white."""
    return [*palette, *[(255, 255, 255)] * (256 - len(palette))]
