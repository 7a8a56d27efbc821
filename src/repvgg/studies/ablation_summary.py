"""What trainings say together: over seeds, beside the paper's column, and what a training step costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

from repvgg.studies.cells import Cell
from repvgg.studies.contenders import FULL, Contender
from repvgg.studies.report.charts import Chart, draw_accuracies
from repvgg.studies.report.formatting import quantity
from repvgg.studies.speeds import Speeds
from repvgg.studies.study import Outcome
from repvgg.studies.tables import Column, Table, Value
from repvgg.studies.training_cost import MEMORY

_SEED = "-seed"


@dataclass(frozen=True)
class Spread:
    """Numbers of one kind over seeds.

    Attributes:
        values: by seed.
    """

    values: Mapping[int, float]

    @property
    def mean(self) -> float | None:
        """Over the seeds; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None of fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def less(self, other: Spread) -> Spread:
        """The differences, seed by seed, where both have the seed."""
        return Spread({seed: self.values[seed] - other.values[seed] for seed in self.values if seed in other.values})

    def __str__(self) -> str:
        if self.mean is None:
            return "nothing"
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}".replace("-", "−")


@dataclass(frozen=True, eq=False)
class Results:
    """All cells of a study that trains, whatever is there.

    Attributes:
        contenders: rows of the table.
        values: the cells by their keys.
        batch: images of a training step.
    """

    contenders: tuple[Contender, ...]
    values: Mapping[str, Cell]
    batch: int

    def trained(self, name: str) -> list[Cell]:
        """The cells of a row that came to an end, by seed."""
        found = [value for key, value in self.values.items() if key.startswith(name + _SEED) and "failed" not in value]
        return sorted(found, key=lambda cell: int(cell["seed"]))

    def failed(self, name: str) -> list[Cell]:
        """The others, whose loss became infinite."""
        return [value for key, value in self.values.items() if key.startswith(name + _SEED) and "failed" in value]

    def accuracy(self, name: str, form: str = "trained") -> Spread:
        """Top-1 in percent, as trained or as deployed."""
        return Spread({int(cell["seed"]): float(cell[form]["top1_percent"]) for cell in self.trained(name)})

    def behind(self, name: str) -> Spread:
        """How many points a row is above the full block, seed by seed."""
        return self.accuracy(name).less(self.accuracy(FULL))

    @property
    def most_trained(self) -> int:
        """Seeds of the row that has most of them."""
        return max((len(self.trained(row.name)) for row in self.contenders), default=0)

    @cached_property
    def speeds(self) -> Speeds:
        """Of training steps."""
        return Speeds.of(self.values, self.batch)

    def memory(self, name: str) -> float | None:
        """Of a training step, in MB."""
        found = self.values.get(MEMORY, {}).get(name)
        return None if found is None else found / 1e6

    def paper_behind(self, row: Contender) -> float | None:
        """How many points the paper has a row above its full block."""
        full = next((other.top1_percent for other in self.contenders if other.name == FULL), None)
        return None if full is None or row.top1_percent is None else row.top1_percent - full


#: What came out, in a sentence.
Lead: TypeAlias = Callable[[Results], str]


def outcome_of(name: str, title: str, results: Results, lead: Lead) -> Outcome:
    """Tables, pictures and a sentence, of whatever there is."""
    words = "Accuracy of each row, a dot for each seed and a line at their mean; the paper's accuracies beside it"
    picture = Chart(name, words, partial(draw_accuracies, results=_drawn(results)))
    tables = (_accuracies(name, title, results), _costs(name, results), _cells(name, results))
    said = lead(results) if results.accuracy(FULL).values else "The full block is not trained yet."
    return Outcome(said, tables, (picture,))


def _accuracies(name: str, title: str, results: Results) -> Table:
    branches = any(row.identity is not None for row in results.contenders)
    columns = (
        Column("row", "Row"),
        *((Column("identity", "Identity branch"), Column("pointwise", "1×1 branch")) if branches else ()),
        Column("paper_top1_percent", "Accuracy, paper (%)", 2),
        Column("paper_difference", "to the full block, paper", 2),
        Column("top1_percent", "Accuracy here (%)", 2),
        Column("top1_deviation", "± over seeds", 2),
        Column("seeds", "Seeds"),
        Column("difference", "to the full block here", 2),
        Column("difference_deviation", "± over seeds", 2),
        Column("deployed_top1_percent", "collapsed (%)", 2),
        Column("same_answers", "same answers collapsed"),
        Column("is_plain", "one convolution a layer"),
    )
    rows = tuple(_accuracy(row, results, branches) for row in results.contenders)
    return Table(name, title, columns, rows, tuple(_notes(results)))


