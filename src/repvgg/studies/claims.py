"""The paper's claims on speed, "a RepVGG is so many times as fast as another network", in one engine or in several.

The paper times all networks in one runtime, cuDNN on a GPU. On a CPU a user takes the fastest runtime of each network,
which need not be the same for a plain stack of 3x3 convolutions and for its competitors. So with several engines a
claim is compared with both networks in the same engine; with each in its fastest; and, where that differs, with the
plain network in this library's engine against the other network in the best engine but ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from repvgg.measure import Ratio
from repvgg.studies.counts import title_of
from repvgg.studies.engine_speed import candidate_name, fastest_engine
from repvgg.studies.report.charts import Bar, Chart, RatioRow, draw_bars, draw_ratios
from repvgg.studies.report.formatting import quantity
from repvgg.studies.tables import RATIO_COLUMNS, Column, Table, Value
from repvgg.studies.timing import Speeds

#: How many times as fast the first network is in the paper, by the names of both.
Claims: TypeAlias = Mapping[tuple[str, str], float]

OURS = ("repvgg", "repvgg-searched")  # this library's engine
EACH_FASTEST = "each in its fastest"

HOLDS, LESS, OPEN, FAILS = VERDICTS = ("holds", "faster, but by less", "undecided", "does not hold")


def pair_lead(pairs: Sequence[tuple[str, str]], speeds: Speeds) -> str:
    """Return in how many of these pairs the first network is faster, in a sentence."""
    found = [ratio for pair in pairs if (ratio := speeds.ratio(*pair))]
    if not found:
        return f"{speeds.extent} No pair that the paper compares was measured."
    # "Clearly": all but a quarter of the rounds agree.
    faster, slower = sum(ratio.q1 > 1 for ratio in found), sum(ratio.q3 < 1 for ratio in found)
    counts = {"clearly faster": faster, "clearly slower": slower, "neither": len(found) - faster - slower}
    words = ", ".join(f"{what} in {number}" for what, number in counts.items() if number)
    return f"Of {quantity(len(found), 'pair')} that the paper compares, RepVGG is {words} on this machine."


def pair_table(name: str, claims: Claims, speeds: Speeds) -> Table:
    """Return a row for each claim, of networks in one engine."""
    columns = (
        Column("model", "Model"),
        Column("compared_with", "compared with"),
        *RATIO_COLUMNS,
    )
    rows: list[tuple[Value, ...]] = []
    for (ours, other), paper in claims.items():
        rows.append((title_of(ours), title_of(other), paper, *speeds.ratio_cells(ours, other)))
    return Table(f"{name}-pairs", "The comparisons that the paper makes", columns, tuple(rows))


def pair_chart(name: str, claims: Claims, speeds: Speeds) -> Chart:
    """Return a chart with a bar for each claim, next to the paper's."""
    bars = [
        Bar(f"{title_of(ours)}\nvs {title_of(other)}", speeds.speedup(ours, other), paper)
        for (ours, other), paper in claims.items()
    ]
    title = "How many times as fast as its baseline?"
    draw = partial(draw_bars, title=title, unit="times as fast", bars=bars, line_at=1.0)
    return Chart(f"{name}-pairs", "How many times as fast as its baseline each RepVGG is, here and in the paper", draw)


@dataclass(frozen=True)
class ClaimResult:
    """A claim of the paper, "``model`` is so many times as fast as ``other``", in one choice of engines."""

    model: str
    other: str
    where: str  # in words, such as "both in torch"
    engines: tuple[str, str]  # of the model and of the other
    paper: float  # times as fast
    here: Ratio  # within rounds

    @property
    def verdict(self) -> str:
        """Whether the model is faster or slower in all but a quarter of the rounds.

        If it is faster, the claim holds only if the median reaches the paper's factor.
        """
        if self.here.q3 < 1:
            return FAILS
        if self.here.q1 <= 1:
            return OPEN
        return HOLDS if self.here.median >= self.paper else LESS


