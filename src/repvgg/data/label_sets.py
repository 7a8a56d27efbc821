"""What the values of stored masks mean: class names, colours, and the map from stored labels to classes."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from repvgg.errors import DataError, UsageError, first_line

IGNORE_INDEX = 255  # class of the pixels that are left out of loss and metrics, in every mask that is delivered
MAX_CLASSES = 255  # masks are 8-bit

Bytes = NDArray[np.uint8]


@final
@dataclass(frozen=True)
class LabelSet:
    """The classes of a dataset of masks, and how its files store them.

    Args:
        names: one per class.
        palette: (K, 3) uint8, a colour per class.
        classes: class of each stored label 0 … 255, int16; :data:`IGNORE_INDEX`, or −1 for labels that do not occur.
        ignore_index: the stored label of ignored pixels, for messages.
        colours: stored colour → stored label, of masks that hold colours; None: masks hold labels.
    """

    names: tuple[str, ...]
    palette: Bytes
    classes: NDArray[np.int16]
    ignore_index: int = IGNORE_INDEX
    colours: Mapping[tuple[int, int, int], int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def to_classes(self, labels_HW: Bytes) -> Bytes | str:
        """Return the classes of stored labels, or the problem as a clause."""
        counts = np.bincount(labels_HW.reshape(-1), minlength=256)
        unknown = np.flatnonzero((counts > 0) & (self.classes < 0))
        if len(unknown):
            label = int(unknown[0])
            valid = np.flatnonzero((self.classes >= 0) & (self.classes != IGNORE_INDEX))
            return (
                f"holds label {label} in {counts[label]} pixels, but the labels of the {len(self)} classes are "
                f"{valid[0]} … {valid[-1]}, and {self.ignore_index} is ignored"
            )
        result: Bytes = self.classes.astype(np.uint8)[labels_HW]
        return result


def indexed_labels(
    names: Sequence[str],
    ignore_index: int = IGNORE_INDEX,
    palette: Bytes | None = None,
    colours: Mapping[tuple[int, int, int], int] | None = None,
) -> LabelSet:
    """Return the label set of masks in which label i is the i-th name.

    A name at ``ignore_index`` is no class: the labels after it move down by one.

    Raises:
        DataError: there are fewer than two classes, or more than :data:`MAX_CLASSES`.
    """
    kept = [label for label in range(len(names)) if label != ignore_index]
    if not 2 <= len(kept) <= MAX_CLASSES:
        raise DataError(f"Masks need 2 … {MAX_CLASSES} classes, got {len(kept)}: correct classes.txt or the masks.")
    classes = np.full(256, -1, np.int16)
    classes[kept] = np.arange(len(kept))
    classes[ignore_index] = IGNORE_INDEX
    palette = distinct_colours(len(kept)) if palette is None else palette[kept]
    return LabelSet(tuple(names[label] for label in kept), palette, classes, ignore_index, colours)


def read_classes(path: Path, ignore_index: int) -> LabelSet:
    """Read ``classes.txt``: on line i the name of label i, optionally with a colour, as in ``road 128 64 128``.

    Empty lines and lines that start with ``#`` do not count. With colours, masks may be RGB images.

    Raises:
        DataError: the file cannot be read, a name is missing or occurs twice, or only some lines have colours.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {first_line(error)}.") from error
    parsed = [_name_and_colour(line) for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in parsed]
    colours = [colour for _, colour in parsed if colour is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{str(path)!r} has the class {twice[0]!r} twice: give each class its own name.")
    if colours and len(colours) < len(names):
        raise DataError(f"{str(path)!r} has colours on some lines only: write NAME R G B on all lines, or on none.")
    if len(set(colours)) < len(colours):
        raise DataError(f"{str(path)!r} has a colour twice: give each class its own colour.")
    if len(names) > 256:
        raise DataError(f"{str(path)!r} has {len(names)} names, but masks have at most 256 labels.")
    if not colours:
        return indexed_labels(names, ignore_index)
    by_colour = {colour: label for label, colour in enumerate(colours)}
    return indexed_labels(names, ignore_index, np.array(colours, np.uint8), by_colour)


def _name_and_colour(line: str) -> tuple[str, tuple[int, int, int] | None]:
    words = line.replace(",", " ").split()
    if len(words) > 3 and all(word.isdecimal() and int(word) <= 255 for word in words[-3:]):
        red, green, blue = map(int, words[-3:])
        return " ".join(words[:-3]), (red, green, blue)
    return line, None


def numbered_labels(number: int, ignore_index: int) -> LabelSet:
    """Return the label set of the labels 0 … ``number`` − 1 without names; ``ignore_index`` is no class."""
    return indexed_labels([f"class {label}" for label in range(number)], ignore_index)


def uncounted_labels(ignore_index: int) -> LabelSet:
    """Return the label set of masks whose labels are not known yet: it has no classes."""
    return LabelSet((), distinct_colours(0), np.full(256, -1, np.int16), ignore_index)


def distinct_colours(number: int) -> Bytes:
    """Return ``number`` different colours (number, 3): hues spaced by the golden ratio, in six shades."""
    colours = []
    for index in range(number):
        hue = (0.6 + index * 0.6180339887) % 1.0
        saturation, value = (0.9, 0.6, 0.75)[index % 3], (0.95, 0.65)[index % 2]
        colours.append([round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)])
    return np.array(colours, np.uint8).reshape(number, 3)


