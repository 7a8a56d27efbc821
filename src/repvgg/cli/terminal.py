"""What the verbs share in talking to a person or a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def write_line(text: str = "") -> None:
    """Write a line to standard output; nothing wraps it, so that paths stay whole in a pipe."""
    sys.stdout.write(text + "\n")


def write_warning(text: str) -> None:
    """Write a line to standard error, which a person sees even if the output goes elsewhere."""
    sys.stderr.write(f"warning: {text}\n")


def write_json(data: Any) -> None:
    """Write a JSON document to standard output."""
    write_line(json.dumps(data, indent=1, allow_nan=False))


def write_table(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> None:
    """Write rows in columns, as wide as they need to be; all columns but the first are flush right if ``numbers``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if numbers and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        write_line("  ".join(cells).rstrip())


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show on a terminal that something is going on, beside standard output."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
