"""Samples of a segmentation for a report: images, their masks and the predicted ones, as files and from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from repvgg._files import atomic_write
from repvgg.errors import require
from repvgg.training.segmentation_evaluation import MaskBatch

SAMPLES_FOLDER = "samples"
_COUNT = 6
_KINDS = ("image", "truth", "prediction")

Bytes = NDArray[np.uint8]


@final
@dataclass(frozen=True, eq=False)
class Sample:
    """An image with masks; class indices, and the ignored label as the data have it."""

    image: Bytes  # (H, W, 3)
    truth: Bytes  # (H, W)
    prediction: Bytes  # (H, W)


@final
class SampleCollector:
    """Keeps the predictions for a few images, evenly spaced over ``num_images``.

    Args:
        num_images: how many images are evaluated; None, if unknown, keeps the first ones.
        to_pixels: from images (N, C, H, W) that are not uint8 to pixels in [0, 1].
        count: how many to keep at most.
    """

    def __init__(self, num_images: int | None, to_pixels: Any = None, count: int = _COUNT) -> None:
        total = count if num_images is None else num_images
        self._wanted = {round((index + 0.5) * total / count - 0.5) for index in range(count)} if total > count else None
        self._count, self._to_pixels, self._seen = count, to_pixels, 0
        self.samples: list[Sample] = []

    def add(self, batch: MaskBatch) -> None:
        """Keep those images of a batch that are wanted, with the masks of the last model."""
        for image, truth, prediction in zip(batch.images, batch.truth, batch.predictions[-1], strict=True):
            if len(self.samples) < self._count and (self._wanted is None or self._seen in self._wanted):
                self.samples.append(Sample(self._pixels(image), _bytes(truth), _bytes(prediction)))
            self._seen += 1

    def _pixels(self, image_CHW: Tensor) -> Bytes:
        if image_CHW.is_floating_point():
            pixels = image_CHW if self._to_pixels is None else self._to_pixels(image_CHW)
            image_CHW = (255 * pixels).round()
        rgb = image_CHW.expand(3, -1, -1).permute(1, 2, 0)
        return _bytes(rgb)


def write_samples(folder: Path, samples: Sequence[Sample], palette: Sequence[Sequence[int]]) -> list[dict[str, str]]:
    """Write three PNGs of each sample, masks as class indices with a palette; return their names.

    Raises:
        OutputError: a file cannot be written.
    """
    require("PIL", "train")
    from PIL import Image

    from repvgg.data.mask_images import write_mask

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, sample in enumerate(samples, 1):
        names = {kind: f"{number}-{kind}.png" for kind in _KINDS}
        with atomic_write(folder / names["image"], overwrite=True) as part:
            Image.fromarray(sample.image).save(part, "PNG")
        write_mask(folder / names["truth"], sample.truth, palette, overwrite=True)
        write_mask(folder / names["prediction"], sample.prediction, palette, overwrite=True)
        rows.append(names)
    return rows


def read_samples(folder: Path, rows: Sequence[dict[str, str]]) -> list[Sample]:
    """Read what :func:`write_samples` has written; samples whose files are gone are left out."""
    from PIL import Image

    def read(name: str, mode: str | None) -> Bytes:
        with Image.open(folder / Path(name).name) as image:
            return np.asarray(image if mode is None else image.convert(mode), dtype=np.uint8)

    samples = []
    for names in rows:
        try:
            samples.append(
                Sample(read(names["image"], "RGB"), read(names["truth"], None), read(names["prediction"], None))
            )
        except FileNotFoundError:
            continue
    return samples


def _bytes(values: Tensor) -> Bytes:
    array: Bytes = values.cpu().numpy().astype(np.uint8)
    return array
