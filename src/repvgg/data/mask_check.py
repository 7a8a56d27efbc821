"""Read every image of a dataset with its mask once, and report problems before they stop a training run."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from repvgg.data.config import DataConfig
from repvgg.data.decode import CorruptImage
from repvgg.data.label_sets import IGNORE_INDEX
from repvgg.data.loaders import parallel_map
from repvgg.data.mask_files import MaskSplit
from repvgg.data.sources.masks import open_mask_source
from repvgg.errors import UsageError


@final
@dataclass
class MaskSplitReport:
    """Statistics of one split."""

    name: str  # "train" or "validation"
    pixels: NDArray[np.int64]  # (256,) pixels of each class, and of those that are ignored at 255
    images: int = 0  # with the corrupt ones
    present: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))  # images that hold a class
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # width and height of the readable images

    @property
    def ignored(self) -> float:
        """The share of ignored pixels; 0 without pixels."""
        return float(self.pixels[IGNORE_INDEX] / max(1, self.pixels.sum()))


@final
@dataclass
class MaskReport:
    """The result of :func:`check_masks`. Files are named by their paths."""

    uri: str  # of the dataset
    classes: tuple[str, ...]
    splits: tuple[MaskSplitReport, MaskSplitReport]  # training and validation
    total: int  # number of images to read
    corrupt: list[CorruptImage] = field(default_factory=list)  # images and masks that cannot be used, and why
    unmasked: list[str] = field(default_factory=list)  # images without a mask
    unused: list[str] = field(default_factory=list)  # masks without an image
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # training and validation image of equal pixels
    notes: tuple[str, ...] = ()  # on how the splits were chosen
    complete: bool = True  # False after Ctrl-C

    @property
    def usable(self) -> bool:
        """Whether every image has a mask and no file is corrupt."""
        return not self.corrupt and not self.unmasked and all(split.images for split in self.splits)

    def never_seen(self, split: MaskSplitReport) -> list[str]:
        """Return the classes that no pixel of a split has."""
        return [name for label, name in enumerate(self.classes) if not split.pixels[label]]

    def to_dict(self) -> dict[str, Any]:
        parts = {
            split.name: {
                "images": split.images,
                "sizes": [[*size, count] for size, count in split.sizes.most_common()],
                "pixels": {name: int(split.pixels[label]) for label, name in enumerate(self.classes)},
                "images_with_class": {name: int(split.present[label]) for label, name in enumerate(self.classes)},
                "ignored_pixels": int(split.pixels[IGNORE_INDEX]),
                "ignored_share": split.ignored,
                "never_seen": self.never_seen(split),
            }
            for split in self.splits
        }
        return {
            "uri": self.uri,
            "task": "segmentation",
            "usable": self.usable,
            "complete": self.complete,
            "total": self.total,
            "classes": list(self.classes),
            "parts": parts,
            "bad": [{"where": one.location, "kind": one.kind, "why": one.reason} for one in self.corrupt],
            "images_without_mask": self.unmasked,
            "masks_without_image": self.unused,
            "duplicates": [list(pair) for pair in self.duplicates],
            "notes": list(self.notes),
        }


def check_masks(
    config: DataConfig, *, limit: int | None = None, on_progress: Callable[[int, int | None], None] | None = None
) -> MaskReport:
    """Read every image and mask of both splits in ``config.workers`` processes, and report.

    Sizes of image and mask, labels out of range and files that cannot be read are listed, as are images without masks
    and masks without images; pixels are counted by class. Ctrl-C ends the check early.

    Args:
        config: the URIs, ``ignore_index``, the number of channels and ``workers`` matter.
        limit: images to read of each split, evenly spaced; None: all.
        on_progress: called with the number of images read, and the total.

    Raises:
        UsageError, DataError: the URIs cannot be opened at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}.")
    source = open_mask_source(config, strict=False)
    assert source.val is not None
    splits = source.train, source.val
    numbers = [len(split) if limit is None else min(limit, len(split)) for split in splits]
    reports = tuple(MaskSplitReport(name, np.zeros(256, np.int64)) for name in ("train", "validation"))
    report = MaskReport(config.uri, splits[0].labels.names, (reports[0], reports[1]), sum(numbers), notes=source.notes)
    # A URI that holds a single split has one list of these, which both of its parts carry.
    report.unmasked = list(dict.fromkeys(path for split in splits for path in split.unmasked))
    report.unused = list(dict.fromkeys(path for split in splits for path in split.unused))
    training: dict[bytes, str] = {}
    try:
        for part, split, number in zip(report.splits, splits, numbers, strict=True):
            indices = [index * len(split) // number for index in range(number)]
            # partial, not a closure: worker processes unpickle it.
            read = partial(_read, split, config.channels or 3, indices)
            for index, facts in zip(indices, parallel_map(read, number, config.workers), strict=True):
                part.images += 1
                if isinstance(facts, CorruptImage):
                    report.corrupt.append(facts)
                else:
                    part.pixels += facts.pixels
                    part.present += facts.pixels > 0
                    part.sizes[facts.size] += 1
                    image = split.files(index).image
                    if part is report.splits[0]:
                        training.setdefault(facts.digest, image)
                    elif facts.digest in training:
                        report.duplicates.append((training[facts.digest], image))
                if on_progress is not None:
                    on_progress(sum(one.images for one in report.splits), report.total)
    except KeyboardInterrupt:
        report.complete = False
    return report


@final
@dataclass(frozen=True)
class _MaskFacts:
    size: tuple[int, int]  # width and height
    pixels: NDArray[np.int64]  # (256,) pixels of each class
    digest: bytes  # hash of the image


def _read(split: MaskSplit, channels: int, indices: list[int], number: int) -> _MaskFacts | CorruptImage:
    pair = split.pair(indices[number], channels)
    if isinstance(pair, CorruptImage):
        return pair
    height, width = pair.mask.shape
    # The size goes into the hash: 4x2 and 2x4 pixels may be the same bytes.
    salt = width.to_bytes(8, "little") + height.to_bytes(8, "little")
    digest = hashlib.blake2b(pair.pixels.tobytes(), digest_size=16, salt=salt).digest()
    return _MaskFacts((width, height), np.bincount(pair.mask.reshape(-1), minlength=256), digest)
