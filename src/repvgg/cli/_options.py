"""Options that several commands share, and the layout of help texts: docstrings, wrapped before tyro sees them."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from repvgg.errors import UsageError, close_names

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


def overview(commands: Mapping[str, str], about: str) -> str:
    """Return a list of commands, each with the first paragraph of its docstring."""
    width = max(map(len, commands)) + 4
    lines = [
        textwrap.fill(
            _paragraphs(docstring)[0],
            _columns(),
            initial_indent=f"  {name}".ljust(width),
            subsequent_indent=" " * width,
        )
        for name, docstring in commands.items()
    ]
    last = "'repvgg COMMAND --help' explains a command. To begin: repvgg quickstart"
    return "\n".join(
        ["usage: repvgg COMMAND [options]", "", textwrap.fill(about, _columns()), "", *lines, "", last, ""]
    )


def description(command: Command) -> str:
    """Return the text above the options in a command's help: its docstring without ``Args``."""
    return wrapped(_paragraphs(command.__doc__ or ""))


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


def without_empty_defaults(settings: Any) -> Any:
    """Return a subclass of a dataclass in whose help no default is shown where it is None or an empty tuple.

    The help text of such an option says what happens without it. :func:`as_declared` returns to the original class.
    """
    hints = get_type_hints(settings, include_extras=True)
    fields: list[Any] = []
    for one in dataclasses.fields(settings):
        kind, default = hints[one.name], one.default
        factory: Any = one.default_factory
        if factory is not dataclasses.MISSING:
            default = factory()
        if default is None or default == ():
            fields.append((one.name, Annotated[kind, tyro.conf.arg(help_behavior_hint=_NO_HINT)], one))
        elif dataclasses.is_dataclass(default):
            nested = without_empty_defaults(kind)
            made: Any = nested(**_values(default))
            fields.append((one.name, nested, dataclasses.field(default=made)))
    return dataclasses.make_dataclass(
        settings.__name__, fields, bases=(settings,), frozen=True, namespace={"__doc__": settings.__doc__}
    )


def as_declared(value: Any) -> Any:
    """Return an instance of a class that :func:`without_empty_defaults` made as one of its original, to be pickled."""
    kind: Any = type(value).__base__
    values = {name: as_declared(v) if dataclasses.is_dataclass(v) else v for name, v in _values(value).items()}
    return kind(**values)


def _values(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}


def parse(target: Any, arguments: Sequence[str], **settings: Any) -> Any:
    """Return what tyro makes of ``arguments``: an instance of the class ``target``.

    Raises:
        UsageError: there is an unknown option. tyro names it only where nothing else is wrong.
        SystemExit: help was requested (0), or tyro has explained what is wrong (2).
    """
    try:
        with redirect_stderr(io.StringIO()):
            return tyro.cli(target, args=arguments, **settings)
    except SystemExit as end:
        if not end.code:
            raise
        _refuse_unknown_options(target, arguments, settings)
        return tyro.cli(target, args=arguments, **settings)  # prints its explanation


def bound(command: Command) -> Callable[..., Callable[[], int | None]]:
    """Return a function with the signature of ``command`` that binds the arguments and does not call it."""

    @wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
        return partial(command, *args, **kwargs)

    return bind


def _refuse_unknown_options(target: Any, arguments: Sequence[str], settings: dict[str, Any]) -> None:
    known = _options_in_help(target, settings)
    for argument in arguments:
        typed = argument.partition("=")[0]
        name = typed.replace("_", "-")
        if not name.startswith("--") or name == "--" or name in known:
            continue
        inside = [one for one in known if one.endswith(f".{name[2:]}")]  # --lr means --optim.lr
        close = inside or [f"--{one}" for one in close_names(name[2:], [one[2:] for one in known])]
        program = settings["prog"]
        advice = f"did you mean {' or '.join(close)}?" if close else f"'{program} --help' lists its options."
        raise UsageError(f"{program} has no option {typed!r}: {advice}")


def _options_in_help(target: Any, settings: dict[str, Any]) -> list[str]:
    captured = io.StringIO()
    with redirect_stdout(captured), suppress(SystemExit):
        tyro.cli(target, args=["--help"], **settings)
    return list(dict.fromkeys(re.findall(r"--[a-z][a-z0-9.-]*", captured.getvalue())))


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


def _paragraphs(docstring: str) -> list[str]:
    return inspect.cleandoc(docstring).split("\n\nArgs:")[0].split("\n\n")


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, _MAX_COLUMNS)
