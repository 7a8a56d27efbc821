"""The trainings of ``repvgg study table8 --train``: small PSPNets on images with masks, over seeds.

A cell is one training of one row with one seed. Processes that share the folder lock the cell that they train.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from repvgg import __version__
from repvgg.data import DataConfig, SegmentationData, open_data
from repvgg.errors import OutputError, TrainingError, UsageError, did_you_mean
from repvgg.measure import environment
from repvgg.measure.settings import Device
from repvgg.models import PSPNETS, PSPNet, PSPNetSpec, form_of
from repvgg.studies.base import Outcome, ProgressReporter
from repvgg.studies.report.charts import Chart, draw_accuracies
from repvgg.studies.report.formatting import quantity
from repvgg.studies.store import Cell, CellStore, lock_holder, try_lock
from repvgg.studies.tables import Column, Table, Value
from repvgg.training import SegmentationEvaluation, TrainConfig, recipe_of, settle_precision
from repvgg.training.records import Record

# Names of repvgg.training that need Lightning are imported where they are used, so that listing the studies is fast.

RECIPE = "pspnet-small"
RUNS = "runs"  # folder of checkpoints, logs and locks
_NORMAL = "repvgg-a0"  # the row that others are compared with
_MAX_WARMUP = 0.2  # of all epochs: the recipe's warm-up may be longer than a short run


@dataclass(frozen=True)
class SmallNetwork:
    """A row of the table."""

    name: str  # in files, and for `--rows`
    title: str
    spec: PSPNetSpec


@dataclass(frozen=True)
class SmallTraining:
    """The settings of the trainings; see :class:`repvgg.studies.segmentation.SegmentationSettings`."""

    data: str | None
    init: str | None
    resnet_init: str | None
    seeds: int
    rows: tuple[str, ...]
    output_stride: Literal[8, 16]
    epochs: int | None
    batch: int | None
    lr: float | None
    crop: int | None
    precision: Literal["auto", "float32", "bf16", "fp16"] | None
    device: Device
    threads: int | None

    @property
    def networks(self) -> tuple[SmallNetwork, ...]:
        """The rows to train, in the order of the table.

        Raises:
            UsageError: there is no row of that name.
        """
        found = networks_at(self.output_stride)
        known = [network.name for network in found]
        for name in self.rows:
            if name not in known:
                advice = did_you_mean(name, known, f"choose one of {', '.join(known)}.")
                raise UsageError(f"The trainings have no row {name!r}: {advice}")
        return tuple(network for network in found if not self.rows or network.name in self.rows)

    @property
    def jobs(self) -> list[tuple[SmallNetwork, int]]:
        """All trainings, seed by seed, so that a table with one seed is complete as early as possible."""
        return [(network, seed) for seed in range(self.seeds) for network in self.networks]


def networks_at(output_stride: Literal[8, 16]) -> tuple[SmallNetwork, ...]:
    """Return the rows for a stride of the dilated feature maps.

    At stride 16 one stage is dilated, which has one layer in RepVGG-A0: "fast" equals "paper" there, and is left out.
    """
    ours = replace(PSPNETS["pspnet_small_repvgg_a0"], output_stride=output_stride)
    resnet = replace(PSPNETS["pspnet_small_resnet18"], output_stride=output_stride)
    rows = [
        SmallNetwork("repvgg-a0-stride32", "RepVGG-A0, stride 32", replace(ours, output_stride=32)),
        SmallNetwork("repvgg-a0-fast", "RepVGG-A0-fast", replace(ours, dilation="fast")),
        SmallNetwork(_NORMAL, "RepVGG-A0", ours),
        SmallNetwork("repvgg-a0-exact", "RepVGG-A0, exact", replace(ours, dilation="exact")),
        SmallNetwork("resnet18", "ResNet-18", resnet),
    ]
    return tuple(row for row in rows if output_stride == 8 or row.spec.dilation != "fast")


def resolve_training(training: SmallTraining) -> TrainConfig:
    """Return the configuration of every training, without model, seed and initial weights.

    Raises:
        UsageError: no data is named, it has no masks, or a setting does not fit.
    """
    if training.data is None:
        raise UsageError("There is nothing to train on: give images with masks, as in --data masks:PATH.")
    assert training.networks  # refuses unknown rows
    recipe = recipe_of(RECIPE)
    epochs, optim = training.epochs or recipe.epochs, recipe.optim
    if training.lr is not None:
        optim = replace(optim, lr=training.lr, lr_batch=None)  # lr_batch would scale it with the batch
    config = replace(
        recipe,
        model="",
        epochs=epochs,
        batch_size=training.batch or recipe.batch_size,
        data=replace(recipe.data, uri=training.data, train_size=training.crop or recipe.data.train_size),
        optim=replace(optim, warmup_epochs=min(optim.warmup_epochs, _MAX_WARMUP * epochs)),
        precision=training.precision or recipe.precision,
        threads=training.threads,
        accelerator="cpu" if training.device == "cpu" else "auto",
        dry_run=False,
    )
    _open(config.data, 0)
    return settle_precision(config)[0]


@lru_cache(maxsize=1)  # jobs with the same seed follow each other
def _open(config: DataConfig, seed: int) -> SegmentationData:
    data = open_data(config, seed=seed)
    if not isinstance(data, SegmentationData):
        raise UsageError(f"{config.uri!r} has no masks: give images with masks, as in --data masks:PATH.")
    return data


def train_missing(training: SmallTraining, store: CellStore, reporter: ProgressReporter) -> None:
    """Train the jobs that have no cell and that no other process trains.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; the training continues from its last checkpoint next time.
        RepvggError: see :func:`train_cell`.
    """
    config, jobs = resolve_training(training), training.jobs
    for network, seed in jobs:
        key = _key(network, seed)
        if not store.refresh(key):
            store.create()  # before the lock: the header is the first file in the folder
            with try_lock(_lock(store, key)) as lock:
                if not lock.acquired:
                    reporter.message(f"{key}: left to {lock.holder}")
                elif not store.refresh(key):  # another process may have finished it before we got the lock
                    init = training.resnet_init if network.name == "resnet18" else training.init
                    cell = _train(network, replace(config, seed=seed, init=init), store.folder / RUNS / key)
                    store.put(key, cell)
                    reporter.message(f"{key}: {_summary(cell)}")
        reporter(sum(store.refresh(_key(*job)) for job in jobs), len(jobs))


def missing_trainings(training: SmallTraining, store: CellStore) -> str:
    """Return which trainings are left to other processes, in a sentence; empty if there are none."""
    missing = [key for job in training.jobs if not store.refresh(key := _key(*job))]
    if not missing:
        return ""
    holders = [(key, lock_holder(_lock(store, key))) for key in missing]
    running = ", ".join(f"{key} by {holder}" for key, holder in holders if holder is not None)
    return f"{len(missing)} of {len(training.jobs)} trainings are missing" + (
        f"; at work: {running}." if running else "."
    )


def _key(network: SmallNetwork, seed: int) -> str:
    return f"{network.name}-seed{seed}"


def _lock(store: CellStore, key: str) -> Path:
    return store.folder / RUNS / f"{key}.lock"


def _train(network: SmallNetwork, config: TrainConfig, folder: Path) -> Cell:
    from repvgg.training import Terminated  # needs Lightning, which listing the studies does not

    try:
        return train_cell(network, config, folder)
    except TrainingError as error:  # a diverged loss is a result
        return {"row": network.name, "seed": config.seed, "failed": str(error)}
    except Terminated:
        raise KeyboardInterrupt from None


def train_cell(network: SmallNetwork, config: TrainConfig, folder: Path) -> Cell:
    """Train, collapse and evaluate in a folder, from its last checkpoint if there is one; write the log there.

    Raises:
        RepvggError: see :func:`repvgg.training.fit`, and :func:`repvgg.training.build_initial_model` for the initial
            weights.
        EquivalenceError: the collapsed network does not equal the trained one.
        Terminated: SIGTERM arrived, and the run has saved its checkpoint.
    """
    from repvgg.training import (
        LAST_CHECKPOINT,
        build_initial_model,
        collapse_segmentation,
        fit,
        write_log,
    )

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be created: {error.strerror or error}.") from error
    data = _open(config.data, config.seed)
    initial = build_initial_model(config, data, network.spec)
    assert isinstance(initial.model, PSPNet)

    def log(history: Sequence[Record], weights: Mapping[str, Tensor]) -> None:
        write_log(folder, history)

    result = fit(initial.model, data, config, folder=folder, resume=True, progress=False, on_epoch=log)
    collapsed = collapse_segmentation(initial.model, data, config)
    seconds = sum(record.seconds for record in result.history)
    speeds = [record.images_per_second for record in result.history]
    cell: dict[str, Any] = {
        "row": network.name,
        "seed": config.seed,
        "trained": _numbers(collapsed.train),
        "deployed": {
            **_numbers(collapsed.plain),
            "same_pixels": collapsed.agreement.same,
            "all_pixels": collapsed.agreement.pixels,
            "different_in_float64": collapsed.agreement.different_in_float64,
            "relative_error": collapsed.evidence.relative,
            "tolerance": collapsed.evidence.tolerance,
            "parameters": _num_parameters(collapsed.model),
            "is_plain": form_of(collapsed.model) == "plain",
        },
        "classes": list(data.classes),
        "loss": result.history[-1].loss,
        "epochs": len(result.history),
        "seconds": seconds,
        "images_per_second": statistics.fmean(speeds),
        "parameters": _num_parameters(initial.model),
        "spec": asdict(network.spec),
        "version": __version__,
        "environment": environment(),
        "remarks": [*initial.notes, *data.notes],
    }
    (folder / LAST_CHECKPOINT).unlink(missing_ok=True)  # nothing to resume: the cell replaces the checkpoint
    return cell


def _numbers(result: SegmentationEvaluation) -> dict[str, Any]:
    found = result.to_dict()
    return {name: found[name] for name in ("miou", "mean_accuracy", "pixel_accuracy", "iou", "images", "pixels")}


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _summary(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return str(cell["failed"])
    deployed = cell["deployed"]
    same = f"the plain form predicts the same class in {deployed['same_pixels']:,} of {deployed['all_pixels']:,} pixels"
    return f"mIoU {100 * cell['trained']['miou']:.2f} %, {same}, {cell['seconds'] / 60:.1f} minutes"


# Tables:


@dataclass(frozen=True)
class _Results:
    training: SmallTraining
    values: Mapping[str, Cell]

    def trained(self, name: str) -> list[Cell]:
        """Return the cells of a row whose training finished, by seed."""
        keys = (f"{name}-seed{seed}" for seed in range(self.training.seeds))
        return [cell for key in keys if (cell := self.values.get(key)) is not None and "failed" not in cell]

    def percents(self, name: str, metric: str, form: str = "trained") -> dict[int, float]:
        """Return a metric in percent by seed."""
        return {int(cell["seed"]): 100 * float(cell[form][metric]) for cell in self.trained(name)}

    def above_normal(self, name: str) -> list[float]:
        """Return the mIoU minus that of the normal network with the same seed, in points."""
        own, normal = self.percents(name, "miou"), self.percents(_NORMAL, "miou")
        return [own[seed] - normal[seed] for seed in own if seed in normal]


def training_outcome(training: SmallTraining, values: Mapping[str, Cell]) -> Outcome:
    """Return tables, chart and lead of the cells that exist."""
    results = _Results(training, values)
    drawn = [
        (network.title, list(results.percents(network.name, "miou").values()), None) for network in training.networks
    ]
    chart = Chart(
        "table8-training",
        "Mean IoU of each row, a dot for each seed and a line at their mean",
        partial(draw_accuracies, results=drawn, metric="mIoU"),
    )
    return Outcome(_lead(results), (_miou_table(results), _class_table(results), _cell_table(results)), (chart,))


def _lead(results: _Results) -> str:
    parts = [
        f"{network.title} {statistics.fmean(found):.2f}{_plus_minus(found)} %"
        for network in results.training.networks
        if (found := list(results.percents(network.name, "miou").values()))
    ]
    if not parts:
        return "Nothing is trained yet."
    return f"Mean IoU on the validation images, over {quantity(results.training.seeds, 'seed')}: {', '.join(parts)}."


def _plus_minus(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _miou_table(results: _Results) -> Table:
    columns = (
        Column("row", "Backbone"),
        Column("output_stride", "Stride"),
        Column("dilation", "Rule of dilation"),
        Column("miou_percent", "mIoU (%)", 2),
        Column("miou_deviation", "± over seeds", 2),
        Column("seeds", "Seeds"),
        Column("difference", "difference from RepVGG-A0", 2),
        Column("difference_deviation", "± over seeds", 2),
        Column("pixel_accuracy_percent", "Pixel acc. (%)", 2),
        Column("mean_accuracy_percent", "Mean acc. (%)", 2),
        Column("deployed_miou_percent", "mIoU collapsed (%)", 2),
        Column("same_pixels", "same class when collapsed (pixels)"),
        Column("parameters", "Parameters, trained"),
        Column("deployed_parameters", "collapsed"),
    )
    rows: list[tuple[Value, ...]] = []
    for network in results.training.networks:
        cells = results.trained(network.name)
        miou = list(results.percents(network.name, "miou").values())
        difference = results.above_normal(network.name)
        same, pixels = (sum(cell["deployed"][key] for cell in cells) for key in ("same_pixels", "all_pixels"))
        first: Mapping[str, Any] = next(iter(cells), {})
        rows.append(
            (
                network.title,
                network.spec.output_stride,
                "none" if network.spec.output_stride == 32 else network.spec.dilation,
                _mean(miou),
                _deviation(miou),
                len(cells),
                _mean(difference),
                _deviation(difference),
                *(
                    _mean(list(results.percents(network.name, metric).values()))
                    for metric in ("pixel_accuracy", "mean_accuracy")
                ),
                _mean(list(results.percents(network.name, "miou", "deployed").values())),
                f"{same:,} of {pixels:,}" if cells else None,
                first.get("parameters"),
                first.get("deployed", {}).get("parameters"),
            )
        )
    return Table("table8-training", "Mean IoU of small networks", columns, tuple(rows), tuple(_notes(results)))


def _notes(results: _Results) -> list[str]:
    training = results.training
    notes = [
        "Whole images, in one pass; classes that are in neither truth nor prediction are left out of the mean. "
        "Differences are between trainings with the same seed. The weights of the last epoch count.",
        f"Backbones of RepVGG start from {training.init or 'random weights'}, those of ResNet-18 from "
        f"{training.resnet_init or 'random weights'}.",
    ]
    for network in training.networks:
        keys = [_key(network, seed) for seed in range(training.seeds)]
        failed = [cell for key in keys if "failed" in (cell := results.values.get(key, {}))]
        notes += [f"{network.title}, seed {cell['seed']}: {cell['failed']}" for cell in failed]
    return notes


def _class_table(results: _Results) -> Table:
    """IoU per class, the mean over the seeds in which the class occurs."""
    trained = {network: results.trained(network.name) for network in results.training.networks}
    classes: list[str] = next((list(cells[0]["classes"]) for cells in trained.values() if cells), [])
    columns = (
        Column("class", "IoU (%) of class"),
        *(Column(network.name.replace("-", "_"), network.title, 2) for network in trained),
    )
    rows: list[tuple[Value, ...]] = []
    for index, name in enumerate(classes):
        found = [[cell["trained"]["iou"][index] for cell in cells] for cells in trained.values()]
        rows.append((name, *(_mean([100 * value for value in one if value is not None]) for one in found)))
    return Table("table8-classes", "IoU of each class, mean over seeds", columns, tuple(rows))


def _cell_table(results: _Results) -> Table:
    columns = (
        Column("row", "Backbone"),
        Column("seed", "Seed"),
        Column("miou_percent", "mIoU (%)", 2),
        Column("deployed_miou_percent", "collapsed (%)", 2),
        Column("relative_error", "error collapsed"),
        Column("loss", "Loss of the last epoch", 4),
        Column("minutes", "minutes", 1),
        Column("images_per_second", "images/s", 2),
    )
    rows = tuple(
        (
            network.title,
            cell["seed"],
            100 * cell["trained"]["miou"],
            100 * cell["deployed"]["miou"],
            float(f"{cell['deployed']['relative_error']:.1e}"),  # more digits of an error are noise
            cell["loss"],
            cell["seconds"] / 60,
            cell["images_per_second"],
        )
        for network in results.training.networks
        for cell in results.trained(network.name)
    )
    return Table("table8-cells", "Every training", columns, rows)
