"""The entry point of the command line: find the command, parse its arguments, turn errors into exit codes."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from repvgg.cli._interrupt import announced_interrupts, tell, was_told
from repvgg.cli._options import Command, bound, description, overview, parse, single_blank_lines
from repvgg.cli._output import INTERRUPTED, write_error
from repvgg.errors import RepvggError, UsageError, did_you_mean, is_out_of_memory

BAD_INPUT = 2

_ABOUT = "Train multi-branch CNNs, convert them exactly into plain ones, and verify the result."
#: The module and the function of each command.
_COMMANDS = {
    "quickstart": "study.quickstart",
    "list": "list_models.list_models",
    "profile": "profile.profile",
    "train": "train.train",
    "eval": "evaluate.evaluate",
    "predict": "predict.predict",
    "convert": "convert.convert",
    "export": "export.export",
    "quantize": "quantize.quantize",
    "verify": "verify.verify",
    "bench": "bench.bench",
    "study": "study.study",
    "data check": "data.check",
    "checkpoint inspect": "checkpoint.inspect",
    "checkpoint convert": "checkpoint.convert",
}
_ALIASES = {"collapse": "convert"}
_PARSE_THEMSELVES = ("train", "study")  # the defaults of their options depend on other arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``repvgg`` with ``argv`` and return the exit code.

    0: success. 1: the answer is negative (two models differ). 2: bad input, explained in one sentence on standard
    error. 130: interrupted by Ctrl-C.
    """
    with announced_interrupts(), warnings.catch_warnings():
        # By PIL, of images that are then refused, with their names.
        warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
        return _exit_code(list(sys.argv[1:] if argv is None else argv))


def _exit_code(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        tell()
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output (head, for example) closed it. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if was_told():  # a worker process that Ctrl-C has ended, an import that it has broken off
            return INTERRUPTED
        if isinstance(error, RepvggError):
            return _report_error(error)
        if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
            return _report_error("There is not enough memory for this: take smaller or fewer images.")
        raise
    return code


def commands() -> dict[str, str]:
    """Return the docstring of every command by name, in the order of the overview."""
    # Read from the source: importing the commands imports torch, which takes seconds.
    return {name: _docstring(*place.split(".")) for name, place in _COMMANDS.items()}


def load_command(name: str) -> Command:
    """Import a command."""
    module, function = _COMMANDS[name].split(".")
    command: Command = getattr(importlib.import_module(f"repvgg.cli.{module}"), function)
    return command


@cache
def _syntax(module: str) -> ast.Module:
    return ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))


def _docstring(module: str, function: str) -> str:
    definitions = (node for node in _syntax(module).body if isinstance(node, ast.FunctionDef))
    return next(ast.get_docstring(node) or "" for node in definitions if node.name == function)


def _report_error(what: object) -> int:
    write_error(str(what))
    return BAD_INPUT


def _run(arguments: list[str]) -> int:
    known = _COMMANDS
    first = arguments[0] if arguments else "--help"
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in known else first
    group = [command for command in known if command.startswith(f"{first} ")]
    if (command := _ALIASES.get(name, name)) in known:
        return _call(name, load_command(command), arguments[len(name.split()) :])
    if first in ("-h", "--help"):
        sys.stdout.write(overview(commands(), _ABOUT))
    elif group and arguments[1:2] in ([], ["-h"], ["--help"]):
        sys.stdout.write(
            overview({command: about for command, about in commands().items() if command in group}, _ABOUT)
        )
    elif first == "--version":
        from repvgg import __version__

        sys.stdout.write(f"repvgg {__version__}\n")
    else:
        raise _unknown(arguments[:2] if group else [first], group or list(known))
    return 0


def _unknown(words: list[str], known: list[str]) -> UsageError:
    """Return the error for ``words``, whose last one is unknown; ``known`` start with the words before it."""
    last_words = list(dict.fromkeys(name.split()[len(words) - 1] for name in known))
    if not (advice := did_you_mean(words[-1], last_words, most=1)):
        advice = f"choose one of {', '.join(known)}."
    elif len(words) > 1:
        advice = advice.replace("mean ", f"mean {' '.join(words[:-1])} ")
    return UsageError(f"There is no command {' '.join(words)!r}: {advice}")


def _call(name: str, command: Command, arguments: list[str]) -> int:
    import tyro

    marks = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone, tyro.conf.HelptextFromCommentsOff)
    try:
        with single_blank_lines("-h" in arguments or "--help" in arguments):
            if name in _PARSE_THEMSELVES:
                return command(arguments) or 0
            call = parse(
                bound(command), arguments, prog=f"repvgg {name}", description=description(command), config=marks
            )
    except SystemExit as end:  # tyro exits after --help, and after it has explained what it cannot parse
        return end.code if isinstance(end.code, int) else 0
    return call() or 0
