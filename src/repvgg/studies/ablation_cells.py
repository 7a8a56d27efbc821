"""The cells of a study that trains, worked off one by one, by any number of processes on any number of machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from repvgg.data import DataConfig, ImageData, open_data
from repvgg.errors import TrainingError, UsageError
from repvgg.measure import RunSettings
from repvgg.models import ModelSpec
from repvgg.studies.cells import CELLS, Cell, Cells, Header, plain_data, read_cell, read_header
from repvgg.studies.claims import Claim, Share, claimed, holder_of
from repvgg.studies.contenders import Contender
from repvgg.studies.training_cell import Training, train_cell
from repvgg.training import Terminated, TrainConfig

RUNS = "runs"
_OF_A_TABLE = {"rows", "seeds", "rounds"}  # and of no training

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One cell that is to be there in the end."""

    contender: Contender
    seed: int

    @property
    def key(self) -> str:
        """Its name among the cells."""
        return f"{self.contender.name}-seed{self.seed}"


@dataclass(frozen=True)
class Work:
    """All cells of a study, and which of them this process looks at.

    Attributes:
        contenders: rows of the table.
        seeds: how many trainings each gets: seeds 0, 1, 2, …
        spec: the row of models that they are built on.
        config: of all trainings; the seed is that of the cell.
        setting: where they run.
        share: those that this process looks at.
    """

    contenders: tuple[Contender, ...]
    seeds: int
    spec: ModelSpec
    config: TrainConfig
    setting: RunSettings
    share: Share = field(default_factory=Share)

    @property
    def jobs(self) -> list[Job]:
        """All of them, seed by seed, so that there is a whole table as early as may be."""
        return [Job(contender, seed) for seed in range(self.seeds) for contender in self.contenders]

    @property
    def own(self) -> list[Job]:
        """Those of the share."""
        return [job for index, job in enumerate(self.jobs) if self.share.holds(index)]


def work_off(work: Work, cells: Cells, say: Say, on_done: Callable[[int, int], None]) -> None:
    """Train what is missing and nobody else is at, in the order of the jobs.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; the training goes on from its last checkpoint next time.
        RepvggError: see :func:`repvgg.studies.training_cell.train_cell`.
    """
    for job in work.own:
        if not cells.look(job.key):
            with claimed(_lock(cells.folder, job)) as claim:
                _train_if_ours(claim, work, job, cells, say)
        on_done(len(work.jobs) - len(missing_jobs(work, cells)), len(work.jobs))


def _train_if_ours(claim: Claim, work: Work, job: Job, cells: Cells, say: Say) -> None:
    if not claim.ours:
        say(f"{job.key}: left to {claim.other}")
    elif not cells.look(job.key):  # or it was finished in between
        if claim.other is not None:
            say(f"{job.key}: taken over from {claim.other}, which is no more")
        cell = _trained(work, job, cells.folder)
        cells.put(job.key, cell)
        say(_told(job, cell))


def _trained(work: Work, job: Job, folder: Path) -> Cell:
    """What came of a training; that its loss became infinite is an outcome, too."""
    config = replace(work.config, seed=job.seed)
    training = Training(job.contender, work.spec, config, _opened(config.data, job.seed))
    try:
        return train_cell(training, folder / RUNS / job.key)
    except TrainingError as error:
        return {"row": job.contender.name, "seed": job.seed, "failed": str(error)}
    except Terminated:
        raise KeyboardInterrupt from None


@lru_cache(maxsize=1)
def _opened(data: DataConfig, seed: int) -> ImageData:
    """The images of a seed; kept for the next cell, as those of one seed follow each other."""
    return open_data(data, seed=seed)


def _told(job: Job, cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return f"{job.key}: {cell['failed']}"
    trained, deployed = cell["trained"], cell["deployed"]
    same = f"{deployed['same_answers']:,} of {deployed['images']:,} answers the same collapsed"
    return f"{job.key}: {trained['top1_percent']:.2f} %, {same}, {cell['seconds']:.0f} s"


def work_off_together(work: Work, cells: Cells, processes: int) -> None:
    """The same in several processes of this machine; each takes the next cell that nobody has.

    Raises:
        KeyboardInterrupt: as above.
        RepvggError: of the first process that has one.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for end in [pool.submit(_work_in_process, work, cells.folder, cells.header) for _ in range(processes)]:
            end.result()
    missing_jobs(work, cells)  # to have looked


def _work_in_process(work: Work, folder: Path, header: Header) -> None:
    console = Console(stderr=True)
    with work.setting.applied():
        cells = Cells.open(folder, header, anywhere=True)
        work_off(work, cells, partial(console.print, highlight=False, soft_wrap=True), lambda done, total: None)


def missing_jobs(work: Work, cells: Cells) -> list[Job]:
    """Those of all shares that are not there yet."""
    return [job for job in work.jobs if not cells.look(job.key)]


def missing_in_words(work: Work, cells: Cells) -> str:
    """What is missing and who is at it, in a sentence; empty where nothing is."""
    missing = missing_jobs(work, cells)
    if not missing:
        return ""
    held = [(job, holder_of(_lock(cells.folder, job))) for job in missing]
    at_work = ", ".join(f"{job.key} by {holder}" for job, holder in held if holder is not None)
    return f"{len(missing)} of {len(work.jobs)} trainings are missing" + (f"; at work: {at_work}." if at_work else ".")


def take_over(work: Work, cells: Cells, other: Path) -> int:
    """Take the cells that another study has, if it trained in the same way; return how many.

    Raises:
        DataError: there is no study in that folder, or a cell cannot be read.
        UsageError: it trained in another way; the text says what differs.
    """
    theirs, ours = read_header(other).settings, cells.header.settings
    for name in sorted((theirs.keys() | ours.keys()) - _OF_A_TABLE):
        if plain_data(theirs.get(name)) != plain_data(ours.get(name)):
            raise UsageError(
                f"The study in {str(other)!r} has {name} {theirs.get(name)!r}, not {ours.get(name)!r}: its trainings "
                "cannot stand in this table."
            )
    found = [job for job in work.jobs if not cells.look(job.key) and (other / CELLS / f"{job.key}.json").is_file()]
    for job in found:
        cells.put(job.key, read_cell(other / CELLS / f"{job.key}.json"))
    return len(found)


def _lock(folder: Path, job: Job) -> Path:
    return folder / RUNS / f"{job.key}.lock"