def voc_colours(number: int) -> Bytes:
    """Return PASCAL VOC's colours: bit 3j + c of the label is bit 7 − j of channel c."""
    labels = np.arange(number)[:, None]
    shifts = np.arange(3)
    planes = [((labels >> (3 * bit + shifts)) & 1) << (7 - bit) for bit in range(8)]
    colours: Bytes = np.sum(planes, axis=0).astype(np.uint8)
    return colours


def _hex_colours(text: str) -> Bytes:
    return np.array([list(bytes.fromhex(colour)) for colour in text.split()], np.uint8)


def _mapped(names: Sequence[str], palette: Bytes, first: int, valid: Sequence[int], ignored: Sequence[int]) -> LabelSet:
    """Return the label set in which the labels ``valid`` are the classes in order."""
    classes = np.full(256, -1, np.int16)
    classes[list(ignored)] = IGNORE_INDEX
    classes[list(valid)] = np.arange(len(valid))
    return LabelSet(tuple(names), palette, classes, first)


# Cityscapes (M. Cordts et al. 2016): 34 labels, of which 19 are evaluated.

_CITYSCAPES_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_COLOURS = _hex_colours(
    "804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 "
    "005064 0000e6 770b20"
)


def cityscapes_labels(kind: str) -> LabelSet:
    """Return the 19 classes of Cityscapes as "labelIds" (0 … 33) or "labelTrainIds" (0 … 18) store them."""
    if kind == "labelTrainIds":
        return indexed_labels(_CITYSCAPES_NAMES, IGNORE_INDEX, _CITYSCAPES_COLOURS)
    # License plates have the label −1, which 8 bits store as 255.
    ignored = [label for label in (*range(34), 255) if label not in _CITYSCAPES_IDS]
    return _mapped(_CITYSCAPES_NAMES, _CITYSCAPES_COLOURS, IGNORE_INDEX, _CITYSCAPES_IDS, ignored)


# PASCAL VOC 2012 (M. Everingham et al. 2010).

_VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def voc_labels() -> LabelSet:
    """Return the 21 classes of PASCAL VOC, background among them; label 255 is ignored."""
    return indexed_labels(_VOC_NAMES, IGNORE_INDEX, voc_colours(len(_VOC_NAMES)))


# ADE20K (B. Zhou et al. 2017), the 150 classes of the scene parsing challenge: the first name of each class.

_ADE20K_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, table,
mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat,
fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter,
sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow,
screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop,
stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower,
chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""
_ADE20K_COLOURS = """
787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33 ff0652 8fff8c
ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47
ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00
1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff 0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300
ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8
001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff
a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00
ff00a3 ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff 00ffcc
2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""


def ade20k_labels() -> LabelSet:
    """Return the 150 classes of ADE20K: label 0 is ignored, and label i is class i − 1."""
    names = [name.strip() for name in _ADE20K_NAMES.replace("\n", " ").split(",")]
    return _mapped(names, _hex_colours(_ADE20K_COLOURS), 0, range(1, len(names) + 1), [0])


def class_count(text: str, uri: str) -> int:
    """Return the value of the option ``classes`` of a URI.

    Raises:
        UsageError: it is no number of classes.
    """
    if not text.isdecimal() or not 2 <= int(text) <= MAX_CLASSES:
        raise UsageError(f"Option 'classes' of {uri!r} must be a number in 2 … {MAX_CLASSES}, got {text!r}.")
    return int(text)
