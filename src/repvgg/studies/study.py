"""What all studies share: measure cell by cell, then write tables, pictures and a page of whatever there is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from repvgg._files import write_text
from repvgg.measure import RunSettings, environment
from repvgg.studies.cells import Cells, Header
from repvgg.studies.report.charts import Chart, write_chart
from repvgg.studies.report.render import render_study
from repvgg.studies.tables import Table, as_csv, as_data, as_markdown

FOLDER = Path("runs/studies")
PAGE = "report.html"

#: Told after each step how many are done, and how many there are.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Told:
    """Whoever watches a study: an :data:`OnProgress` that takes words, too.

    Attributes:
        step: told how many steps are done, and how many there are.
        say: shows a line.
    """

    step: OnProgress
    say: Callable[[str], None]

    def __call__(self, done: int, total: int) -> None:
        """So many steps are done."""
        self.step(done, total)


def _nothing_is_missing(settings: Any, cells: Cells) -> str:
    return ""


class Settings(Protocol):
    """What every study lets a person choose; each has a frozen dataclass of its own."""

    @property
    def setting(self) -> RunSettings:
        """Device, numbers, layout and threads."""
        ...


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the cells say.

    Attributes:
        lead: in a sentence.
        tables: the first is the one that matters most.
        pictures: likewise.
    """

    lead: str
    tables: tuple[Table, ...]
    pictures: tuple[Chart, ...]


@dataclass(frozen=True)
class Study:
    """A table or a figure of the paper, made on this machine.

    Attributes:
        name: what 'repvgg study' calls it, and its files.
        title: what it shows, in a line.
        about: what is measured, and how, for people who want to know; paragraphs.
        settings: the frozen dataclass of what may be chosen, with :class:`Settings` in it.
        resolve: fills in what nobody chose, for the device.
        measure: puts the cells that are missing; the setting is applied.
        outcome: of whatever cells there are.
        missing: what is missing after ``measure`` was through, where that leaves something to other processes, in a
            sentence; empty where nothing is.
        free: settings that say who does what, and not what is done: they may change when a study goes on.
        anywhere: cells of several machines may stand beside each other.
    """

    name: str
    title: str
    about: str
    settings: type[Any]
    resolve: Callable[[Any], Any]
    measure: Callable[[Any, Cells, Told], None]
    outcome: Callable[[Any, Mapping[str, Any]], Outcome]
    missing: Callable[[Any, Cells], str] = _nothing_is_missing
    free: frozenset[str] = frozenset()
    anywhere: bool = False


@dataclass(frozen=True, eq=False)
class Finished:
    """Where a study is, and what it says.

    Attributes:
        folder: of the study.
        outcome: of all cells there are.
        complete: nothing is missing.
        missing: what others are left to do, if nobody interrupted this process.
    """

    folder: Path
    outcome: Outcome
    complete: bool
    missing: str = ""


def run_study(
    study: Study,
    settings: Any,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    command: str = "",
    console: Console | None = None,
) -> Finished:
    """Measure what is missing in the folder, and write tables, pictures and a page there.

    Ctrl-C keeps what was measured and writes the tables of what there is; the same call goes on from there.

    Args:
        study: which.
        settings: an instance of ``study.settings``.
        out: the folder; None takes ``runs/studies/NAME``.
        overwrite: remove the study that is there, and begin anew.
        command: that starts the study again, for its page.
        console: where progress is shown, if it is a terminal; standard error if None.

    Raises:
        OutputExistsError: the folder holds a finished study, or something else.
        UsageError: the folder holds cells of other settings or of another machine, or the setting cannot be applied.
        KeyboardInterrupt: Ctrl-C before anything was measured, or begun to be trained.
    """
    chosen = study.resolve(settings)
    with chosen.setting.applied():
        settled = {name: value for name, value in flat(chosen).items() if name not in study.free}
        header = Header(study.name, settled, environment(), command)
        folder = FOLDER / study.name if out is None else out
        cells = Cells.open(folder, header, overwrite=overwrite, anywhere=study.anywhere)
        through = _measured(study, chosen, cells, console or Console(stderr=True))
    missing = study.missing(chosen, cells) if through else ""
    if through and not missing:
        cells.finish()
    outcome = study.outcome(chosen, cells.values)
    _write(study, cells, outcome)
    return Finished(cells.folder, outcome, through and not missing, missing)


def flat(settings: Any) -> dict[str, Any]:
    """All that was chosen, by name; those of the setting beside the study's own."""
    own = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "setting"}
    return own | {field.name: getattr(settings.setting, field.name) for field in fields(settings.setting)}


def _measured(study: Study, settings: Any, cells: Cells, console: Console) -> bool:
    """Put the cells that are missing; say whether nobody interrupted."""
    try:
        with _progress(console) as told:
            study.measure(settings, cells, told)
    except KeyboardInterrupt:
        if not (len(cells) or study.anywhere):  # a training that was begun is worth going on with
            raise
        return False
    return True


@contextmanager
def _progress(console: Console) -> Iterator[Told]:
    """A bar on a terminal. Drawn between the steps, not while one runs."""
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        yield Told(lambda done, total: None, say)
        return
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=None)
        progress.refresh()
        yield Told(lambda done, total: progress.update(task, completed=done, total=total, refresh=True), say)


def _write(study: Study, cells: Cells, outcome: Outcome) -> None:
    """Everything that is made of the cells; what an interrupted run left of it is replaced."""
    write = partial(write_text, overwrite=True)
    for table in outcome.tables:
        write(cells.folder / f"{table.name}.csv", as_csv(table))
    write(cells.folder / f"{study.name}.md", _markdown(study, cells.header, outcome))
    write(
        cells.folder / f"{study.name}.json", json.dumps(_data(cells.header, outcome), indent=1, allow_nan=False) + "\n"
    )
    drawings = {picture.name: write_chart(cells.folder, picture) for picture in outcome.pictures}
    page = render_study(
        study.title, study.about, outcome.lead, outcome.tables, outcome.pictures, drawings, cells.header
    )
    write(cells.folder / PAGE, page)


def _markdown(study: Study, header: Header, outcome: Outcome) -> str:
    about = [f"# {study.title}", outcome.lead, *(as_markdown(table).rstrip() for table in outcome.tables), study.about]
    stamp = [f"- {name}: {value}" for name, value in {**header.settings, **header.environment}.items()]
    times = f"Started {header.started}, {f'finished {header.finished}' if header.finished else 'not finished'}."
    return "\n\n".join([*about, times, f"`{header.command}`", "\n".join(stamp)]) + "\n"


def _data(header: Header, outcome: Outcome) -> dict[str, Any]:
    return {
        "study": header.study,
        "lead": outcome.lead,
        "tables": {table.name: as_data(table) for table in outcome.tables},
        "settings": dict(header.settings),
        "environment": dict(header.environment),
        "command": header.command,
        "started": header.started,
        "finished": header.finished or None,
    }
