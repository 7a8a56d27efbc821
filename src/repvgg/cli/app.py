"""The entry point of the command line: find the command, parse its arguments, turn errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from repvgg.cli._options import Command, description, overview, single_blank_lines
from repvgg.cli._output import INTERRUPTED
from repvgg.errors import RepvggError, UsageError, did_you_mean, is_out_of_memory

BAD_INPUT = 2

_ABOUT = "Train multi-branch CNNs, convert them exactly into plain ones, and verify the result."
_ALIASES = {"collapse": "convert"}
_PARSE_THEMSELVES = ("train", "study")  # the defaults of their options depend on other arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``repvgg`` with ``argv`` and return the exit code.

    0: success. 1: the answer is negative (two models differ). 2: bad input, explained in one sentence on standard
    error. 130: interrupted by Ctrl-C.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except RepvggError as error:
        return _report_error(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _report_error("There is not enough memory for this: take smaller or fewer images.")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output (head, for example) closed it. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def commands() -> dict[str, Command]:
    """Return every command by name, in the order of the overview."""
    from repvgg.cli import checkpoint
    from repvgg.cli.bench import bench
    from repvgg.cli.convert import convert
    from repvgg.cli.data import check
    from repvgg.cli.evaluate import evaluate
    from repvgg.cli.list_models import list_models
    from repvgg.cli.predict import predict
    from repvgg.cli.profile import profile
    from repvgg.cli.study import quickstart, study
    from repvgg.cli.train import train
    from repvgg.cli.verify import verify

    return {
        "quickstart": quickstart,
        "list": list_models,
        "profile": profile,
        "train": train,
        "eval": evaluate,
        "predict": predict,
        "convert": convert,
        "verify": verify,
        "bench": bench,
        "study": study,
        "data check": check,
        "checkpoint inspect": checkpoint.inspect,
        "checkpoint convert": checkpoint.convert,
    }


def _report_error(what: object) -> int:
    sys.stderr.write(f"error: {' '.join(str(what).split())}\n")
    return BAD_INPUT


def _run(arguments: list[str]) -> int:
    known = commands()
    first = arguments[0] if arguments else "--help"
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in known else first
    group = {command: run for command, run in known.items() if command.startswith(f"{first} ")}
    if command := known.get(_ALIASES.get(name, name)):
        return _call(name, command, arguments[len(name.split()) :])
    if first in ("-h", "--help"):
        sys.stdout.write(overview(known, _ABOUT))
    elif group and arguments[1:2] in ([], ["-h"], ["--help"]):
        sys.stdout.write(overview(group, _ABOUT))
    elif first == "--version":
        from repvgg import __version__

        sys.stdout.write(f"repvgg {__version__}\n")
    else:
        raise _unknown(arguments[:2] if group else [first], list(group or known))
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
            code: int | None = tyro.cli(
                command, prog=f"repvgg {name}", description=description(command), args=arguments, config=marks
            )
    except SystemExit as end:  # tyro exits after --help, and after it has explained what it cannot parse
        return end.code if isinstance(end.code, int) else 0
    return code or 0
