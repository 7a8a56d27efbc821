"""Ablations: Tables 6 and 7 of the paper and all blocks, on small networks; processes can share the trainings.

    repvgg study table6     which branches matter
    repvgg study table7     variants of the block, other re-parameterizations, real shortcuts
    repvgg study blocks     every block of this library in the same network

A cell is one training of one variant with one seed. Processes that share the folder lock the cell that they train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console

from repvgg.data import DataConfig, ImageData, open_image_data
from repvgg.errors import DataError, TrainingError, UsageError
from repvgg.measure import IDENTITY, RunSettings, environment
from repvgg.measure.settings import Device, Dtype
from repvgg.models import ModelSpec
from repvgg.studies.ablation_results import Results
from repvgg.studies.ablation_tables import Lead, ablation_outcome, lead_branches, lead_extremes
from repvgg.studies.base import OnProgress, Outcome, ProgressReporter, Study, check_positive
from repvgg.studies.store import (
    CELLS,
    HEADER,
    Cell,
    CellShare,
    CellStore,
    Header,
    as_stored,
    lock_holder,
    read_cell,
    read_header,
    try_lock,
)
from repvgg.studies.variants import (
    SMALL_B0,
    TABLE_6_VARIANTS,
    TABLE_7_VARIANTS,
    StepCost,
    Training,
    Variant,
    base_architecture,
    block_variants,
    cost_is_complete,
    measure_cost,
    select_variants,
    train_cell,
)
from repvgg.training import TrainConfig, recipe_of, settle_precision

Part: TypeAlias = Literal["all", "trainings", "cost", "tables"]
Variants: TypeAlias = Callable[[], tuple[Variant, ...]]

RUNS = "runs"  # folder of checkpoints, logs and locks
# They divide the work; results do not depend on them. The precision is in the header as the dtype.
_FREE_SETTINGS = frozenset({"jobs", "cells", "part", "reuse", "precision", "allow_commands"})
_NOT_OF_A_TRAINING = {"rows", "seeds", "rounds"}  # studies that differ in these can share trainings
_DTYPES: dict[str, Dtype] = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_MAX_WARMUP = 0.2  # of all epochs: the recipe's warm-up may be longer than a short run


@dataclass(frozen=True)
class AblationSettings:
    """Settings of an ablation.

    Attributes:
        model: the architecture of all networks: b0-small, or one of 'repvgg list'.
        recipe: training recipe; the settings below override it.
        data: URI of the images.
        epochs: passes over the training images; a warm-up takes a fifth of them at most.
        batch: images in a step.
        lr: peak learning rate, not scaled with the batch.
        input_size: height and width of the training images.
        seeds: trainings of each row, with seeds 0, 1, 2, …
        rows: names of the rows to train; default: all.
        device: cpu or cuda; default: cuda if there is one.
        precision: of the arithmetic; default: the recipe's, which may depend on the machine.
        threads: CPU threads of a process; default: PyTorch's.
        rounds: how often the training step of each network is timed.
        jobs: processes that train at a time on this machine.
        cells: the share of the trainings that this call runs, such as 1/4. Several calls may also share all trainings:
            each runs the next free one.
        part: trainings, or the cost of their steps, for which the machine should be idle; all does one after the
            other; tables does neither, and writes the tables of the cells that exist.
        reuse: folder of another study, from which equal trainings are copied.
        allow_commands: run the shell command of webdataset:pipe:COMMAND.

    Raises:
        UsageError: a number is out of its range, or there is no such share.
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
    precision: Literal["float32", "bf16", "fp16"] | None = None
    threads: int | None = None
    rounds: int = 10
    jobs: int = 1
    cells: str = "1/1"
    part: Part = "all"
    reuse: Path | None = None
    allow_commands: bool = False

    def __post_init__(self) -> None:
        check_positive(
            epochs=self.epochs,
            batch=self.batch,
            input_size=self.input_size,
            seeds=self.seeds,
            threads=self.threads,
            rounds=self.rounds,
            jobs=self.jobs,
        )
        CellShare.parse(self.cells)

    @property
    def config(self) -> TrainConfig:
        """Configuration of every training, without the seed."""
        recipe = recipe_of(self.recipe)
        epochs, optim = self.epochs or recipe.epochs, recipe.optim
        if self.lr is not None:
            optim = replace(optim, lr=self.lr, lr_batch=None)  # lr_batch would scale it with the batch
        size = recipe.data.train_size if self.input_size is None else self.input_size
        config = replace(
            recipe,
            model=self.model,
            epochs=epochs,
            batch_size=self.batch or recipe.batch_size,
            data=replace(
                recipe.data,
                uri=self.data or recipe.data.uri,
                train_size=size,
                allow_commands=self.allow_commands,
            ),
            optim=replace(optim, warmup_epochs=min(optim.warmup_epochs, _MAX_WARMUP * epochs)),
            threads=self.threads,
            accelerator="cpu" if self.device == "cpu" else "auto",
            precision=self.precision or recipe.precision,
            dry_run=False,  # even if the recipe says so
            whiten_stem=False,  # only a stem of RepVGG's branches could be
        )
        # Not left to each training: the precision is part of the header, which every machine of a study must have.
        return settle_precision(config)[0]

    @property
    def run(self) -> RunSettings:
        """Device, dtype, memory format and threads."""
        config = self.config
        return RunSettings(
            self.device or "cpu", _DTYPES[config.precision], config.channels_last, self.threads, config.compile
        )


