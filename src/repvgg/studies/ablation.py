"""Studies that train: a table of contenders times seeds, each cell a training of its own, shared by any processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from repvgg.data import open_data
from repvgg.errors import DataError
from repvgg.measure import RunSettings, environment
from repvgg.measure.environment import IDENTITY
from repvgg.measure.settings import Device, Dtype
from repvgg.studies.ablation_cells import (
    RUNS,
    Work,
    missing_in_words,
    missing_jobs,
    take_over,
    work_off,
    work_off_together,
)
from repvgg.studies.ablation_summary import Lead, Results, outcome_of
from repvgg.studies.cells import HEADER, Cell, Cells
from repvgg.studies.claims import Share, claimed
from repvgg.studies.contenders import SMALL_B0, Contender, chosen, network_row
from repvgg.studies.networks import check_counts
from repvgg.studies.study import Outcome, Study, Told
from repvgg.studies.training_cost import Cost, cost_is_known, measure_cost
from repvgg.training import TrainConfig, recipe_of

Part: TypeAlias = Literal["all", "trainings", "cost", "tables"]
Rows: TypeAlias = Callable[[], tuple[Contender, ...]]

_FREE = frozenset({"jobs", "cells", "part", "reuse"})
_DTYPES: dict[str, Dtype] = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WARMUP = 0.2  # of all epochs, at most


@dataclass(frozen=True)
class AblationSettings:
    """What may be chosen.

    Attributes:
        model: the row of models that all networks are built on: b0-small, or one of 'repvgg list'.
        recipe: how they are trained; what is not chosen below comes from it.
        data: URI of the images.
        epochs: passes over the training images; a warm-up takes a fifth of them at most.
        batch: images of a step.
        lr: the highest learning rate, whatever the batch.
        input_size: height and width of the training images.
        seeds: trainings of each row, with seeds 0, 1, 2, …
        rows: names of the rows to train; without it all of them.
        device: cpu or cuda; without it cuda where there is one.
        threads: CPU threads of a process; without it what PyTorch takes.
        rounds: how often the training step of each network is timed.
        jobs: processes that train at a time on this machine.
        cells: the share of the trainings that this call looks at, such as 1/4. Several calls may also share all of
            them: whoever comes first takes a cell.
        part: trainings, or the cost of their steps, for which the machine should be quiet; all does both, in turn;
            tables does neither, and writes what there is so far.
        reuse: folder of another study, whose trainings are taken where they are the same.

    Raises:
        UsageError: a number out of its range, or a share that there is not.
    """

    model: str = SMALL_B0.name
    recipe: str = "cifar"
    data: str | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    input_size: int | None = None
    seeds: int = 3
    rows: tuple[str, ...] = ()
    device: Device | None = None
    threads: int | None = None
    rounds: int = 10
    jobs: int = 1
    cells: str = "1/1"
    part: Part = "all"
    reuse: Path | None = None

    def __post_init__(self) -> None:
        check_counts(
            epochs=self.epochs,
            batch=self.batch,
            input_size=self.input_size,
            seeds=self.seeds,
            threads=self.threads,
            rounds=self.rounds,
            jobs=self.jobs,
        )
        Share.read(self.cells)

    @property
    def config(self) -> TrainConfig:
        """Of every training, but for the seed."""
        recipe = recipe_of(self.recipe)
        epochs, optim = self.epochs or recipe.epochs, recipe.optim
        if self.lr is not None:
            optim = replace(optim, lr=self.lr, lr_batch=None)
        size = recipe.data.train_size if self.input_size is None else self.input_size
        return replace(
            recipe,
            model=self.model,
            epochs=epochs,
            batch_size=self.batch or recipe.batch_size,
            data=replace(recipe.data, uri=self.data or recipe.data.uri, train_size=size),
            optim=replace(optim, warmup_epochs=min(optim.warmup_epochs, _WARMUP * epochs)),
            threads=self.threads,
            accelerator="cpu" if self.device == "cpu" else "auto",
            dry_run=False,
        )

    @property
    def setting(self) -> RunSettings:
        """Device, numbers, layout and threads."""
        config = self.config
        return RunSettings(
            self.device or "cpu", _DTYPES[config.precision], config.channels_last, self.threads, config.compile
        )


def resolved(rows: Rows, settings: AblationSettings) -> AblationSettings:
    """Fill in what nobody chose, out of the recipe and for the device; and see whether all of it exists.

    Raises:
        UsageError: there is no such row of the study.
        UnknownModelError: there is no such row of models.
    """
    network_row(settings.model)
    chosen(rows(), settings.rows)
    config = settings.config
    return replace(
        settings,
        data=config.data.uri,
        epochs=config.epochs,
        batch=config.batch_size,
        input_size=config.data.train_size,
        device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def ablation(name: str, title: str, about: str, rows: Rows, lead: Lead) -> Study:
    """A study that trains.

    Args:
        name: what 'repvgg study' calls it.
        title: what it shows.
        about: what is special about it, in a paragraph.
        rows: who takes part.
        lead: what came out, in a sentence.
    """
    return Study(
        name=name,
        title=title,
        about=f"{about}\n\n{_HOW}",
        settings=AblationSettings,
        resolve=partial(resolved, rows),
        measure=partial(_measure, rows),
        outcome=partial(_outcome, name, title, rows, lead),
        missing=partial(_missing, rows),
        free=_FREE,
        anywhere=True,
    )


_HOW = (
    "Every row is trained in the same way with each seed, which decides first weights, order and augmentation; the "
    "weights of the last epoch count, or their average if the recipe asks for it. Each is then collapsed as far as it "
    "goes and judged again on all held-out images. The spread is the standard deviation over seeds.\n\n"
    "The cost is that of whole training steps (forward, loss, backward, optimizer) on images that lie ready, timed "
    "in rounds that take each network once; memory is what a step takes at most beyond weights and what the optimizer "
    "keeps."
)


def _work(rows: Rows, settings: AblationSettings) -> Work:
    return Work(
        chosen(rows(), settings.rows),
        settings.seeds,
        network_row(settings.model),
        settings.config,
        settings.setting,
        Share.read(settings.cells),
    )


def _measure(rows: Rows, settings: AblationSettings, cells: Cells, told: Told) -> None:
    """The trainings that nobody has done, then the cost, unless only one of both is asked for."""
    work = _work(rows, settings)
    if settings.part == "tables":
        if not (cells.folder / HEADER).exists():
            raise DataError(f"There is no study in {str(cells.folder)!r} yet: start its trainings first.")
        return
    cells.begin()
    if settings.reuse is not None:
        told.say(f"{take_over(work, cells, settings.reuse)} trainings are those of {settings.reuse}")
    if settings.part != "cost":
        _train(work, settings.jobs, cells, told)
    if settings.part == "cost" or (settings.part == "all" and not missing_jobs(work, cells)):
        _measure_cost(work, settings, cells, told)


def _train(work: Work, processes: int, cells: Cells, told: Told) -> None:
    if processes > 1:
        work_off_together(work, cells, processes)
    else:
        work_off(work, cells, told.say, told)


def _measure_cost(work: Work, settings: AblationSettings, cells: Cells, told: Told) -> None:
    """By one process at a time; the others leave it to that one."""
    with claimed(cells.folder / RUNS / "cost.lock") as claim:
        cells.look_at_all()
        if not claim.ours:
            told.say(f"cost of a step: left to {claim.other}")
        elif not cost_is_known(cells, settings.rounds):
            machine = {name: value for name, value in environment().items() if name in IDENTITY}
            measure_cost(_cost(work, settings), cells, machine, told)


def _cost(work: Work, settings: AblationSettings) -> Cost:
    data = open_data(work.config.data)
    shape, classes = data.input_shape, len(data.classes)
    return Cost(work.contenders, work.spec, work.config, shape, classes, settings.setting, settings.rounds)


def _missing(rows: Rows, settings: AblationSettings, cells: Cells) -> str:
    trainings = missing_in_words(_work(rows, settings), cells)
    if trainings or cost_is_known(cells, settings.rounds):
        return trainings
    return "The cost of a training step is not measured: the same command with --part cost does it."


def _outcome(
    name: str, title: str, rows: Rows, lead: Lead, settings: AblationSettings, values: Mapping[str, Cell]
) -> Outcome:
    results = Results(chosen(rows(), settings.rows), values, settings.batch or 1)
    return outcome_of(name, title, results, lead)
