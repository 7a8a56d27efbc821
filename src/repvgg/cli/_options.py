"""Options that several commands share, and the layout of help texts: docstrings, wrapped before tyro sees them."""

from __future__ import annotations

import inspect
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import tyro

Command = Callable[..., int | None]

# Without a hint, tyro shows no default: where it is None, the help text of the option describes it.
_NO_HINT = ""

JsonFlag = Annotated[bool, tyro.conf.arg(name="json")]
Number = Annotated[int | None, tyro.conf.arg(help_behavior_hint=_NO_HINT)]
InputSize = Annotated[int | None, tyro.conf.arg(help_behavior_hint=_NO_HINT, metavar="PIXELS")]
InputHeightWidth = Annotated[tuple[int, int] | None, tyro.conf.arg(help_behavior_hint=_NO_HINT, metavar="H W")]
BatchSize = Annotated[int, tyro.conf.arg(metavar="IMAGES")]
Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
CheckpointSource = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
OutFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(help_behavior_hint=_NO_HINT, metavar="FILE")]

_MAX_COLUMNS = 100  # longer lines are hard to read, however wide the terminal is


def overview(commands: dict[str, Command], about: str) -> str:
    """Return a list of commands, each with the first paragraph of its docstring."""
    width = max(map(len, commands)) + 4
    lines = [
        textwrap.fill(
            _paragraphs(command)[0], _columns(), initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width
        )
        for name, command in commands.items()
    ]
    last = "'repvgg COMMAND --help' explains a command. To begin: repvgg quickstart"
    return "\n".join(
        ["usage: repvgg COMMAND [options]", "", textwrap.fill(about, _columns()), "", *lines, "", last, ""]
    )


def description(command: Command) -> str:
    """Return the text above the options in a command's help: its docstring without ``Args``."""
    return wrapped(_paragraphs(command))


def wrapped(paragraphs: Sequence[str]) -> str:
    """Return paragraphs wrapped for the terminal. Indented ones are examples, which stay unchanged."""
    # tyro joins the lines of paragraphs that are not indented.
    return "\n\n".join(
        textwrap.indent(part if part.startswith(" ") else textwrap.fill(part, _columns() - 2), "  ")
        for part in paragraphs
    )


def option(text: str, metavar: str | None = None) -> Any:
    """Return tyro's description of an option without the default that tyro would append."""
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=_NO_HINT)


@contextmanager
def single_blank_lines(wanted: bool) -> Iterator[None]:
    """Undo the second blank line that tyro puts in front of each indented paragraph."""
    if not wanted:
        yield
        return
    # The encoding of the real output: tyro draws boxes only where their characters can be encoded.
    captured = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    try:
        with redirect_stdout(captured):
            yield
    finally:
        captured.seek(0)
        sys.stdout.write(captured.read().replace("\n\n\n", "\n\n"))


def _paragraphs(command: Command) -> list[str]:
    return inspect.cleandoc(command.__doc__ or "").split("\n\nArgs:")[0].split("\n\n")


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, _MAX_COLUMNS)
