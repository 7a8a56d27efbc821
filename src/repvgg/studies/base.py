"""What all studies share: measure the missing cells, then write tables, charts and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from repvgg._files import write_text
from repvgg._progress import progress_bar
from repvgg.errors import UsageError
from repvgg.measure import environment
from repvgg.studies.report.charts import Chart, write_chart
from repvgg.studies.report.render import render_study
from repvgg.studies.store import HEADER, CellStore, Header
from repvgg.studies.tables import Table, as_csv, as_data, as_markdown

FOLDER = Path("runs/studies")
PAGE = "report.html"

#: Called after each step with the number of steps done and the total.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ProgressReporter:
    """An :data:`OnProgress` that can also print messages.

    Attributes:
        on_progress: called with the number of steps done and the total.
        message: prints a line.
    """

    on_progress: OnProgress
    message: Callable[[str], None]

    def __call__(self, done: int, total: int) -> None:
        """Report the number of steps done and the total."""
        self.on_progress(done, total)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of a study, complete or not."""

    lead: str  # the result in a sentence
    tables: tuple[Table, ...]  # the most important one first
    charts: tuple[Chart, ...]  # the most important one first


# The default of Study.missing: measure() itself adds every cell.
def _nothing_missing(settings: Any, store: CellStore) -> str:
    return ""


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper, made on this machine."""

    name: str  # in 'repvgg study', and of its files
    title: str  # one line
    about: str  # method, in paragraphs
    settings: type[Any]  # a frozen dataclass; its `run` is a RunSettings
    resolve: Callable[[Any], Any]  # fills in the defaults that depend on the device
    # Adds the missing cells; the run settings are applied already.
    measure: Callable[[Any, CellStore, ProgressReporter], None]
    outcome: Callable[[Any, Mapping[str, Any]], Outcome]  # takes the cells that exist
    # Cells that `measure` left to other processes, in a sentence; empty if there are none.
    missing: Callable[[Any, CellStore], str] = _nothing_missing
    # Settings about how the work is divided: they may change when a study continues.
    free_settings: frozenset[str] = frozenset()
    mix_machines: bool = False  # accept cells of several machines
    # Whether a finished study may get more cells, by other free settings.
    extends: bool = False
    # Name of the default folder, for a study whose settings select one of several; None takes its name.
    default_folder: Callable[[Any], str] | None = None


@dataclass(frozen=True, eq=False)
class StudyResult:
    """State and outcome of a study after a run."""

    folder: Path
    outcome: Outcome  # of the cells that exist
    complete: bool  # no cell is missing
    missing: str = ""  # what other processes have to do, if the run was not interrupted


def run_study(
    study: Study,
    settings: Any,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    command: str = "",
    console: Console | None = None,
) -> StudyResult:
    """Measure the missing cells of a study, and write its tables, charts and page.

    Ctrl-C keeps the cells measured so far and writes their tables; the same call continues from there.

    Args:
        study: the study to run.
        settings: an instance of ``study.settings``.
        out: the folder; None takes ``runs/studies/NAME``.
        overwrite: remove the study in the folder and start again.
        command: continues the study; shown on its page.
        console: where progress is shown; None takes standard error.

    Raises:
        OutputExistsError: the folder holds a finished study, or files that are no study.
        UsageError: the folder holds cells of other settings or another machine, or the settings cannot be applied.
        KeyboardInterrupt: Ctrl-C before the first cell of a study that trains nothing.
    """
    chosen = study.resolve(settings)
    with chosen.run.applied():
        # Only settings that decide the numbers go into the header: the others may differ when the study continues.
        settled = {name: value for name, value in flatten(chosen).items() if name not in study.free_settings}
        header = Header(study.name, settled, environment(), command)  # before measuring, for an honest load average
        default = study.name if study.default_folder is None else study.default_folder(chosen)
        folder = FOLDER / default if out is None else out
        store = CellStore.open(
            folder, header, overwrite=overwrite, mix_machines=study.mix_machines, extends=study.extends
        )
        interrupted = False
        try:
            console = console or Console(stderr=True)
            message = partial(console.print, highlight=False, soft_wrap=True, markup=False)
            # Without auto_refresh the bar is drawn between steps only: a drawing thread would disturb what is timed.
            with progress_bar("measuring", console, auto_refresh=False) as on_progress:
                study.measure(chosen, store, ProgressReporter(on_progress, message))
        except KeyboardInterrupt:
            # Without a cell there is nothing to write, unless a training left a checkpoint to continue from.
            if not (len(store) or (store.folder / HEADER).exists()):
                raise
            interrupted = True
    missing = "" if interrupted else study.missing(chosen, store)
    complete = not interrupted and not missing
    if complete:
        store.finish()
    # After finish(), so that the page shows the time.
    outcome = study.outcome(chosen, store.values)
    _write_outcome(study, store, outcome)
    return StudyResult(store.folder, outcome, complete, missing)


def flatten(settings: Any) -> dict[str, Any]:
    """Return all settings by name: the study's own and those of the run."""
    own = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "run"}
    return own | {field.name: getattr(settings.run, field.name) for field in fields(settings.run)}


def check_positive(**numbers: int | None) -> None:
    """Refuse numbers below 1; None means "not chosen".

    Raises:
        UsageError: one of them is below 1; the text names it.
    """
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}.")


def _write_outcome(study: Study, store: CellStore, outcome: Outcome) -> None:
    folder, header = store.folder, store.header
    write = partial(write_text, overwrite=True)  # an interrupted run may have left older files
    for table in outcome.tables:
        write(folder / f"{table.name}.csv", as_csv(table))
    write(folder / f"{study.name}.md", _markdown(study, header, outcome))
    write(folder / f"{study.name}.json", json.dumps(_data(header, outcome), indent=1, allow_nan=False) + "\n")
    drawings = {chart.name: write_chart(folder, chart) for chart in outcome.charts}
    page = render_study(study.title, study.about, outcome.lead, outcome.tables, outcome.charts, drawings, header)
    write(folder / PAGE, page)


def _markdown(study: Study, header: Header, outcome: Outcome) -> str:
    tables = [as_markdown(table).rstrip() for table in outcome.tables]
    facts = [f"- {name}: {value}" for name, value in {**header.settings, **header.environment}.items()]
    times = f"Started {header.started}, {f'finished {header.finished}' if header.finished else 'not finished'}."
    parts = [f"# {study.title}", outcome.lead, *tables, study.about, times, f"`{header.command}`", "\n".join(facts)]
    return "\n\n".join(parts) + "\n"


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
