"""The tables that ``repvgg profile`` prints."""

from __future__ import annotations

from string import ascii_lowercase
from typing import TYPE_CHECKING, Literal

from repvgg.cli._output import write_line, write_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from repvgg.measure import Profile, Row
    from repvgg.studies.counts import CountRow, Difference

_TITLES = ("", "params", "multiply-adds", "Wino MULs", "bytes moved", "MACs/byte", "activation peak")
_SCALES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_SIGNIFICANT_DIGITS = 4


def write_profiles(title: str, profiles: Mapping[str, Profile], per: Literal["layer", "stage", "total"]) -> None:
    """Write a table of layers or stages for each form, and the totals of all forms side by side."""
    if per != "total":
        for form, done in profiles.items():
            write_line(f"{title}, {form} form, by {per}")
            write_table([(per, *_TITLES[1:]), *map(_cells, done.rows(per))])
            write_line()
    write_line(title)
    first = next(iter(profiles.values()))
    totals = [done.total for done in profiles.values()]
    lines = {
        "parameters": [_si(row.params) for row in totals],
        "multiply-adds (the paper's FLOPs)": [_macs(row) for row in totals],
        f"Winograd multiplications, F({first.tile}x{first.tile}, 3x3)": [_muls(row) for row in totals],
        "bytes moved": [_moved(row) for row in totals],
        "multiply-adds per byte": [_intensity(row) for row in totals],
        "memory of the weights": [f"{_si(done.weight_bytes)}B" for done in profiles.values()],
        "activation peak": [f"{_si(row.peak_bytes)}B" for row in totals],
    }
    write_table([("", *(f"{form} form" for form in profiles)), *((name, *cells) for name, cells in lines.items())])
    for line in dict.fromkeys(line for row in totals for line in _not_counted(row)):
        write_line(line)


def _cells(row: Row) -> tuple[str, ...]:
    name = row.name or "(root)"
    costs = _macs(row), _muls(row), _moved(row), _intensity(row), f"{_si(row.peak_bytes)}B" if row.ops else "not run"
    return (name, _si(row.params), *costs)


def _macs(row: Row) -> str:
    return _at_least(_si(row.macs), row.unknown)


def _muls(row: Row) -> str:
    return _at_least(_si(row.winograd_muls), row.unknown)


def _moved(row: Row) -> str:
    return _at_least(f"{_si(row.bytes_moved)}B", row.unknown_traffic)


def _intensity(row: Row) -> str:
    return "" if row.intensity is None else f"{row.intensity:.2f}"


def _at_least(text: str, unknown: Sequence[str]) -> str:
    return f">= {text}" if unknown else text


def _si(value: int) -> str:
    """Return a number with four significant digits and an SI prefix, 8.309 M; below 1000 as an integer."""
    for scale, sign in _SCALES:
        if value >= scale:
            digits = max(0, _SIGNIFICANT_DIGITS - len(str(value // scale)))
            return f"{value / scale:.{digits}f} {sign}"
    return f"{value} "


def _not_counted(row: Row) -> Iterator[str]:
    for what, names in (("multiply-adds", row.unknown), ("bytes", row.unknown_traffic)):
        if names:
            yield f"{what} of these ops are unknown and not in the sums: {', '.join(names)}"


_COUNT_TITLES = ("model", "params M, train", "plain", "paper", "GFLOPs", "paper", "Wino GMULs", "paper", "")


def write_counts(rows: Sequence[CountRow]) -> None:
    """Write our counts beside the paper's, and below them the reason for each difference."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for difference in row.differences:
            found.setdefault(_reason(difference), []).append(_recount(row, difference))
    marks = dict(zip(found, ascii_lowercase, strict=False))
    write_table([_COUNT_TITLES, *(_count_cells(row, marks) for row in rows)])
    write_line()
    for reason, recounts in found.items():
        write_line(f"{marks[reason]}: {reason}: {', '.join(recounts)}.")
    for note, titles in _notes(rows).items():
        write_line(f"{', '.join(titles)}: {note}.")


def _count_cells(row: CountRow, marks: Mapping[str, str]) -> tuple[str, ...]:
    from repvgg.studies.counts import PRINTED_AS, printed_text, rounded

    cells = []
    for column in PRINTED_AS:
        cells += [rounded(column, row.count(column)), printed_text(column, row.paper) or "-"]
    differ = " ".join(marks[_reason(difference)] for difference in row.differences)
    return (row.title, f"{row.params_train / 1e6:.2f}", *cells, differ)


def _reason(difference: Difference) -> str:
    return difference.reason if difference.explained else "not explained"


def _recount(row: CountRow, difference: Difference) -> str:
    """Return the model with its count under the paper's counting rule."""
    from repvgg.studies.counts import PRINTED_AS

    unit, digits = PRINTED_AS[difference.column]
    count = row.count(difference.column) if difference.recounted is None else difference.recounted
    return f"{row.title} {count / unit:.{digits + 1}f}"


def _notes(rows: Sequence[CountRow]) -> dict[str, list[str]]:
    """Return notes on how baselines are built, each with the titles of its models."""
    from repvgg.models import BASELINES

    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.model in BASELINES and (note := BASELINES[row.model].note):
            notes.setdefault(note, []).append(row.title)
    return notes
