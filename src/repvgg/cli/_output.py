"""Output of the commands: lines, JSON, tables, and the report of a conversion."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from repvgg._serde import json_ready
from repvgg.errors import printable, printable_lines

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

    from repvgg.collapse import Report
    from repvgg.collapse.report import Folded, Skipped
    from repvgg.verify import Evidence

INTERRUPTED = 130  # the exit code that shells report for Ctrl-C

_PIPE_COLUMNS = 10_000  # nothing is truncated where no terminal limits the width
_MAX_NAMES = 3  # modules that are named for each reason


def write_line(text: str = "") -> None:
    """Write a line to standard output. It is never wrapped, so that paths stay whole in a pipe."""
    sys.stdout.write(_encodable(text, sys.stdout) + "\n")


def write_warning(text: str) -> None:
    """Write a line to standard error, which is seen even if the output is redirected."""
    sys.stderr.write(f"warning: {_encodable(text, sys.stderr)}\n")


def write_error(text: str) -> None:
    """Write the reason why a command failed to standard error, as one line."""
    sys.stderr.write(f"error: {_encodable(' '.join(text.split()), sys.stderr)}\n")


def _encodable(text: str, stream: TextIO) -> str:
    """Escape what ``stream`` cannot encode (arrows in an ASCII locale), and what would steer a terminal."""
    encoding = stream.encoding or "utf-8"
    text = printable_lines(text)  # names of classes, files and layers may be untrusted
    return text.encode(encoding, "backslashreplace").decode(encoding)


def write_json(data: Any) -> None:
    """Write a JSON document to standard output."""
    write_line(json.dumps(json_ready(data), indent=1, allow_nan=False))


def write_table(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> None:
    """Write rows in columns as wide as their content; all but the first are right-aligned if ``numbers``."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [
            cell.rjust(width) if numbers and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        write_line("  ".join(cells).rstrip())


def write_report(report: Report) -> None:
    """Write a table of the folded regions, truncated to the terminal, and what was skipped, by reason."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("region", "before", "after"):
        table.add_column(title, no_wrap=True, overflow="ellipsis")
    for title in ("parameters", "multiply-adds"):
        table.add_column(title, no_wrap=True, overflow="ellipsis", justify="right")
    for region in report.folded:
        table.add_row(*_region_cells(region))
    if report.folded:
        console.print(table, soft_wrap=False)
    groups = {"not folded": report.left, "dropped": report.dropped, "searched part by part": report.in_pieces}
    groups["guarded: holds for calls like the given inputs"] = report.guards
    for what, skipped in groups.items():
        for line in _by_reason(what, skipped):
            console.print(printable(line), markup=False)


def equality(evidence: Evidence, images: Sequence[Tensor] = ()) -> str:
    """Return the result of a verification that passed, in a line."""
    error = f"equal: relative error {evidence.relative:.1e} in {evidence.dtype}, {evidence.tolerance:.1e} allowed"
    agreement = evidence.agreement
    predictions = f"; {agreement.agreed} of {agreement.total} predictions agree" if agreement else ""
    sizes = ", ".join(f"{batch.shape[-2]}x{batch.shape[-1]}" for batch in images)
    return f"{error}{predictions}" + (f", on images of {sizes}" if sizes else "")


def _region_cells(region: Folded) -> tuple[Text, ...]:
    from rich.text import Text  # not str: rich would read [brackets] in names as markup

    kinds = Counter(part.description for part in region.parts)
    before = " + ".join(f"{number} x {kind}" if number > 1 else kind for kind, number in kinds.items())
    parameters = f"{region.parameters_before:,} → {region.parameters_after:,}"
    macs = " → ".join(f"{count:,}" for count in region.macs) + ("" if region.pixels else " a pixel")
    cells = region.name or "(root)", before, region.convolution, parameters, macs
    return tuple(Text(printable(cell)) for cell in cells)


def _by_reason(what: str, skipped: Iterable[Skipped]) -> list[str]:
    names: dict[str, list[str]] = {}
    for item in skipped:
        names.setdefault(item.reason, []).append(item.name or "(root)")
    lines = []
    for reason, found in names.items():
        more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
        lines.append(f"{what}: {', '.join(found[:_MAX_NAMES])}{more}: {reason}")
    return lines
