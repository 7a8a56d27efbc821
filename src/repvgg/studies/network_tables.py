"""Tables 4 and 5 as studies: the paper's columns beside what was measured here, and the pairs that it compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from repvgg.measure import Ratio
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.count_table import COUNTS, count_table, counted, counts_of
from repvgg.studies.networks import (
    PAIRS,
    NetworkSettings,
    is_ours,
    measure_table,
    resolved,
    speeds_of,
    taking_part,
    title_of,
)
from repvgg.studies.paper import PrintedModel
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.report.formatting import quantity
from repvgg.studies.speeds import Speeds
from repvgg.studies.study import OnProgress, Outcome, Study
from repvgg.studies.tables import Column, Table, Value

_ABOUT = (
    "All networks are timed interleaved: every round takes the time of each once, and starts with the next one. Speeds "
    "are medians over the rounds; ratios are taken within rounds, so that a slow spell of the machine cancels. Where "
    "the weights of all do not fit into half of the free memory, each pair is timed on its own, with the baseline of "
    "the table beside it, and ratios are those within its rounds.\n\n"
    "Ours run in the plain form. Batch norms of the others are folded, as in the paper (§4.1). Weights are random: "
    "speed does not hang on them. The paper's speeds are those of a GTX 1080 Ti at a batch of 128 in float32; they are "
    "no measure of this machine, but their ratios are what it claims."
)


def network_study(name: str, title: str, table: Sequence[PrintedModel], baseline: str, gmacs_on_cpu: float) -> Study:
    """A study over the rows of a table.

    Args:
        name: of the study.
        title: in a line.
        table: what the paper printed.
        baseline: the row that speeds are compared with.
        gmacs_on_cpu: the largest networks that take part on a CPU unless somebody says otherwise, in 10⁹.
    """
    return Study(
        name=name,
        title=title,
        about=_ABOUT,
        settings=NetworkSettings,
        resolve=partial(resolved, gmacs_on_cpu=gmacs_on_cpu),
        measure=partial(_measure, name, table, baseline),
        outcome=partial(_outcome, name, table, baseline),
    )


def _measure(
    name: str,
    table: Sequence[PrintedModel],
    baseline: str,
    settings: NetworkSettings,
    cells: Cells,
    on_progress: OnProgress,
) -> None:
    """Count first, which takes seconds, then time."""
    if COUNTS not in cells:
        cells.put(COUNTS, counted(name, [row.model for row in taking_part(table, settings)]))
    measure_table(table, baseline)(settings, cells, on_progress)


def _outcome(
    name: str,
    printed: Sequence[PrintedModel],
    baseline: str,
    settings: NetworkSettings,
    values: Mapping[str, Cell],
) -> Outcome:
    rows = taking_part(printed, settings)
    speeds = speeds_of(settings, values)
    pairs = [pair for pair in PAIRS if set(pair) <= {row.model for row in rows}]
    counts = values.get(COUNTS, {})
    tables = [_speed_table(name, rows, baseline, speeds, counts, len(printed) - len(rows))]
    pictures = [_speed_picture(name, rows, speeds)]
    if pairs:
        tables.append(_pair_table(name, pairs, printed, speeds))
        pictures.insert(0, _pair_picture(name, pairs, printed, speeds))
    return Outcome(_lead(pairs, speeds), (*tables, count_table(name, rows, counts)), tuple(pictures))


def _lead(pairs: Sequence[tuple[str, str]], speeds: Speeds) -> str:
    found = [ratio for pair in pairs if (ratio := speeds.ratio(*pair))]
    if not found:
        return f"{speeds.extent} No pair that the paper compares was measured."
    faster, slower = sum(ratio.q1 > 1 for ratio in found), sum(ratio.q3 < 1 for ratio in found)
    counts = {"clearly faster": faster, "clearly slower": slower, "neither": len(found) - faster - slower}
    words = ", ".join(f"{what} in {number}" for what, number in counts.items() if number)
    return f"Of {quantity(len(found), 'pair')} that the paper compares, RepVGG is {words} on this machine."


def _speed_table(
    name: str,
    rows: Sequence[PrintedModel],
    baseline: str,
    speeds: Speeds,
    counts: Cell,
    left_out: int,
) -> Table:
    columns = (
        Column("model", "Model"),
        Column("paper_top1_percent", "Top-1, paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 0),
        Column("images_per_second", "Speed here (images/s)", 1),
        Column("images_per_second_q1", "lower quartile", 1),
        Column("images_per_second_q3", "upper quartile", 1),
        Column("paper_speed_up", f"× {title_of(baseline)}, paper", 2),
        Column("speed_up", f"× {title_of(baseline)} here", 2),
        Column("params_millions", "Params (M)", 2),
        Column("flops_billions", "Theo FLOPs (B)", 1),
        Column("winograd_muls_billions", "Wino MULs (B)", 1),
    )
    speed_of_baseline = next((row.images_per_second for row in rows if row.model == baseline), None)
    notes = [f"{speeds.extent} Parameters and arithmetic as counted here."]
    if left_out:
        notes.append(f"{left_out} larger networks of the paper's table were left out: see max_gmacs below.")
    return Table(
        name,
        "Speed, beside what the paper prints",
        columns,
        tuple(_speed_row(row, baseline, speed_of_baseline, speeds, counts) for row in rows),
        tuple(notes),
    )


def _speed_row(
    row: PrintedModel, baseline: str, speed_of_baseline: float | None, speeds: Speeds, counts: Cell
) -> tuple[Value, ...]:
    faster = speeds.ratio(row.model, baseline)
    return (
        title_of(row.model),
        row.top1_percent,
        row.images_per_second,
        speeds.images_per_second(row.model),
        *speeds.quartiles(row.model),
        row.images_per_second / speed_of_baseline if speed_of_baseline else None,
        faster.median if faster else None,
        *counts_of(row.model, counts),
    )


def _pair_table(name: str, pairs: Sequence[tuple[str, str]], printed: Sequence[PrintedModel], speeds: Speeds) -> Table:
    columns = (
        Column("model", "Model"),
        Column("compared_with", "compared with"),
        Column("paper_ratio", "times as fast, paper", 2),
        Column("ratio", "times as fast here", 2),
        Column("ratio_q1", "lower quartile", 2),
        Column("ratio_q3", "upper quartile", 2),
    )
    rows = []
    for one, other in pairs:
        spread: tuple[Value, ...] = _spread(speeds.ratio(one, other))
        rows.append((title_of(one), title_of(other), _paper_ratio(one, other, printed), *spread))
    return Table(f"{name}-pairs", "The comparisons that the paper makes", columns, tuple(rows))


def _spread(ratio: Ratio | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if ratio is None else (ratio.median, ratio.q1, ratio.q3)


def _paper_ratio(one: str, other: str, printed: Sequence[PrintedModel]) -> float:
    speed = {row.model: row.images_per_second for row in printed}
    return speed[one] / speed[other]


def _pair_picture(
    name: str, pairs: Sequence[tuple[str, str]], printed: Sequence[PrintedModel], speeds: Speeds
) -> Chart:
    bars = []
    for one, other in pairs:
        ratio = speeds.ratio(one, other)
        label = f"{title_of(one)}\nvs {title_of(other)}"
        bars.append(Bar(label, ratio.median if ratio else None, _paper_ratio(one, other, printed)))
    draw = partial(
        draw_bars, title="How many times as fast as its baseline?", unit="times as fast", bars=bars, line_at=1.0
    )
    return Chart(f"{name}-pairs", "How many times as fast as its baseline each RepVGG is, here and in the paper", draw)


def _speed_picture(name: str, rows: Sequence[PrintedModel], speeds: Speeds) -> Chart:
    bars = [_speed_bar(row.model, speeds) for row in rows]
    draw: Any = partial(draw_bars, title="Speed on this machine", unit="images per second", bars=bars)
    return Chart(f"{name}-speed", "Images per second of each network on this machine", draw)


def _speed_bar(model: str, speeds: Speeds) -> Bar:
    speed = speeds.images_per_second(model)
    text = speed if isinstance(speed, str) else "not measured" if speed is None else f"{speed:,.1f}"
    return Bar(title_of(model), None if isinstance(speed, str) else speed, text=text, ours=is_ours(model))
