"""A collapse in a table for a person: what became what, and what did not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.text import Text

    from repvgg.collapse import Report
    from repvgg.collapse.report import Folded, Skipped

_TITLES = ("region", "before", "after", "parameters", "multiply-adds")
_NUMBERS = 2
_NAMES_SHOWN = 3
_WIDE = 10_000  # columns where nobody looks: nothing is cut in a pipe


def write_report(report: Report) -> None:
    """Write the regions as a table, cut to the width of a terminal, and below it what was left, by reason."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in _TITLES:
        table.add_column(
            title, no_wrap=True, overflow="ellipsis", justify="right" if title in _TITLES[-_NUMBERS:] else "left"
        )
    for region in report.folded:
        table.add_row(*_cells(region))
    if report.folded:
        console.print(table, soft_wrap=False)
    groups = {"left as it was": report.left, "dropped": report.dropped, "looked at in pieces": report.in_pieces}
    for what, rows in groups.items():
        for line in _by_reason(what, rows):
            console.print(line, markup=False)


def _cells(region: Folded) -> tuple[Text, ...]:
    from rich.text import Text

    kinds = Counter(part.description for part in region.parts)
    before = " + ".join(f"{number} x {kind}" if number > 1 else kind for kind, number in kinds.items())
    parameters = f"{region.parameters_before:,} → {region.parameters_after:,}"
    macs = " → ".join(f"{count:,}" for count in region.macs) + ("" if region.pixels else " a pixel")
    return tuple(map(Text, (region.name or "(root)", before, region.convolution, parameters, macs)))


def _by_reason(what: str, rows: Iterable[Skipped]) -> list[str]:
    """A line a reason, with the first few names."""
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row.reason, []).append(row.name or "(root)")
    return [f"{what}: {_shortened(found)}: {reason}" for reason, found in names.items()]


def _shortened(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
