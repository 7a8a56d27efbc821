"""Reading every image of a data set once, to say what is wrong before a night of training does."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, final

import torch
from PIL import Image

from repvgg.data.config import DataConfig
from repvgg.data.decoding import Bad, decode, to_channels
from repvgg.data.parts import Example, FilesPart, IndexedPart, Part, length_of
from repvgg.data.sources import agree, open_source
from repvgg.data.sources.folder import passed_over
from repvgg.data.workers import in_order
from repvgg.errors import DataError, UsageError

TRAIN, HELD_OUT = "train", "held out"
_ORIENTATION = 0x0112  # of EXIF
_PLAIN = ("RGB", "L")


@final
@dataclass(frozen=True)
class Seen:
    """What one image is like.

    Attributes:
        where: where it lies.
        label: its class.
        size: width and height, None if it is bad.
        mode: of its pixels, as PIL calls it.
        remarks: what is unusual about it, a few words each.
        digest: of its pixels, once they are RGB or grey.
        bad: what is wrong with it.
    """

    where: str
    label: int
    size: tuple[int, int] | None = None
    mode: str = ""
    remarks: tuple[str, ...] = ()
    digest: bytes = b""
    bad: Bad | None = None


@final
@dataclass
class PartReport:
    """What was seen of one part.

    Attributes:
        name: "train" or "held out".
        classes: images seen of each class, bad ones too.
        sizes: width and height of each good image.
        modes: how often each mode occurs.
    """

    name: str
    classes: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.classes.total()

    def spread(self) -> tuple[tuple[int, int], ...]:
        """The smallest, the median and the largest image by its number of pixels; nothing without a good image."""
        if not self.sizes:
            return ()
        areas = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        return areas[0], areas[median_low(range(len(areas)))], areas[-1]


@final
@dataclass
class CheckReport:
    """What :func:`check_data` found.

    Attributes:
        uri: the data set.
        parts: both of them.
        total: images that were to be read, None if nobody knows.
        bad: images that cannot be used.
        remarks: what is unusual, and where; such images can be used.
        duplicates: images to train on that are held out too, pixel by pixel.
        conflicts: images to train on that occur twice, in different classes.
        disagreement: why the two parts do not belong together, or why nothing can be learned; None if all is well.
        notes: how the parts came about.
        complete: False after Ctrl-C.
    """

    uri: str
    parts: tuple[PartReport, PartReport]
    total: int | None
    bad: list[Bad] = field(default_factory=list)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    disagreement: str | None = None
    notes: tuple[str, ...] = ()
    complete: bool = True

    @property
    def usable(self) -> bool:
        """Whether there is nothing bad."""
        return not self.bad and self.disagreement is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {
            part.name: {
                "images": part.images,
                "classes": dict(part.classes),
                "sizes": [list(size) for size in part.spread()],
                "modes": dict(part.modes),
            }
            for part in self.parts
        }
        return {
            "uri": self.uri,
            "usable": self.usable,
            "complete": self.complete,
            "total": self.total,
            "parts": parts,
            "bad": [{"where": bad.where, "kind": bad.kind, "why": bad.why} for bad in self.bad],
            "remarks": self.remarks,
            "duplicates": [list(pair) for pair in self.duplicates],
            "conflicts": [list(pair) for pair in self.conflicts],
            "disagreement": self.disagreement,
            "notes": list(self.notes),
        }


def check_data(
    config: DataConfig, *, limit: int | None = None, on_progress: Callable[[int, int | None], None] | None = None
) -> CheckReport:
    """Read every image of both parts, in ``config.workers`` processes (streams: in this one), and report.

    Ctrl-C ends it early and keeps what was counted.

    Args:
        config: the URIs and the number of channels matter, and ``workers``.
        limit: images to read of each part, evenly spread (streams: the first ones); None: all.
        on_progress: called with the number of images read and that of all, if it is known.

    Raises:
        UsageError, DataError, MissingDependencyError: the URIs cannot be opened at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"A limit is 1 or more, not {limit}.")
    source = open_source(config)
    assert source.held_out is not None
    parts = {TRAIN: source.train, HELD_OUT: source.held_out}
    lengths = [_length(part, limit) for part in parts.values()]
    total = None if None in lengths else sum(length for length in lengths if length is not None)
    report = CheckReport(config.uri, (PartReport(TRAIN), PartReport(HELD_OUT)), total, notes=source.notes)
    try:
        agree(source, config.uri)
    except DataError as error:
        report.disagreement = str(error)
    channels = config.channels or source.channels
    counting = _Counting(report)
    try:
        for part_report, part in zip(report.parts, parts.values(), strict=True):
            _pass_over(report, part)
            for seen in _look_at(part, channels, limit, config.workers):
                counting.add(part_report, part, seen)
                if on_progress is not None:
                    on_progress(counting.done, total)
    except KeyboardInterrupt:
        report.complete = False
    return report


