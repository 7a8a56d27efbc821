"""Tables for notebooks: what ``_repr_html_`` of a report returns."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_MOST_ROWS = 100  # a notebook stores its outputs


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an HTML table with a line of text above it; numbers get thousands separators, all text is escaped.

    Args:
        title: the line.
        columns: names of the columns.
        rows: one value per column; those after the hundredth are counted only.
    """
    parts = [f"<p>{escape(title)}</p>"]
    if rows:
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:_MOST_ROWS])
        parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if len(rows) > _MOST_ROWS:
        parts.append(f"<p>and {len(rows) - _MOST_ROWS:,} more</p>")
    return "".join(parts)


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td style="text-align: right">{value:,}</td>'
    return f'<td style="text-align: left">{escape(str(value))}</td>'
