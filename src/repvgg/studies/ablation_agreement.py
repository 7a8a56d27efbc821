"""Whether an ablation agrees with the paper: row by row, in the order of rows, and against the number of epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

from repvgg.studies.ablation_results import Results, Spread
from repvgg.studies.report.charts import Chart, Curve, draw_curves
from repvgg.studies.tables import Column, Table, Value
from repvgg.studies.variants import FULL

#: 97.5 % quantiles of Student's t distribution for 1, 2, … degrees of freedom.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_T_LIMIT = 1.960  # with more degrees of freedom than above, a little too narrow: 2.23 for ten
_BUDGETS = (0.1, 0.25, 0.5, 1.0)  # shares of the epochs in the table


def confidence_half_width(spread: Spread) -> float | None:
    """Return half of the 95 % confidence interval of a mean over seeds; None for fewer than two seeds.

    ``t · s / √n``, with s the sample standard deviation: normally distributed accuracies are assumed.
    """
    count = len(spread.values)
    if spread.deviation is None:
        return None
    t = _T_QUANTILES[count - 2] if count - 2 < len(_T_QUANTILES) else _T_LIMIT
    return t * spread.deviation / math.sqrt(count)


@dataclass(frozen=True)
class Agreement:
    """The difference of one row to the full block, here and in the paper, in points."""

    paper: float
    here: Spread

    @property
    def verdict(self) -> str:
        """Whether the signs agree, or the interval of the difference here contains zero."""
        mean, half = self.here.mean, confidence_half_width(self.here)
        if mean is None:
            return "not trained"
        if half is None:
            return "one seed"
        if abs(mean) <= half:
            return "not told apart"
        return "agrees" if (mean > 0) == (self.paper > 0) else "contradicts"


def agreements(results: Results) -> dict[str, Agreement]:
    """Return the agreement of each row by name, but of the full block, and of rows that the paper does not print."""
    found = {}
    for variant in results.variants:
        paper = results.paper_delta_to_full(variant)
        if paper is not None and variant.name != FULL:
            found[variant.name] = Agreement(paper, results.delta_to_full(variant.name))
    return found


def rank_agreement(pairs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    """Return how many pairs of rows are in the same order in both values, and how many pairs there are.

    Pairs that are equal in one of the values are not counted.
    """
    products = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum(product > 0 for product in products), sum(product != 0 for product in products)


def agreement_table(name: str, results: Results) -> Table:
    """Return the table that compares each row with the paper."""
    columns = (
        Column("row", "Row"),
        Column("paper_difference", "to the full block, paper", 2),
        Column("difference", "to the full block here", 2),
        Column("half_width", "± 95 % interval", 2),
        Column("verdict", "agreement"),
    )
    titles = {variant.name: variant.title for variant in results.variants}
    found = agreements(results)
    rows: list[tuple[Value, ...]] = [
        (titles[name], one.paper, one.here.mean, confidence_half_width(one.here), one.verdict)
        for name, one in found.items()
    ]
    notes = [
        'Points of top-1 accuracy. "not told apart": the 95 % confidence interval of the difference over seeds '
        "(Student's t, differences seed by seed) contains zero."
    ]
    means = [(variant.top1_percent, results.accuracy(variant.name).mean) for variant in results.variants]
    same, total = rank_agreement([(paper, here) for paper, here in means if paper is not None and here is not None])
    if total:
        notes.append(f"{same} of {total} pairs of rows are in the paper's order.")
    return Table(f"{name}-agreement", "Agreement with the paper", columns, tuple(rows), tuple(notes))


def accuracy_by_epoch(results: Results, name: str) -> list[float]:
    """Return the mean accuracy over seeds after each epoch, in percent; empty for cells that did not record it."""
    histories = [cell["top1_percent_by_epoch"] for cell in results.trained(name) if "top1_percent_by_epoch" in cell]
    return [sum(values) / len(values) for values in zip(*histories, strict=False)]


def epoch_table(name: str, results: Results) -> Table | None:
    """Return the differences to the full block after parts of the training; None if no cell recorded them."""
    curves = {variant.name: accuracy_by_epoch(results, variant.name) for variant in results.variants}
    full = curves.get(FULL, [])
    if len(full) < 2:
        return None
    epochs = sorted({max(1, round(share * len(full))) for share in _BUDGETS})
    columns = (
        Column("row", "Row"),
        *(Column(f"epoch_{epoch}", f"after epoch {epoch}", 2) for epoch in epochs),
    )
    rows: list[tuple[Value, ...]] = [
        (
            variant.title,
            *(
                curves[variant.name][epoch - 1] - (0.0 if variant.name == FULL else full[epoch - 1])
                if len(curves[variant.name]) >= epoch
                else None
                for epoch in epochs
            ),
        )
        for variant in results.variants
    ]
    note = (
        "Accuracy of the full block in percent; of the other rows the difference to it in points; means over seeds. "
        "The learning rate falls over the whole training, so an early epoch is not a short training."
    )
    return Table(f"{name}-epochs", "Accuracy against epochs", columns, tuple(rows), (note,))


def epoch_chart(name: str, results: Results) -> Chart | None:
    """Return the chart of the accuracies after each epoch; None if no cell recorded them."""
    curves: Mapping[str, list[float]] = {
        variant.title: accuracy_by_epoch(results, variant.name) for variant in results.variants
    }
    drawn = [Curve(title, values) for title, values in curves.items() if len(values) > 1]
    if not drawn:
        return None
    draw = partial(draw_curves, curves=drawn, x_label="epoch", y_label="top-1 accuracy (%)")
    return Chart(f"{name}-epochs", "Accuracy of each row after each epoch, mean over seeds", draw)
