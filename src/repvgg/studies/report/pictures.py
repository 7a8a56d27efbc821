"""Photographs and masks as images inside a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from repvgg.errors import require
from repvgg.training.samples import Sample

_WIDTH = 480  # pixels of the widest picture in a page


class SamplePictures(NamedTuple):
    """Data URIs of one image, and the share of its pixels that are right."""

    image: str
    truth: str
    prediction: str
    errors: str
    accuracy: float | None  # None: all pixels are ignored
    width: int
    height: int


def pictures_of(sample: Sample, palette: Sequence[Sequence[int]], ignore_index: int) -> SamplePictures:
    """Return a sample as pictures: the image, both masks in the colours of ``palette``, and the map of errors."""
    require("PIL", "study")
    from PIL import Image

    from repvgg.data.mask_images import colours_of, error_map

    counted = sample.truth != ignore_index
    right = int(((sample.prediction == sample.truth) & counted).sum())
    height, width = sample.truth.shape
    scale = min(1.0, _WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def uri(pixels: Any, kind: str) -> str:
        # Nearest pixels of masks: averages of colours would look like other classes.
        resample = Image.Resampling.BILINEAR if kind == "JPEG" else Image.Resampling.NEAREST
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, resample)
        if kind == "PNG":
            image = image.quantize(256, dither=Image.Dither.NONE)  # few colours: a third of the bytes
        buffer = BytesIO()
        image.save(buffer, kind)
        return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

    return SamplePictures(
        uri(sample.image, "JPEG"),
        uri(colours_of(sample.truth, palette), "PNG"),
        uri(colours_of(sample.prediction, palette), "PNG"),
        uri(error_map(sample.prediction, sample.truth, ignore_index), "PNG"),
        right / int(counted.sum()) if counted.any() else None,
        *size,
    )
