"""Read every image of a dataset once, and report problems before they stop a training run."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median_low
from typing import Any, final

import torch
from PIL import Image

from repvgg.data.config import DataConfig
from repvgg.data.decode import CorruptImage, decode, to_channels
from repvgg.data.loaders import parallel_map
from repvgg.data.sources import check_splits, open_source
from repvgg.data.sources.local import ignored_files
from repvgg.data.splits import FileSplit, MapSplit, Split, num_images
from repvgg.errors import DataError, UsageError

TRAIN, VALIDATION = "train", "validation"
_JSON_NAMES = {TRAIN: "train", VALIDATION: "held out"}  # keys of the JSON report, unchanged since its first version
_PLAIN_MODES = ("RGB", "L")


@final
@dataclass(frozen=True)
class ImageFacts:
    """Properties of one image."""

    location: str  # path, or a description
    label: int  # index of the class
    size: tuple[int, int] | None = None  # width and height; None if it is corrupt
    mode: str = ""  # PIL's name of the pixel format
    remarks: tuple[str, ...] = ()  # unusual properties, a few words each
    digest: bytes = b""  # hash of the pixels after conversion to RGB or greyscale
    corrupt: CorruptImage | None = None  # the problem, if any


@final
@dataclass
class SplitReport:
    """Statistics of one split."""

    name: str  # "train" or "validation"
    classes: Counter[str] = field(default_factory=Counter)  # images per class, with the corrupt ones
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height of each readable image
    modes: Counter[str] = field(default_factory=Counter)  # images per pixel format

    @property
    def images(self) -> int:
        return self.classes.total()

    def size_range(self) -> tuple[tuple[int, int], ...]:
        """Return the smallest, median and largest size by number of pixels; empty without a readable image."""
        if not self.sizes:
            return ()
        areas = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        return areas[0], areas[median_low(range(len(areas)))], areas[-1]


@final
@dataclass
class CheckReport:
    """The result of :func:`check_data`. Images are named by their locations."""

    uri: str  # of the dataset
    splits: tuple[SplitReport, SplitReport]  # training and validation
    total: int | None  # number of images to read; None if it is unknown
    corrupt: list[CorruptImage] = field(default_factory=list)  # images that cannot be used
    remarks: dict[str, list[str]] = field(default_factory=dict)  # remark on unusual but usable images → locations
    duplicates: list[tuple[str, str]] = field(default_factory=list)  # training and validation image of equal pixels
    conflicts: list[tuple[str, str]] = field(default_factory=list)  # training images of equal pixels in two classes
    mismatch: str | None = None  # why the splits do not fit together, or cannot be trained on; None if they do
    notes: tuple[str, ...] = ()  # on how the splits were chosen
    complete: bool = True  # False after Ctrl-C

    @property
    def usable(self) -> bool:
        """Whether no image is corrupt and the splits fit together."""
        return not self.corrupt and self.mismatch is None

    def to_dict(self) -> dict[str, Any]:
        splits = {
            _JSON_NAMES[split.name]: {
                "images": split.images,
                "classes": dict(split.classes),
                "sizes": [list(size) for size in split.size_range()],
                "modes": dict(split.modes),
            }
            for split in self.splits
        }
        return {
            "uri": self.uri,
            "usable": self.usable,
            "complete": self.complete,
            "total": self.total,
            "parts": splits,
            "bad": [{"where": image.location, "kind": image.kind, "why": image.reason} for image in self.corrupt],
            "remarks": self.remarks,
            "duplicates": [list(pair) for pair in self.duplicates],
            "conflicts": [list(pair) for pair in self.conflicts],
            "disagreement": self.mismatch,
            "notes": list(self.notes),
        }


def check_data(
    config: DataConfig, *, limit: int | None = None, on_progress: Callable[[int, int | None], None] | None = None
) -> CheckReport:
    """Read every image of both splits in ``config.workers`` processes (streams: in this process), and report.

    Ctrl-C ends the check early; the report covers what was read.

    Args:
        config: the URIs, the number of channels and ``workers`` matter.
        limit: images to read of each split, evenly spaced (streams: the first ones); None: all.
        on_progress: called with the number of images read, and the total if it is known.

    Raises:
        UsageError, DataError, MissingDependencyError: the URIs cannot be opened at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}.")
    source = open_source(config)
    assert source.val is not None
    splits = (source.train, source.val)
    # An unknown length counts as infinite, which a limit bounds.
    lengths = [math.inf if length is None else length for length in map(num_images, splits)]
    expected = sum(min(length, math.inf if limit is None else limit) for length in lengths)
    total = None if expected == math.inf else int(expected)
    report = CheckReport(config.uri, (SplitReport(TRAIN), SplitReport(VALIDATION)), total, notes=source.notes)
    try:
        check_splits(source, config.uri)
    except DataError as error:
        report.mismatch = str(error)
    channels = config.channels or source.channels
    collector = _Collector(report)
    try:
        for split_report, split in zip(report.splits, splits, strict=True):
            if isinstance(split, FileSplit) and (ignored := ignored_files(split.root)):
                report.remarks.setdefault("ignored: no image extension", []).extend(ignored)
            for facts in _read(split, channels, limit, config.workers):
                collector.add(split_report, split, facts)
                if on_progress is not None:
                    on_progress(collector.done, total)
    except KeyboardInterrupt:
        report.complete = False
    return report


