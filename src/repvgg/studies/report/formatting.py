"""Numbers as people write them."""

from __future__ import annotations

import math
import re
from datetime import datetime

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_THIN, _TIED = "\u202f", "\u00a0"  # spaces that no line is broken at


def power(exponent: int) -> str:
    """A power of ten: ``10⁻⁷``."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def scientific(value: float | None) -> str:
    """A small number: ``3.1 × 10⁻⁷``, or a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}{_THIN}×{_THIN}{power(int(exponent))}"


def percentage(value: float) -> str:
    """A share in percent: ``99.7%``. Never rounded up to 100% or down to 0%."""
    if not math.isfinite(value):
        return "not a number"
    for digits in range(1, 6):
        shown = f"{100 * value:.{digits}f}"
        if float(shown) not in (0.0, 100.0):
            return f"{shown}%"
    return f"{100 * value:.0f}%"


def ratio(value: float) -> str:
    """A ratio: ``1.87×``."""
    return f"{value:.2f}×"


def integer(value: int) -> str:
    """A whole number with its thousands apart: ``302,410``."""
    return f"{value:,}"


def quantity(value: int, thing: str, things: str | None = None) -> str:
    """A number of things: ``1 epoch``, ``12 epochs``, ``3 branches``."""
    return f"{integer(value)} {thing if value == 1 else things or thing + 's'}"


def relative_change(before: int, after: int) -> str:
    """The relative change: ``11.6% fewer``, ``2.0% more`` or ``as many``."""
    if before == after or before == 0:
        return "as many"
    return f"{100 * abs(after - before) / before:.1f}% {'fewer' if after < before else 'more'}"


def duration(seconds: float) -> str:
    """A time: ``850 µs``, ``1.24 ms``, ``13.2 s``, ``3 min 20 s``."""
    if not math.isfinite(seconds):
        return "not a number"
    if seconds >= 120:
        return f"{int(seconds) // 60}{_TIED}min {int(seconds) % 60}{_TIED}s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)}{_TIED}{unit}"
    return f"{_three_digits(seconds / 1e-6)}{_TIED}µs"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def file_size(amount: int) -> str:
    """A file size: ``980 B``, ``1.1 MB``."""
    if amount < 1000:
        return f"{amount}{_TIED}B"
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if amount >= scale:
            return f"{amount / scale:.1f}{_TIED}{unit}"
    return f"{amount / 1000:.0f}{_TIED}kB"


def timestamp(created: str) -> str:
    """An ISO 8601 time as ``3 August 2026, 14:05 UTC``; whatever else it is, as it is."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{when.day} {when:%B %Y, %H:%M %Z}".strip()


def multiplication_signs(description: str) -> str:
    """With a real multiplication sign between numbers: ``3×3 conv``."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", description)