@dataclass(frozen=True)
class Job:
    """One training, the content of a cell."""

    variant: Variant
    seed: int

    @property
    def key(self) -> str:
        """Key of the cell."""
        return f"{self.variant.name}-seed{self.seed}"


@dataclass(frozen=True)
class Work:
    """All trainings of a study, and the share of this process."""

    variants: tuple[Variant, ...]  # rows of the table
    seeds: int  # trainings of each variant, with seeds 0, 1, 2, …
    spec: ModelSpec  # the architecture that they are built on
    config: TrainConfig  # of all trainings, without the seed
    run: RunSettings  # device, dtype, memory format and threads
    share: CellShare = field(default_factory=CellShare)  # the trainings that this process runs

    @property
    def jobs(self) -> list[Job]:
        """All trainings, seed by seed, so that a table with one seed is complete as early as possible."""
        return [Job(variant, seed) for seed in range(self.seeds) for variant in self.variants]

    def missing(self, store: CellStore) -> list[Job]:
        """Return the jobs of all shares without a cell."""
        return [job for job in self.jobs if not store.refresh(job.key)]


def _resolve(variants: Variants, settings: AblationSettings) -> AblationSettings:
    # Refuse unknown names now, not after the first training.
    base_architecture(settings.model)
    select_variants(variants(), settings.rows)
    config = settings.config
    return replace(
        settings,
        data=config.data.uri,
        epochs=config.epochs,
        batch=config.batch_size,
        input_size=config.data.train_size,
        device=settings.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def _work(variants: Variants, settings: AblationSettings) -> Work:
    return Work(
        select_variants(variants(), settings.rows),
        settings.seeds,
        base_architecture(settings.model),
        settings.config,
        settings.run,
        CellShare.parse(settings.cells),
    )


def _measure(variants: Variants, settings: AblationSettings, store: CellStore, reporter: ProgressReporter) -> None:
    work = _work(variants, settings)
    if settings.part == "tables":
        if not (store.folder / HEADER).exists():
            raise DataError(f"There is no study in {str(store.folder)!r} yet: start its trainings first.")
        return
    store.create()  # so that other processes find the folder before the first training ends
    if settings.reuse is not None:
        reporter.message(f"copied {copy_cells(work, store, settings.reuse)} trainings from {settings.reuse}")
    if settings.part != "cost":
        if settings.jobs > 1:
            _train_in_processes(work, store, settings.jobs)
        else:
            _train_missing(work, store, reporter.message, reporter)
    # With "all", the process that finishes the last training measures the cost.
    if settings.part == "cost" or (settings.part == "all" and not work.missing(store)):
        _measure_cost(work, settings, store, reporter)


def copy_cells(work: Work, store: CellStore, other: Path) -> int:
    """Copy the cells of another study that trained with the same settings; return how many.

    Raises:
        DataError: there is no study in that folder, or a cell cannot be read.
        UsageError: a setting differs; the text names it.
    """
    theirs, ours = read_header(other).settings, store.header.settings
    for name in sorted((theirs.keys() | ours.keys()) - _NOT_OF_A_TRAINING):
        if as_stored(theirs.get(name)) != as_stored(ours.get(name)):
            raise UsageError(
                f"The study in {str(other)!r} has {name} {theirs.get(name)!r}, not {ours.get(name)!r}: its trainings "
                "cannot be reused here."
            )
    found = [job for job in work.missing(store) if (other / CELLS / f"{job.key}.json").is_file()]
    for job in found:
        store.put(job.key, read_cell(other / CELLS / f"{job.key}.json"))
    return len(found)


def _train_in_processes(work: Work, store: CellStore, processes: int) -> None:
    # Not fork: children of a process whose OpenMP threads are running would hang.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_train_in_process, work, store.folder, store.header) for _ in range(processes)]:
            future.result()  # raises the error of the process
    store.refresh_all()


def _train_in_process(work: Work, folder: Path, header: Header) -> None:
    console = Console(stderr=True)
    with work.run.applied():
        store = CellStore.open(folder, header, mix_machines=True)
        message = partial(console.print, highlight=False, soft_wrap=True)
        _train_missing(work, store, message, lambda done, total: None)


def _train_missing(work: Work, store: CellStore, message: Callable[[str], None], on_progress: OnProgress) -> None:
    """Train the jobs of the share that have no cell and that no other process trains.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; the training continues from its last checkpoint next time.
        RepvggError: see :func:`repvgg.studies.variants.train_cell`.
    """
    for index, job in enumerate(work.jobs):
        if not work.share.holds(index):
            continue
        if not store.refresh(job.key):
            store.create()  # before the lock: the header is the first file in the folder
            with try_lock(_lock_path(store.folder, job)) as lock:
                if not lock.acquired:
                    message(f"{job.key}: left to {lock.holder}")
                elif not store.refresh(job.key):  # another process may have finished it before we got the lock
                    if lock.holder is not None:
                        message(f"{job.key}: taken over from {lock.holder}, which has ended")
                    cell = _train(work, job, store.folder)
                    store.put(job.key, cell)
                    message(f"{job.key}: {_summary(cell)}")
        on_progress(len(work.jobs) - len(work.missing(store)), len(work.jobs))


def _train(work: Work, job: Job, folder: Path) -> Cell:
    from repvgg.training import Terminated  # needs Lightning, which listing the studies does not

    config = replace(work.config, seed=job.seed)
    training = Training(job.variant, work.spec, config, _open_data(config.data, job.seed))
    try:
        return train_cell(training, folder / RUNS / job.key)
    except TrainingError as error:  # a diverged loss is a result
        return {"row": job.variant.name, "seed": job.seed, "failed": str(error)}
    except Terminated:
        raise KeyboardInterrupt from None


@lru_cache(maxsize=1)  # jobs with the same seed follow each other
def _open_data(data: DataConfig, seed: int) -> ImageData:
    return open_image_data(data, seed=seed)


def _summary(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return str(cell["failed"])
    trained, deployed = cell["trained"], cell["deployed"]
    same = f"{deployed['same_answers']:,} of {deployed['images']:,} answers are the same when collapsed"
    return f"{trained['top1_percent']:.2f} %, {same}, {cell['seconds']:.0f} s"


def _lock_path(folder: Path, job: Job) -> Path:
    return folder / RUNS / f"{job.key}.lock"


def _measure_cost(work: Work, settings: AblationSettings, store: CellStore, reporter: ProgressReporter) -> None:
    store.create()
    with try_lock(store.folder / RUNS / "cost.lock") as lock:
        store.refresh_all()
        if not lock.acquired:
            reporter.message(f"cost of a step: left to {lock.holder}")
        elif not cost_is_complete(store, settings.rounds):
            machine = {name: value for name, value in environment().items() if name in IDENTITY}
            data = open_image_data(work.config.data)
            cost = StepCost(
                variants=work.variants,
                spec=work.spec,
                config=work.config,
                image=data.input_shape,
                num_classes=len(data.classes),
                run=settings.run,
                rounds=settings.rounds,
            )
            measure_cost(cost, store, machine, reporter)


def _missing(variants: Variants, settings: AblationSettings, store: CellStore) -> str:
    work = _work(variants, settings)
    if missing := work.missing(store):
        holders = [(job, lock_holder(_lock_path(store.folder, job))) for job in missing]
        running = ", ".join(f"{job.key} by {holder}" for job, holder in holders if holder is not None)
        return f"{len(missing)} of {len(work.jobs)} trainings are missing" + (
            f"; at work: {running}." if running else "."
        )
    if cost_is_complete(store, settings.rounds):
        return ""
    return "The cost of a training step is not measured: the same command with --part cost does it."


def _outcome(
    name: str, title: str, variants: Variants, lead: Lead, settings: AblationSettings, values: Mapping[str, Cell]
) -> Outcome:
    results = Results(select_variants(variants(), settings.rows), values, settings.batch or 1)
    return ablation_outcome(name, title, results, lead)


_METHOD = (
    "Every row is trained in the same way with each seed, which determines initial weights, order and augmentation; "
    "the weights of the last epoch count, or their average if the recipe says so. Each network is then collapsed and "
    "evaluated again on all validation images. The spread is the standard deviation over seeds.\n\n"
    "The cost is that of whole training steps (forward, loss, backward, optimizer) on images in memory, timed in "
    "rounds of one step of each network; memory is the peak of a step beyond weights and the state of the optimizer."
)


def _ablation(name: str, title: str, about: str, variants: Variants, lead: Lead) -> Study:
    return Study(
        name=name,
        title=title,
        about=f"{about}\n\n{_METHOD}",
        settings=AblationSettings,
        resolve=partial(_resolve, variants),
        measure=partial(_measure, variants),
        outcome=partial(_outcome, name, title, variants, lead),
        missing=partial(_missing, variants),
        free_settings=_FREE_SETTINGS,
        mix_machines=True,
    )


STUDIES = (
    _ablation(
        "table6",
        "Table 6: which branches matter",
        "RepVGG with and without its identity branch and its 1×1 branch, in every block.",
        lambda: TABLE_6_VARIANTS,
        lead_branches,
    ),
    _ablation(
        "table7",
        "Table 7: variants of the block, and alternatives",
        "All rows have the layers of the same RepVGG and differ in the block that replaces each 3×3 convolution. "
        "Residual Reorg has shortcuts across layers, which stay.",
        lambda: TABLE_7_VARIANTS,
        lead_extremes,
    ),
    _ablation(
        "blocks",
        "Every block of the table, in the same network",
        "Each block replaces every 3×3 convolution of the same RepVGG. Left out are UniRepLK, which has no such "
        "kernels, and blocks that equal another row at 3×3: RepLK (RepVGG w/o identity), ExpandNet-CK (conv-BN) and "
        "QARepVGG S2 (Identity w/o BN). Where a block does not support the geometry of a layer, as RepMixer does not "
        "where the shape changes, that layer is a convolution with a batch norm, and the table says so.",
        block_variants,
        lead_extremes,
    ),
)
