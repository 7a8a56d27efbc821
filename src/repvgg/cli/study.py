"""``repvgg study`` and ``repvgg quickstart``, which measure, train and write a folder with a report."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from repvgg.cli._interrupt import interrupt_message, tell
from repvgg.cli._options import as_declared, description, option, parse, without_empty_defaults, wrapped
from repvgg.cli._output import INTERRUPTED, write_line, write_table, write_warning
from repvgg.errors import require

if TYPE_CHECKING:
    from repvgg.studies.base import Study, StudyResult

_NAME = "the study; without it all are listed. 'repvgg study NAME --help' explains the options of one."
_OUT = "folder of the study (default: runs/studies/NAME)."
_QUICKSTART_NEEDS = (
    "PIL",
    "lightning",
    "torchvision",
    "sklearn",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "jinja2",
    "matplotlib",
)


def quickstart(
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FOLDER")] = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train a small network on handwritten digits, collapse, verify, export and time it, and write a report.

    Takes a minute or two on 2 CPU cores. Writes a folder with both forms of the model, an ONNX file and a report to
    open in a browser. Nothing is downloaded. An interrupted run leaves nothing.

    Args:
        out: folder to write; default: runs/quickstart, or the next unused name like it.
        seed: of all random numbers; the same seed gives the same weights bit for bit.
        overwrite: replace the folder if it exists.
    """
    command = shlex.join(["repvgg", "quickstart", *(["--out", str(out)] if out else []), "--seed", str(seed)])
    with interrupt_message(lambda: f"interrupted; nothing was written; start again with: {command}"):
        for package in _QUICKSTART_NEEDS:
            require(package, "study")  # before training, not after it
        from repvgg.studies.quickstart import run

        run(out, seed, overwrite=overwrite)


def study(arguments: list[str]) -> int:
    """Reproduce a table or a figure of the paper on this machine, next to the printed numbers.

    A study writes a folder: tables (Markdown, CSV, JSON), pictures (SVG, PNG) and a page, report.html. Each measurement
    is saved at once: after an interruption the same command continues, and after Ctrl-C the tables hold what was
    measured so far. Studies that measure: table1, table4, table5, table6-speed, table8, figure1, figure3, mobile, int8.
    Studies that train: table6, table7, blocks, and table8 with --train. Several processes may share the folder of one
    that trains, except for table8 also on several machines: each takes the next model that no other process trains.

        repvgg study table1
        repvgg study table4 --max-gmacs 6 --threads 1
        repvgg study table4 --engine torch,repvgg,openvino
        repvgg study figure3 --out memory --overwrite
        repvgg study int8 --checkpoints runs/a --data imagefolder:photos
        repvgg study table6 --data imagefolder:cifar10 --epochs 3 --jobs 4
        repvgg study table8 --train --data masks:camvid --init a0.safetensors

    Args:
        arguments: everything after ``repvgg study``.
    """
    from repvgg.studies import all_studies, find_study

    if not arguments:
        titles = [(name, one.title) for name, one in all_studies().items()]
        write_table([("study", "what it shows"), *titles], numbers=False)
        write_line("\n'repvgg study NAME --help' explains the options of one.")
        return 0
    if arguments[0].startswith("-"):
        name = Annotated[str, tyro.conf.Positional, option(_NAME, "NAME")]
        _parse(arguments, ("name", name, tyro.MISSING), description(study), "repvgg study")
        return 0
    chosen = find_study(arguments[0])
    kind = without_empty_defaults(chosen.settings)
    settings = ("settings", Annotated[kind, tyro.conf.arg(name="")], kind())
    about = wrapped([chosen.title, *chosen.about.split("\n\n")])
    parsed = _parse(arguments[1:], settings, about, f"repvgg study {chosen.name}")
    parsed = dataclasses.replace(parsed, settings=as_declared(parsed.settings))
    return _run(chosen, parsed, shlex.join(["repvgg", "study", *arguments]))


def _parse(arguments: list[str], first: tuple[str, Any, Any], about: str, program: str) -> Any:
    fields = [
        first,
        ("out", Annotated[Path | None, option(_OUT, "FOLDER")], None),
        ("overwrite", Annotated[bool, option("replace the study that the folder holds.")], False),
    ]
    return parse(
        dataclasses.make_dataclass("StudyArguments", fields, frozen=True),
        arguments,
        prog=program,
        description=about,
        config=(
            tyro.conf.HelptextFromCommentsOff,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.FlagCreatePairsOff,
            tyro.conf.DisallowNone,
        ),
    )


def _run(chosen: Study, parsed: Any, command: str) -> int:
    from repvgg.studies.base import run_study

    advice = f"interrupted; continue with: {command.replace(' --overwrite', '')}"
    with interrupt_message(lambda: advice):
        done = run_study(chosen, parsed.settings, parsed.out, overwrite=parsed.overwrite, command=command)
        if not done.complete and not done.missing:
            tell()
    _print(done)
    if done.complete:
        return 0
    if done.missing:
        write_warning(done.missing)
        return 0
    return INTERRUPTED


def _print(done: StudyResult) -> None:
    from repvgg.studies.base import PAGE

    for table in done.outcome.tables:
        write_line(table.title)
        write_table(table.cells)
        for note in table.notes:
            write_line(note)
        write_line()
    write_line(done.outcome.lead)
    write_line(str(done.folder / PAGE))
