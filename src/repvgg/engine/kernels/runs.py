"""How many channels are summed in one go."""

from __future__ import annotations

from repvgg.engine.winograd import TAPS, Form

_SUMMED, _SUMMED_COLD = 64, 48  # channels that are summed in one go; the sums of sums round less than one long sum
_EXPANDED = 2**13  # floats of kernels that are transformed across at a time
_MIXED = 5 * 2**11  # floats of kernels, as they lie and transformed, of a run whose products transform the next ones
_ROOM = 5  # vectors that this takes
PAIRS = 4  # columns that are there at a time then: those that are used, and the next ones


def run_length(channels: int, *, cold: bool) -> int:
    """Channels that are summed in one go; the last run may have fewer."""
    return _equal_parts(channels, _SUMMED_COLD if cold else _SUMMED)


def late_run(channels: int, form: Form, lanes: int, room: int) -> tuple[int, bool]:
    """The same for kernels that are transformed late, so many output channels of them at a time.

    And whether products transform the kernels that come next: where there is so much room that they can.
    """
    if form.columns.moved and room >= _ROOM:
        length = _equal_parts(channels, min(_SUMMED, max(1, _MIXED // ((2 * TAPS + PAIRS) * lanes))))
        if channels % length == 0:
            return length, True
    return _equal_parts(channels, min(_SUMMED, max(1, _EXPANDED // (form.columns.inputs * lanes)))), False


def _equal_parts(length: int, most: int) -> int:
    """A part of a length, of at most ``most``, that divides it if some part of about that size does."""
    fewest = -(-length // most)
    counts = range(fewest, fewest + fewest // 4 + 1)
    return -(-length // next((count for count in counts if length % count == 0), fewest))