def _length(part: Part, limit: int | None) -> int | None:
    length = length_of(part)
    return length if limit is None else limit if length is None else min(limit, length)


def _pass_over(report: CheckReport, part: Part) -> None:
    """Remark on files that have not the name of an image."""
    if isinstance(part, FilesPart):
        found = passed_over(part.root)
        if found:
            report.remarks.setdefault("passed over: not the name of an image", []).extend(found)


@final
class _Counting:
    """Puts what was seen into the report."""

    def __init__(self, report: CheckReport) -> None:
        self.done = 0
        self._report = report
        self._train: dict[bytes, Seen] = {}

    def add(self, part_report: PartReport, part: Part, seen: Seen) -> None:
        """Count one image."""
        self.done += 1
        known = 0 <= seen.label < len(part.classes)
        part_report.classes[part.classes[seen.label] if known else f"label {seen.label}"] += 1
        if not known and not isinstance(part, IndexedPart):
            self._report.disagreement = f"{seen.where!r} has label {seen.label}, which is no class."
        if seen.bad is not None or seen.size is None:
            self._report.bad.extend([seen.bad] if seen.bad is not None else [])
            return
        part_report.sizes.append(seen.size)
        part_report.modes[seen.mode] += 1
        for remark in seen.remarks:
            self._report.remarks.setdefault(remark, []).append(seen.where)
        self._compare(part_report.name, seen)

    def _compare(self, part: str, seen: Seen) -> None:
        twin = self._train.get(seen.digest)
        if part == TRAIN:
            self._train.setdefault(seen.digest, seen)
            if twin is not None and twin.label != seen.label:
                self._report.conflicts.append((twin.where, seen.where))
        elif twin is not None:
            self._report.duplicates.append((twin.where, seen.where))


def _look_at(part: Part, channels: int, limit: int | None, workers: int) -> Iterator[Seen]:
    if isinstance(part, IndexedPart):
        number = len(part) if limit is None else min(limit, len(part))
        indices = torch.arange(number) * len(part) // max(1, number)
        yield from in_order(_Look(part, channels, indices), number, workers)
        return
    for number, example in enumerate(part.examples(None, 0, 1)):
        if number == limit:
            return
        yield _of_example(example, channels)


@final
@dataclass(frozen=True)
class _Look:
    """Number → what the image is like; a value, so that loading processes can have it."""

    part: IndexedPart
    channels: int
    indices: torch.Tensor

    def __call__(self, number: int) -> Seen:
        index = int(self.indices[number])
        where = self.part.where(index)
        return _seen(self.part.image(index), where, int(self.part.labels[index]), self.channels)


def _of_example(example: Example | Bad, channels: int) -> Seen:
    if isinstance(example, Bad):
        return Seen(example.where, -1, bad=example)
    return _seen(decode(example.data, example.where), example.where, example.label, channels)


def _seen(image: Image.Image | Bad, where: str, label: int, channels: int) -> Seen:
    if isinstance(image, Bad):
        return Seen(where, label, bad=image)
    converted = to_channels(image, channels, where)
    if isinstance(converted, Bad):
        return Seen(where, label, bad=converted)
    digest = hashlib.blake2b(converted.tobytes(), digest_size=16, salt=_salt(converted.size)).digest()
    return Seen(where, label, image.size, image.mode, tuple(_remarks(image)), digest)


def _salt(size: tuple[int, int]) -> bytes:
    return b"".join(side.to_bytes(8, "little") for side in size)


def _remarks(image: Image.Image) -> Iterable[str]:
    if image.mode not in _PLAIN or "transparency" in image.info:
        yield f"converted from mode {image.mode}"
    if min(image.size) == 1:
        yield "one pixel high or wide"
    if image.getexif().get(_ORIENTATION, 1) != 1:
        yield "has an orientation in EXIF, which is not applied"
    if getattr(image, "is_animated", False):
        yield "has several frames, of which the first counts"
