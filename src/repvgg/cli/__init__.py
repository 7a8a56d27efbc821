"""The command line: one short file a verb."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from repvgg.errors import RepvggError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``repvgg`` with ``argv``; return the exit code.

    0: done. 1: the answer is no (two models differ). 2: bad input, in one sentence on standard error. 130: Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except RepvggError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from repvgg import __version__

        sys.stdout.write(f"repvgg {__version__}\n")
        return 0
    import tyro

    from repvgg.cli.bench import bench
    from repvgg.cli.convert import convert
    from repvgg.cli.list import list_
    from repvgg.cli.quickstart import quickstart
    from repvgg.cli.verify import verify

    verbs: dict[str, Callable[..., Any]] = {"quickstart": quickstart, "list": list_, "convert": convert, "verify": verify, "bench": bench}
    code: int | None = tyro.extras.subcommand_cli_from_dict(
        verbs,
        prog="repvgg",
        description="Train multi-branch networks, ship plain ones, and know that they are equal.",
        args=arguments or ["--help"],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return code or 0