@final
class _Collector:
    """Adds the facts of single images to the report."""

    def __init__(self, report: CheckReport) -> None:
        self.done = 0
        self._report = report
        self._train: dict[bytes, ImageFacts] = {}

    def add(self, split_report: SplitReport, split: Split, facts: ImageFacts) -> None:
        self.done += 1
        report = self._report
        known = 0 <= facts.label < len(split.classes)
        split_report.classes[split.classes[facts.label] if known else f"label {facts.label}"] += 1
        if not known and not isinstance(split, MapSplit):  # labels of map-style splits were checked at once
            report.mismatch = f"{facts.location!r} has label {facts.label}, which is out of range."
        if facts.corrupt is not None:
            report.corrupt.append(facts.corrupt)
            return
        assert facts.size is not None
        split_report.sizes.append(facts.size)
        split_report.modes[facts.mode] += 1
        for remark in facts.remarks:
            report.remarks.setdefault(remark, []).append(facts.location)
        # Digests of the training images only, 16 bytes each: validation images are compared with them.
        twin = self._train.get(facts.digest)
        if split_report.name == TRAIN:
            self._train.setdefault(facts.digest, facts)
            if twin is not None and twin.label != facts.label:
                report.conflicts.append((twin.location, facts.location))
        elif twin is not None:
            report.duplicates.append((twin.location, facts.location))


def _read(split: Split, channels: int, limit: int | None, workers: int) -> Iterator[ImageFacts]:
    if isinstance(split, MapSplit):
        number = len(split) if limit is None else min(limit, len(split))
        # Evenly spaced, because images are usually sorted by class.
        indices = torch.arange(number) * len(split) // max(1, number)
        # partial, not a closure: worker processes unpickle it.
        yield from parallel_map(partial(_read_image, split, channels, indices), number, workers)
        return
    for number, example in enumerate(split.examples(None, 0, 1)):  # a stream has no random access to divide it by
        if number == limit:
            return
        if isinstance(example, CorruptImage):
            yield ImageFacts(example.location, -1, corrupt=example)
        else:
            yield _facts(decode(example.data, example.location), example.location, example.label, channels)


def _read_image(split: MapSplit, channels: int, indices: torch.Tensor, number: int) -> ImageFacts:
    index = int(indices[number])
    return _facts(split.image(index), split.location(index), int(split.labels[index]), channels)


def _facts(image: Image.Image | CorruptImage, location: str, label: int, channels: int) -> ImageFacts:
    if isinstance(image, CorruptImage):
        return ImageFacts(location, label, corrupt=image)
    converted = to_channels(image, channels, location)
    if isinstance(converted, CorruptImage):
        return ImageFacts(location, label, corrupt=converted)
    # The size goes into the hash: 4x2 and 2x4 pixels may be the same bytes.
    salt = b"".join(side.to_bytes(8, "little") for side in converted.size)
    digest = hashlib.blake2b(converted.tobytes(), digest_size=16, salt=salt).digest()
    return ImageFacts(location, label, image.size, image.mode, tuple(_remarks(image)), digest)


def _remarks(image: Image.Image) -> Iterable[str]:
    if image.mode not in _PLAIN_MODES or "transparency" in image.info:
        yield f"converted from mode {image.mode}"
    if min(image.size) == 1:
        yield "one pixel high or wide"
    if getattr(image, "is_animated", False):
        yield "has several frames, of which the first is used"
