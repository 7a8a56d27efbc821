"""Small SVG drawings: shapes, and two scales. Colours come from the style sheet, through classes.

Two kinds of drawing: ``picture`` has a size in pixels and shrinks as a whole; ``strip`` fills its place, has a fixed
height, and takes its horizontal coordinates in percent, so that its text keeps its size on any screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from repvgg.studies.report.markup import Attribute, Child, Markup, element, number

Coordinate = str | float

_NARROWEST, _WIDEST = 4.6, 6.4  # pixels a letter of a small label: squeezed until it can just be read, or wide


def picture(width: float, height: float, label: str, *children: Child) -> Markup:
    """A drawing of fixed proportions, described to screen readers by ``label``."""
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", *children, viewBox=box, width=width, height=height, role="img", aria_label=label)


def strip(height: float, label: str, *children: Child, class_: str | None = None) -> Markup:
    """A drawing as wide as its place; x coordinates inside are percentages."""
    return element("svg", *children, width="100%", height=height, role="img", aria_label=label, class_=class_)


def line(x1: Coordinate, y1: Coordinate, x2: Coordinate, y2: Coordinate, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(
    x: Coordinate, y: float, width: Coordinate, height: float, class_: str, radius: float = 0, hint: str | None = None
) -> Markup:
    """A rectangle with rounded corners; ``hint`` shows when pointed at."""
    body = element("title", hint) if hint else None
    return element("rect", body, x=x, y=y, width=width, height=height, rx=radius or None, class_=class_)


def circle(x: Coordinate, y: Coordinate, radius: float, class_: str, hint: str | None = None) -> Markup:
    """A circle; ``hint`` shows when pointed at."""
    return element("circle", element("title", hint) if hint else None, cx=x, cy=y, r=radius, class_=class_)


def path(steps: str, class_: str) -> Markup:
    """A path, given in SVG's own language."""
    return element("path", d=steps, class_=class_)


def text(
    x: Coordinate, y: Coordinate, content: str, class_: str, room: float | None = None, **more: Attribute
) -> Markup:
    """A line of text on the baseline ``y``. With ``room``, in pixels, it is squeezed or cut so as to fit there."""
    if room is None:
        return element("text", content, x=x, y=y, class_=class_, **more)
    budget = int(room / _NARROWEST)
    shown = content if len(content) <= budget else f"{content[: budget - 1].rstrip()}…"
    length, adjust = (None, None) if fits(shown, room) else (room, "spacingAndGlyphs")
    return element("text", shown, x=x, y=y, class_=class_, textLength=length, lengthAdjust=adjust, **more)


def fits(content: str, room: float) -> bool:
    """Whether a small label surely fits in ``room`` pixels, whatever the font."""
    return len(content) * _WIDEST <= room


@dataclass(frozen=True)
class LogAxis:
    """Whole decades from 10**low to 10**high, spread over 0..100 percent."""

    low: int
    high: int

    @classmethod
    def around(cls, values: Iterable[float | None]) -> LogAxis:
        """The decades that hold all finite positive ``values``, two at least."""
        logs = [math.log10(value) for value in values if value is not None and 0 < value < math.inf]
        if not logs:
            return cls(-2, 0)
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low if high - low >= 2 else high - 2, high)

    def position(self, value: float) -> float:
        """Where ``value`` lies, in percent; at an end of the axis where it lies beyond it. NaN is at the far end."""
        if value <= 0:
            return 0.0
        if not math.isfinite(value):
            return 100.0
        return min(100.0, max(0.0, 100 * (math.log10(value) - self.low) / (self.high - self.low)))

    def ticks(self, most: int = 6) -> list[int]:
        """Exponents to label, ``most`` at most, evenly apart."""
        step = math.ceil((self.high - self.low + 1) / most)
        return list(range(self.low, self.high + 1, step))


@dataclass(frozen=True)
class LinearAxis:
    """From low to high, spread over 0..100 percent."""

    low: float
    high: float

    def position(self, value: float) -> float:
        """Where ``value`` lies, in percent; at an end of the axis where it lies beyond it."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return 100 * min(1.0, max(0.0, share)) if math.isfinite(share) else 100.0
