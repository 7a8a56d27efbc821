"""Tables of a study as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """One column."""

    key: str  # its name in CSV and JSON, with the unit: `images_per_second`
    title: str  # heading for readers
    digits: int | None = None  # decimal places for readers; None for all of them

    def format(self, value: Value) -> str:
        """Format a value for readers: None as a dash, True as a check mark, False as nothing."""
        if value is None:
            return "–"
        if isinstance(value, bool):  # before int, of which bool is a subclass
            return "✓" if value else ""
        if isinstance(value, (int, float)) and self.digits is not None:
            return f"{value:,.{self.digits}f}"
        return str(value)


def with_quartiles(key: str, title: str, digits: int) -> tuple[Column, Column, Column]:
    """Return the columns of a median and of its quartiles."""
    return (
        Column(key, title, digits),
        Column(f"{key}_q1", "lower quartile", digits),
        Column(f"{key}_q3", "upper quartile", digits),
    )


#: See :meth:`repvgg.studies.timing.Speeds.cells`.
SPEED_COLUMNS = with_quartiles("images_per_second", "Speed here (images/s)", 1)

#: How many times as fast one network is as another.
RATIO_COLUMNS = (Column("paper_ratio", "times as fast, paper", 2), *with_quartiles("ratio", "times as fast here", 2))


@dataclass(frozen=True)
class Table:
    """Rows with one value per column; None for a value that was not measured or not printed."""

    name: str  # of its file, without the suffix
    title: str
    columns: tuple[Column, ...]  # the first one names the row
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()  # paragraphs below the table

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name

    @property
    def cells(self) -> list[list[str]]:
        """All rows formatted for readers, the titles first."""
        rows = [[column.format(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]
        return [[column.title for column in self.columns], *rows]

    def to_dicts(self) -> list[dict[str, Value]]:
        """Return a dictionary for each row, by the keys of the columns."""
        return [dict(zip((column.key for column in self.columns), row, strict=True)) for row in self.rows]


def as_markdown(table: Table) -> str:
    """Return the table under a heading, numbers aligned right, with its notes."""
    # A bar would start a new cell.
    titles, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table.cells)
    rule = ["---", *("---:" for _ in titles[1:])]
    lines = (f"| {' | '.join(row)} |" for row in (titles, rule, *rows))
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return f"## {table.title}\n\n" + "\n".join(lines) + f"\n{notes}"


def as_csv(table: Table) -> str:
    """Return the unrounded values under the column keys; None is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")  # the default, "\r\n", shows up in diffs
    writer.writerow(column.key for column in table.columns)
    writer.writerows(table.rows)
    return out.getvalue()


def as_data(table: Table) -> Mapping[str, Any]:
    """Return the table as JSON types."""
    return {"title": table.title, "rows": table.to_dicts(), "notes": list(table.notes)}
