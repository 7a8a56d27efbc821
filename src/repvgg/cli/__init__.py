"""The command line: one short file a verb."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from repvgg.errors import RepvggError, UsageError, is_out_of_memory

_DIFFERENT, _BAD_INPUT, _INTERRUPTED = 1, 2, 130
_ABOUT = "Train multi-branch networks, ship plain ones, and know that they are equal."
_WIDEST = 100  # columns of help, on terminals that are wider

_READ_THEIR_OWN = ("train", "study")  # verbs whose defaults depend on what is asked for

Verb = Callable[..., int | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``repvgg`` with ``argv``; return the exit code.

    0: done. 1: the answer is no (two models differ). 2: bad input, in one sentence on standard error. 130: Ctrl-C.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except RepvggError as error:
        return _complain(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _complain("There is not enough memory for this: take smaller or fewer images.")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _complain(what: object) -> int:
    sys.stderr.write(f"error: {' '.join(str(what).split())}\n")
    return _BAD_INPUT


def _verbs() -> dict[str, Verb]:
    from repvgg.cli import checkpoint
    from repvgg.cli.bench import bench
    from repvgg.cli.collapse import collapse
    from repvgg.cli.convert import convert
    from repvgg.cli.data import check
    from repvgg.cli.eval import eval_
    from repvgg.cli.listing import list_
    from repvgg.cli.predict import predict
    from repvgg.cli.profile import profile
    from repvgg.cli.quickstart import quickstart
    from repvgg.cli.study import study
    from repvgg.cli.train import train
    from repvgg.cli.verify import verify

    return {
        "quickstart": quickstart,
        "list": list_,
        "profile": profile,
        "train": train,
        "eval": eval_,
        "predict": predict,
        "collapse": collapse,
        "convert": convert,
        "verify": verify,
        "bench": bench,
        "study": study,
        "data check": check,
        "checkpoint inspect": checkpoint.inspect,
        "checkpoint convert": checkpoint.convert,
    }


def _run(arguments: list[str]) -> int:
    verbs = _verbs()
    first = arguments[0] if arguments else "--help"
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in verbs else first
    group = {verb: run for verb, run in verbs.items() if verb.startswith(f"{first} ")}
    if name in verbs:
        return _call(name, verbs[name], arguments[len(name.split()) :])
    if first in ("-h", "--help"):
        sys.stdout.write(_overview(verbs))
    elif group and arguments[1:2] in ([], ["-h"], ["--help"]):
        sys.stdout.write(_overview(group))
    elif first == "--version":
        from repvgg import __version__

        sys.stdout.write(f"repvgg {__version__}\n")
    else:
        raise _unknown(arguments[:2] if group else [first], list(group or verbs))
    return 0


def _unknown(words: list[str], verbs: list[str]) -> UsageError:
    """The last of the words is wrong."""
    last = {verb.split()[len(words) - 1]: verb for verb in reversed(verbs)}
    close = difflib.get_close_matches(words[-1], last, n=1)
    known = f"did you mean {' '.join((*words[:-1], close[0]))!r}?" if close else f"there are {', '.join(verbs)}."
    return UsageError(f"There is no verb {' '.join(words)!r}: {known}")


def _call(name: str, verb: Verb, arguments: list[str]) -> int:
    import tyro

    marks = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.HelptextFromCommentsOff)
    try:
        with _single_blank_lines("-h" in arguments or "--help" in arguments):
            if name in _READ_THEIR_OWN:
                return verb(arguments) or 0
            code: int | None = tyro.cli(
                verb, prog=f"repvgg {name}", description=description(verb), args=arguments, config=marks
            )
    except SystemExit as end:  # after --help, or after telling what cannot be parsed
        return end.code if isinstance(end.code, int) else 0
    return code or 0


def _overview(verbs: dict[str, Verb]) -> str:
    indent = max(map(len, verbs)) + 4
    lines = [
        textwrap.fill(
            _paragraphs(verb)[0], _width(), initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent
        )
        for name, verb in verbs.items()
    ]
    last = "'repvgg VERB --help' tells more of each. The first to try: repvgg quickstart"
    return "\n".join(["usage: repvgg VERB [options]", "", _ABOUT, "", *lines, "", last, ""])


def description(verb: Verb) -> str:
    """What the help of a verb says on top."""
    return in_help(_paragraphs(verb))


def in_help(paragraphs: Sequence[str]) -> str:
    """Paragraphs as wide as the terminal, and indented: tyro joins lines that are not."""
    wrapped = [
        textwrap.indent(part if part.startswith(" ") else textwrap.fill(part, _width() - 2), "  ")
        for part in paragraphs
    ]
    return "\n\n".join(wrapped)


def _paragraphs(verb: Verb) -> list[str]:
    """The docstring without its ``Args``; paragraphs that are indented are examples."""
    return inspect.cleandoc(verb.__doc__ or "").split("\n\nArgs:")[0].split("\n\n")


@contextmanager
def _single_blank_lines(wanted: bool) -> Iterator[None]:
    """Undo the second blank line that tyro puts in front of each indented paragraph."""
    if not wanted:
        yield
        return
    held = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)  # tyro draws boxes where these can be encoded
    try:
        with redirect_stdout(held):
            yield
    finally:
        held.seek(0)
        sys.stdout.write(held.read().replace("\n\n\n", "\n\n"))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)
