"""One block as two pictures: branches that are summed, and the convolution that they became. Units are pixels."""

from __future__ import annotations

import re

from repvgg.studies.report.formatting import multiplication_signs
from repvgg.studies.report.markup import Markup, join
from repvgg.studies.report.schema import Region
from repvgg.studies.report.svg import circle, fits, line, path, picture, rect, text

LANES = 6  # branches side by side; the last lane says how many more there are

_BOX_TOP, _BOX_HEIGHT = 16, 26
_SUM_Y, _THEN_TOP, _THEN_HEIGHT = 57, 69, 16
_HEIGHT = 93
_TRAIN_WIDTH, _MIDDLE = 312, 156
_PLAIN_WIDTH, _PLAIN_BOX = 140, 116


def train_form(region: Region, lanes: int) -> Markup:
    """The branches side by side, their sum, and what follows. ``lanes`` is the most that any region fills."""
    labels = _labels(region.branches)
    slots = 1 if len(labels) == 1 else max(len(labels), min(3, lanes))  # an absent identity leaves its lane empty
    pitch = _TRAIN_WIDTH / slots
    boxes = [_branch(label, (slot + 0.5) * pitch, min(pitch, 104) - 6) for slot, label in enumerate(labels)]
    words = f"{region.name}, train form: {' plus '.join(region.branches)}{_then_words(region)}"
    return picture(_TRAIN_WIDTH, _HEIGHT, words, *boxes, _tail(region, _MIDDLE), _sum(len(labels)))


def plain_form(region: Region) -> Markup:
    """The one convolution, and what follows."""
    middle = _PLAIN_WIDTH / 2
    kernel = "×".join(map(str, region.kernel))
    words = f"{region.name}, plain form: one {kernel} convolution with bias{_then_words(region)}"
    box = rect(middle - _PLAIN_BOX / 2, _BOX_TOP, _PLAIN_BOX, _BOX_HEIGHT, "box plain", radius=5)
    label = text(middle, _BOX_TOP + 17, f"{kernel} conv + bias", "label plain", room=_PLAIN_BOX - 10)
    trunk = line(middle, 0, middle, _THEN_TOP, "wire")
    return picture(_PLAIN_WIDTH, _HEIGHT, words, trunk, box, label, _tail(region, middle))


def cap(words: str, plain: bool = False) -> Markup:
    """What goes into the network, or comes out of it."""
    width = _PLAIN_WIDTH if plain else _TRAIN_WIDTH
    box = rect(width / 2 - 50, 2, 100, 20, "then", radius=10)
    return picture(width, 24, words, box, text(width / 2, 16, words, "label", room=90))


def kind(branch: str) -> str:
    """How a branch is drawn, from its description: ``wide``, ``point`` or ``straight``; ``more`` for those left out."""
    if branch.startswith("+"):
        return "more"
    kernel = re.search(r"(\d+)\s*[x×]\s*(\d+)", branch)
    if kernel is None:
        return "straight" if "identity" in branch.lower() else "wide"
    return "point" if kernel.groups() == ("1", "1") else "wide"


def _labels(branches: tuple[str, ...]) -> list[str]:
    if len(branches) <= LANES:
        return list(branches)
    return [*branches[: LANES - 1], f"+{len(branches) - LANES + 1} more"]


def _branch(label: str, at: float, width: float) -> Markup:
    """A box in its lane, wired to the trunk above and to the sum below."""
    bottom = _BOX_TOP + _BOX_HEIGHT
    into = path(f"M{_MIDDLE:g} 0C{_MIDDLE:g} 12 {at:g} 4 {at:g} {_BOX_TOP}", "wire")
    out = path(f"M{at:g} {bottom}C{at:g} {_SUM_Y - 4} {_MIDDLE:g} {bottom + 2} {_MIDDLE:g} {_SUM_Y}", "wire")
    box = rect(at - width / 2, _BOX_TOP, width, _BOX_HEIGHT, f"box {kind(label)}", radius=5, hint=label)
    return join(into, out, box, _words(multiplication_signs(label), at, width - 8, kind(label)))


def _words(label: str, at: float, room: float, class_: str) -> Markup:
    """A label on one line, or on two small ones where one is too short."""
    words = label.split()
    if fits(label, room) or len(words) < 2:
        return text(at, _BOX_TOP + 17, label, f"label {class_}", room)
    cut = min(range(1, len(words)), key=lambda index: abs(len(" ".join(words[:index])) - len(label) / 2))
    first, second = " ".join(words[:cut]), " ".join(words[cut:])
    tiny = f"label tiny {class_}"
    return join(text(at, _BOX_TOP + 11, first, tiny, room), text(at, _BOX_TOP + 21.5, second, tiny, room))


def _sum(branches: int) -> Markup | None:
    """A plus sign, where there is more than one thing to add."""
    if branches < 2:
        return None
    across = line(_MIDDLE - 3.5, _SUM_Y, _MIDDLE + 3.5, _SUM_Y, "sign")
    down = line(_MIDDLE, _SUM_Y - 3.5, _MIDDLE, _SUM_Y + 3.5, "sign")
    return join(circle(_MIDDLE, _SUM_Y, 7, "sum"), across, down)


def _tail(region: Region, middle: float) -> Markup:
    """From the sum down to the next block."""
    if not region.then:
        return line(middle, _SUM_Y, middle, _HEIGHT, "wire")
    width = max(46.0, min(100.0, 7.0 * len(region.then) + 16))
    return join(
        line(middle, _SUM_Y, middle, _HEIGHT, "wire"),
        rect(middle - width / 2, _THEN_TOP, width, _THEN_HEIGHT, "then", radius=8),
        text(middle, _THEN_TOP + 12, region.then, "label small", room=width - 10),
    )


def _then_words(region: Region) -> str:
    return f", then {region.then}" if region.then else ""