def _accuracy(row: Contender, results: Results, branches: bool) -> tuple[Value, ...]:
    trained, behind = results.accuracy(row.name), results.behind(row.name)
    cells = results.trained(row.name)
    return (
        row.title,
        *((row.identity, row.pointwise) if branches else ()),
        row.top1_percent,
        results.paper_behind(row),
        trained.mean,
        trained.deviation,
        len(cells),
        behind.mean,
        behind.deviation,
        results.accuracy(row.name, "deployed").mean,
        _same(cells),
        all(cell["deployed"]["is_plain"] for cell in cells) if cells else None,
    )


def _same(cells: Sequence[Cell]) -> str | None:
    """How many answers of all seeds collapsing left as they were."""
    if not cells:
        return None
    same, images = (sum(cell["deployed"][name] for cell in cells) for name in ("same_answers", "images"))
    return f"{same:,} of {images:,}"


def _notes(results: Results) -> list[str]:
    notes = [
        "Differences are taken seed by seed. The paper's accuracies are of RepVGG-B0 on ImageNet after 120 epochs."
    ]
    for row in results.contenders:
        reasons = {cell["deployed"]["left"] for cell in results.trained(row.name)} - {""}
        notes += [f"{row.title} is not one convolution a layer: {reason}." for reason in sorted(reasons)[:1]]
        remarks = {remark for cell in results.trained(row.name) for remark in cell.get("remarks", ())}
        notes += [f"{row.title}: {remark}" for remark in sorted(remarks)]
        notes += [f"{row.title}, seed {cell['seed']}: {cell['failed']}" for cell in results.failed(row.name)]
    return notes


def _costs(name: str, results: Results) -> Table:
    columns = (
        Column("row", "Row"),
        Column("images_per_second", "Training (images/s)", 1),
        Column("images_per_second_q1", "lower quartile", 1),
        Column("images_per_second_q3", "upper quartile", 1),
        Column("speed_up", "× full block", 2),
        Column("step_megabytes", "Memory of a step (MB)", 1),
        Column("parameters", "Parameters, trained"),
        Column("deployed_parameters", "collapsed"),
    )
    rows = tuple(_cost(row, results) for row in results.contenders)
    return Table(f"{name}-cost", "What a training step costs", columns, rows, (results.speeds.extent,))


def _cost(row: Contender, results: Results) -> tuple[Value, ...]:
    faster = results.speeds.ratio(row.name, FULL)
    first: Mapping[str, Any] = next(iter(results.trained(row.name)), {})
    return (
        row.title,
        results.speeds.images_per_second(row.name),
        *results.speeds.quartiles(row.name),
        faster.median if faster else None,
        results.memory(row.name),
        first.get("parameters"),
        first.get("deployed", {}).get("parameters"),
    )


def _cells(name: str, results: Results) -> Table:
    columns = (
        Column("row", "Row"),
        Column("seed", "Seed"),
        Column("top1_percent", "Accuracy (%)", 2),
        Column("deployed_top1_percent", "collapsed (%)", 2),
        Column("same_answers", "same answers"),
        Column("relative_error", "relative error of the logits"),
        Column("loss", "training loss", 3),
        Column("seconds", "seconds", 0),
        Column("images_per_second", "images/s", 0),
    )
    rows = tuple(_cell(row, cell) for row in results.contenders for cell in results.trained(row.name))
    note = "Times of trainings are those of machines that did other things, too; see the cost of a step."
    return Table(f"{name}-cells", "Every training", columns, rows, (note,))


def _cell(row: Contender, cell: Cell) -> tuple[Value, ...]:
    deployed = cell["deployed"]
    return (
        row.title,
        cell["seed"],
        cell["trained"]["top1_percent"],
        deployed["top1_percent"],
        deployed["same_answers"],
        float(f"{deployed['relative_error']:.1e}"),
        cell["loss"],
        cell["seconds"],
        cell["images_per_second"],
    )


def _drawn(results: Results) -> list[tuple[str, list[float], float | None]]:
    """Title, accuracies by seed, and the paper's, of each row."""
    return [
        (row.title, list(results.accuracy(row.name).values.values()), row.top1_percent) for row in results.contenders
    ]


def largest_losses(results: Results) -> str:
    """The row that is furthest below the full block, and the one that is furthest above, with their spread."""
    full = results.accuracy(FULL)
    behind = {row.title: results.behind(row.name) for row in results.contenders if row.name != FULL}
    ranked = sorted((spread.mean, title) for title, spread in behind.items() if spread.mean is not None)
    start = f"The full block reaches {full} % over {quantity(len(full.values), 'seed')}"
    if not ranked:
        return start + "."
    lowest, highest = ranked[0][1], ranked[-1][1]
    return (
        f"{start}; furthest below it is {lowest} ({behind[lowest]} points), furthest above or nearest {highest} "
        f"({behind[highest]})."
    )
