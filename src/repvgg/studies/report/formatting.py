"""Format numbers, times and sizes as text for people: template filters, tables and sentences."""

from __future__ import annotations

import math
import re
from datetime import datetime

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Not allowed in HTML or XML, even escaped: control characters and halves of surrogate pairs.
_NOT_PRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_NARROW_NBSP, _NBSP = "\u202f", "\u00a0"  # no line break between a number and its unit


def power_of_ten(exponent: int) -> str:
    """Format a power of ten: ``10⁻⁷``."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def scientific(value: float | None) -> str:
    """Format a number with two digits and an exponent: ``3.1 × 10⁻⁷``; None as a dash."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")  # rounds first: 9.96e-7 is 1.0 × 10⁻⁶
    return f"{mantissa}{_NARROW_NBSP}×{_NARROW_NBSP}{power_of_ten(int(exponent))}"


def percentage(fraction: float) -> str:
    """Format a fraction as percent: ``99.7%``."""
    if not math.isfinite(fraction):
        return "not a number"
    # 359,999 of 360,000 is not 100%: add digits instead of rounding up to 100% or down to 0%.
    for digits in range(1, 6):
        shown = f"{100 * fraction:.{digits}f}"
        if float(shown) not in (0.0, 100.0):
            return f"{shown}%"
    return f"{100 * fraction:.0f}%"


def ratio(value: float) -> str:
    """Format a ratio: ``1.87×``."""
    return f"{value:.2f}×"


def integer(value: int) -> str:
    """Format an integer with thousands separators: ``302,410``."""
    return f"{value:,}"


def quantity(value: int, singular: str, plural: str | None = None) -> str:
    """Format a number of things: ``1 epoch``, ``12 epochs``, ``3 branches``."""
    return f"{integer(value)} {singular if value == 1 else plural or singular + 's'}"


def relative_change(before: int, after: int) -> str:
    """Format a relative change: ``11.6% fewer``, ``2.0% more`` or ``unchanged``."""
    if before == after or before == 0:
        return "unchanged"
    return f"{100 * abs(after - before) / before:.1f}% {'fewer' if after < before else 'more'}"


def duration(seconds: float) -> str:
    """Format a duration with three digits: ``850 µs``, ``1.24 ms``, ``13.2 s``, ``3 min 20 s``."""
    if not math.isfinite(seconds):
        return "not a number"
    if seconds >= 120:
        return f"{int(seconds) // 60}{_NBSP}min {int(seconds) % 60}{_NBSP}s"
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    value = seconds / scale
    digits = f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"  # '#' keeps trailing zeros: 10.0, not 10
    return f"{digits}{_NBSP}{unit}"


def file_size(num_bytes: int) -> str:
    """Format a file size in decimal units: ``980 B``, ``61 kB``, ``1.1 MB``."""
    if num_bytes < 1000:
        return f"{num_bytes}{_NBSP}B"
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f}{_NBSP}{unit}"
    return f"{num_bytes / 1000:.0f}{_NBSP}kB"


def timestamp(iso: str) -> str:
    """Format an ISO 8601 time as ``3 August 2026, 14:05 UTC``; return any other text unchanged."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    # %d would pad the day with a zero, and %-d exists on Unix only.
    return f"{when.day} {when:%B %Y, %H:%M %Z}".strip()


def multiplication_signs(text: str) -> str:
    """Replace an ``x`` between digits: ``3x3 conv`` becomes ``3×3 conv``."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", text)


def printable(text: str) -> str:
    """Replace each character that HTML does not allow by U+FFFD."""
    return _NOT_PRINTABLE.sub("\ufffd", text)