def compare_in_engines(claims: Claims, speeds: Speeds, engines: Sequence[str]) -> list[ClaimResult]:
    """Return all claims that were measured, in each engine, and with each network in its fastest one.

    Args:
        claims: how many times as fast the first network is in the paper.
        speeds: of candidates, named by :func:`candidate_name`.
        engines: in which they were timed.
    """
    others = [engine for engine in engines if engine not in OURS]
    results = []
    for (model, other), paper in claims.items():
        choices = [(f"both in {engine}", (engine, engine)) for engine in engines]
        fastest, best_other = fastest_engine(speeds, model, engines), fastest_engine(speeds, other, others)
        if fastest and (of_other := fastest_engine(speeds, other, engines)):
            choices.append((EACH_FASTEST, (fastest, of_other)))
        if fastest in OURS and best_other and (fastest, best_other) != choices[-1][1]:
            choices.append((f"in {fastest} against the best other", (fastest, best_other)))
        for where, (first, second) in choices:
            ratio = speeds.ratio(candidate_name(model, first), candidate_name(other, second))
            if ratio is not None:
                results.append(ClaimResult(model, other, where, (first, second), paper, ratio))
    return results


def claims_lead(results: Sequence[ClaimResult]) -> str:
    """Return how many claims hold with each network in its fastest engine, in a sentence."""
    found = [result.verdict for result in results if result.where == EACH_FASTEST]
    parts = "; ".join(f"{verdict} {number}" for verdict in VERDICTS if (number := found.count(verdict)))
    return f"Of {quantity(len(found), 'comparison')} of the paper, with each network in its fastest engine: {parts}."


def claims_table(name: str, results: Sequence[ClaimResult]) -> Table:
    """Return a row for each claim and choice of engines."""
    columns = (
        Column("model", "Model"),
        Column("compared_with", "compared with"),
        Column("where", "Run"),
        Column("engine", "Engine"),
        Column("engine_of_other", "engine of the other"),
        *RATIO_COLUMNS,
        Column("verdict", "the claim"),
    )
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (
            title_of(one.model),
            title_of(one.other),
            one.where,
            *one.engines,
            one.paper,
            one.here.median,
            one.here.q1,
            one.here.q3,
            one.verdict,
        )
        for one in results
    )
    note = (
        f"A claim {HOLDS} if the RepVGG is faster by at least the paper's factor (median), and in all but a quarter of "
        "the rounds faster at all."
    )
    return Table(f"{name}-claims", "The paper's claims on speed, in each engine", columns, rows, (note,))


_EACH_ENGINE = (
    "How many times as fast as another network each RepVGG is, in the paper and here in each engine; at the right, "
    "whether the claim holds with each network in its fastest engine"
)


def claims_chart(
    name: str, results: Sequence[ClaimResult], judged: str = EACH_FASTEST, caption: str = _EACH_ENGINE
) -> Chart:
    """Return a chart with a row for each claim: the paper's factor, and those here with quartiles.

    Args:
        name: of the study.
        results: the claims in each choice, such as an engine.
        judged: the choice, as in ``where``, whose verdicts are at the right.
        caption: what the chart shows, for its reader.
    """
    rows = []
    for model, other in dict.fromkeys((one.model, one.other) for one in results):
        found = {one.where: one for one in results if (one.model, one.other) == (model, other)}
        here = {where: (one.here.median, one.here.q1, one.here.q3) for where, one in found.items()}
        verdict = found[judged].verdict if judged in found else ""
        rows.append(RatioRow(f"{title_of(model)} / {title_of(other)}", next(iter(found.values())).paper, here, verdict))
    title = "Which of the paper's claims on speed hold here?"
    draw = partial(draw_ratios, title=title, unit="times as fast", rows=rows)
    return Chart(f"{name}-claims", caption, draw)
