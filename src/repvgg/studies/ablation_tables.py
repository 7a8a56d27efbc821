"""Tables and chart of the ablations: accuracy over seeds next to the paper's, and the cost of a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from repvgg.studies.ablation_agreement import agreement_table, agreements, epoch_chart, epoch_table
from repvgg.studies.ablation_results import Results
from repvgg.studies.base import Outcome
from repvgg.studies.report.charts import Chart, draw_accuracies
from repvgg.studies.report.formatting import quantity
from repvgg.studies.tables import SPEED_COLUMNS, Column, Table, Value
from repvgg.studies.variants import FULL

#: Returns the result in a sentence.
Lead: TypeAlias = Callable[[Results], str]


def ablation_outcome(name: str, title: str, results: Results, lead: Lead) -> Outcome:
    """Return tables, chart and lead of the cells that exist."""
    drawn = [
        (variant.title, list(results.accuracy(variant.name).values.values()), variant.top1_percent)
        for variant in results.variants
    ]
    chart = Chart(
        name,
        "Accuracy of each row, a dot for each seed and a line at their mean, next to the paper's accuracies",
        partial(draw_accuracies, results=drawn),
    )
    epochs = epoch_table(name, results)
    tables = (
        _accuracy_table(name, title, results),
        *((agreement_table(name, results),) if agreements(results) else ()),
        *((epochs,) if epochs else ()),
        _cost_table(name, results),
        _cell_table(name, results),
    )
    curves = epoch_chart(name, results)
    text = lead(results) if results.accuracy(FULL).values else "The full block is not trained yet."
    return Outcome(text, tables, (chart, *((curves,) if curves else ())))


def lead_extremes(results: Results) -> str:
    """Name the variants furthest below and above the full block, with their spreads."""
    full = results.accuracy(FULL)
    deltas = {row.title: results.delta_to_full(row.name) for row in results.variants if row.name != FULL}
    ranked = sorted((spread.mean, title) for title, spread in deltas.items() if spread.mean is not None)
    start = f"The full block reaches {full} % over {quantity(len(full.values), 'seed')}"
    if not ranked:
        return start + "."
    lowest, highest = ranked[0][1], ranked[-1][1]
    return (
        f"{start}; furthest below it is {lowest} ({deltas[lowest]} points), furthest above or nearest {highest} "
        f"({deltas[highest]})."
    )


def lead_branches(results: Results) -> str:
    """Compare the value of the identity branch with that of the 1x1 branch, as Table 6 of the paper does."""
    identity, pointwise = results.delta_to_full("repvgg_no_identity"), results.delta_to_full("repvgg_no_pointwise")
    if not (identity.values and pointwise.values):
        return lead_extremes(results)
    return (
        f"Removing the identity changes the accuracy by {identity} points here (in the paper −1.99), removing the 1×1 "
        f"branch by {pointwise} (−0.35), both by {results.delta_to_full('conv_bn')} (−2.75)."
    )


def _accuracy_table(name: str, title: str, results: Results) -> Table:
    branches = any(variant.identity is not None for variant in results.variants)
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
    rows: list[tuple[Value, ...]] = []
    for variant in results.variants:
        accuracy, delta = results.accuracy(variant.name), results.delta_to_full(variant.name)
        deployed = [cell["deployed"] for cell in results.trained(variant.name)]
        same, images = (sum(one[key] for one in deployed) for key in ("same_answers", "images"))
        rows.append(
            (
                variant.title,
                *((variant.identity, variant.pointwise) if branches else ()),
                variant.top1_percent,
                results.paper_delta_to_full(variant),
                accuracy.mean,
                accuracy.deviation,
                len(deployed),
                delta.mean,
                delta.deviation,
                results.accuracy(variant.name, "deployed").mean,
                f"{same:,} of {images:,}" if deployed else None,
                all(one["is_plain"] for one in deployed) if deployed else None,
            )
        )
    return Table(name, title, columns, tuple(rows), tuple(_notes(results)))


def _notes(results: Results) -> list[str]:
    notes = [
        "Differences are between trainings with the same seed. The paper's accuracies are of RepVGG-B0 on ImageNet "
        "after 120 epochs."
    ]
    for variant in results.variants:
        cells = results.trained(variant.name)
        reasons = {cell["deployed"]["left"] for cell in cells} - {""}
        # The reason is the same in every layer and seed: one is enough.
        notes += [f"{variant.title} is not one convolution a layer: {reason}." for reason in sorted(reasons)[:1]]
        remarks = {remark for cell in cells for remark in cell.get("remarks", ())}
        notes += [f"{variant.title}: {remark}" for remark in sorted(remarks)]
        notes += [f"{variant.title}, seed {cell['seed']}: {cell['failed']}" for cell in results.failed(variant.name)]
    return notes


def _cost_table(name: str, results: Results) -> Table:
    columns = (
        Column("row", "Row"),
        replace(SPEED_COLUMNS[0], title="Training (images/s)"),
        *SPEED_COLUMNS[1:],
        Column("speed_up", "× full block", 2),
        Column("step_megabytes", "Memory of a step (MB)", 1),
        Column("parameters", "Parameters, trained"),
        Column("deployed_parameters", "collapsed"),
    )
    rows: list[tuple[Value, ...]] = []
    for variant in results.variants:
        first: Mapping[str, Any] = next(iter(results.trained(variant.name)), {})  # equal for all seeds
        rows.append(
            (
                variant.title,
                *results.speeds.cells(variant.name),
                results.speeds.speedup(variant.name, FULL),
                results.step_megabytes(variant.name),
                first.get("parameters"),
                first.get("deployed", {}).get("parameters"),
            )
        )
    return Table(f"{name}-cost", "What a training step costs", columns, tuple(rows), (results.speeds.extent,))


def _cell_table(name: str, results: Results) -> Table:
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
    rows = tuple(
        (
            variant.title,
            cell["seed"],
            cell["trained"]["top1_percent"],
            cell["deployed"]["top1_percent"],
            cell["deployed"]["same_answers"],
            float(f"{cell['deployed']['relative_error']:.1e}"),  # more digits of an error are noise
            cell["loss"],
            cell["seconds"],
            cell["images_per_second"],
        )
        for variant in results.variants
        for cell in results.trained(variant.name)
    )
    note = "Other work ran on the machines during trainings: for comparable times see the cost of a step."
    return Table(f"{name}-cells", "Every training", columns, rows, (note,))
