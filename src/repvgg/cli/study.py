"""``repvgg study``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from repvgg.studies.base import Study, StudyResult

_INTERRUPTED = 130
_NAME = "the study; without it all of them are listed. 'repvgg study NAME --help' tells what may be chosen."
_OUT = "where the study goes; without it runs/studies/NAME."


def study(arguments: list[str]) -> int:
    """Make a table or a figure of the paper on this machine, beside what the paper prints.

    A study leaves a folder: tables (Markdown, CSV, JSON), pictures for slides (SVG, PNG) and a page, report.html.
    Every measurement is kept as soon as it is made: interrupted in whatever way, the same command goes on from there,
    and after Ctrl-C the tables hold what there is. Studies: table1, table4, table5, table6-speed, figure1, figure3,
    mobile; and those that train, table6, table7 and blocks. These may be started several times over one folder, on any
    machines that share it: each call takes the next training that nobody has.

        repvgg study table1
        repvgg study table4 --max-gmacs 6 --threads 1
        repvgg study figure3 --out memory --overwrite
        repvgg study table6 --data imagefolder:cifar10 --epochs 3 --jobs 4

    Args:
        arguments: what stands behind ``repvgg study``.
    """
    from repvgg.cli import description, in_help
    from repvgg.studies import find_study

    if not arguments:
        return _list()
    if arguments[0].startswith("-"):
        _parse(arguments, [("name", _positional(_NAME, "NAME"), tyro.MISSING)], description(study), "repvgg study")
        return 0
    chosen = find_study(arguments[0])
    settings = ("settings", Annotated[chosen.settings, tyro.conf.arg(name="")], chosen.settings())
    about = in_help([chosen.title, *chosen.about.split("\n\n")])
    parsed = _parse(arguments[1:], [settings], about, f"repvgg study {chosen.name}")
    return _run(chosen, parsed, shlex.join(["repvgg", "study", *arguments]))


def _list() -> int:
    from repvgg.cli.terminal import write_line, write_table
    from repvgg.studies import all_studies

    titles = [(name, one.title) for name, one in all_studies().items()]
    write_table([("study", "what it shows"), *titles], numbers=False)
    write_line("\n'repvgg study NAME --help' tells what may be chosen.")
    return 0


def _parse(arguments: list[str], first: list[tuple[str, Any, Any]], about: str, program: str) -> Any:
    """The flags of one study, with those that all have in common."""
    switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
    fields = [
        *first,
        ("out", Annotated[Path | None, _about(_OUT, "FOLDER")], None),
        ("overwrite", Annotated[switch, _about("begin anew in a folder that holds a study.")], False),
    ]
    return tyro.cli(
        dataclasses.make_dataclass("StudyArguments", fields, frozen=True),
        prog=program,
        description=about,
        args=arguments,
        config=(
            tyro.conf.HelptextFromCommentsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
        ),
    )


def _about(text: str, metavar: str | None = None) -> Any:
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


def _positional(text: str, metavar: str) -> Any:
    return Annotated[str, tyro.conf.Positional, _about(text, metavar)]


def _run(chosen: Study, parsed: Any, command: str) -> int:
    from repvgg.cli.terminal import write_warning
    from repvgg.studies.base import run_study

    done = run_study(chosen, parsed.settings, parsed.out, overwrite=parsed.overwrite, command=command)
    _print(done)
    if done.complete:
        return 0
    if done.missing:
        write_warning(done.missing)
        return 0
    write_warning(f"interrupted; go on with: {command.replace(' --overwrite', '')}")
    return _INTERRUPTED


def _print(done: StudyResult) -> None:
    from repvgg.cli.terminal import write_line, write_table
    from repvgg.studies.base import PAGE

    for table in done.outcome.tables:
        write_line(table.title)
        write_table(table.cells)
        for note in table.notes:
            write_line(note)
        write_line()
    write_line(done.outcome.lead)
    write_line(str(done.folder / PAGE))
