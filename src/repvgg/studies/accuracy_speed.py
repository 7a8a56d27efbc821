"""Accuracy against speed: Figure 1 of the paper, and the mobile networks that the paper leaves out.

    repvgg study figure1
    repvgg study mobile

Accuracies are the published ones; speeds are measured here. Expected on 2 cores: 2 minutes for mobile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from repvgg.measure import count
from repvgg.models import named_model
from repvgg.studies.base import OnProgress, Outcome, Study
from repvgg.studies.candidates import plain_form
from repvgg.studies.counts import COUNTS, counts_of, title_of
from repvgg.studies.network_speed import (
    CPU_GMACS,
    UNLIMITED_GMACS,
    NetworkSettings,
    is_repvgg,
    measure_networks,
    resolve,
    within_limit,
)
from repvgg.studies.paper import FIGURE_1, TABLE_4, TABLE_5, FigurePoint
from repvgg.studies.report.charts import Chart, Point, add_panels, draw_scatter
from repvgg.studies.store import Cell, CellStore
from repvgg.studies.tables import Column, Table
from repvgg.studies.timing import Speeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_X_LABEL, _Y_LABEL = "images per second here", "top-1 accuracy (%)"


def pareto_front(accuracies: Mapping[str, float], speeds: Speeds) -> list[str]:
    """Return the measured networks that no other dominates: at least as fast and accurate, and better in one."""
    found = [
        (name, accuracy, speed)
        for name, accuracy in accuracies.items()
        if isinstance(speed := speeds.images_per_second(name), float)
    ]
    return [
        name
        for name, accuracy, speed in found
        if not any(a >= accuracy and s >= speed and (a, s) != (accuracy, speed) for _, a, s in found)
    ]


def _lead(front: Sequence[str]) -> str:
    if not front:
        return "Nothing was measured yet."
    ours = sum(map(is_repvgg, front))
    return f"Of the {len(front)} networks than which none is both faster here and more accurate, {ours} are RepVGG."


def scatter_points(accuracies: Mapping[str, float], speeds: Speeds) -> list[Point]:
    """Return the measured networks as points."""
    points = [
        Point(title_of(name), speed, accuracy, is_repvgg(name))
        for name, accuracy in accuracies.items()
        if isinstance(speed := speeds.images_per_second(name), float)
    ]
    # Only the fastest RepVGG is labelled in full: with the others as "A1", "B2g4" the labels have space.
    fastest = max((point for point in points if point.ours), key=lambda point: point.x, default=None)
    return [one if one is fastest else replace(one, label=one.label.removeprefix("RepVGG-")) for one in points]


_FIGURE_1_MODELS = tuple({row.model: row for row in (*TABLE_4, *TABLE_5)}.values())  # B2g4 is in both tables
_PANELS = {120: "120 epochs", 200: "200 epochs"}
_MIN_POINTS = 3  # for a panel: the axes of fewer points say nothing


def _figure1_outcome(settings: NetworkSettings, values: Mapping[str, Cell]) -> Outcome:
    names = {row.model for row in within_limit(_FIGURE_1_MODELS, settings)}
    speeds = Speeds.from_cells(values, settings.batch or 1)
    points = [point for point in FIGURE_1 if point.model in names]
    # Accuracies of different training lengths do not compare: a front for each panel.
    panels = [{p.model: p.top1_percent for p in points if p.epochs == epochs} for epochs in _PANELS]
    front = list(dict.fromkeys(name for panel in panels for name in pareto_front(panel, speeds)))
    chart = Chart(
        "figure1",
        "Top-1 accuracy as the paper prints it against images per second on this machine",
        partial(_draw_figure1, points=points, speeds=speeds),
    )
    return Outcome(_lead(front), (_figure1_table(points, speeds, front),), (chart,))


def _figure1_table(points: Sequence[FigurePoint], speeds: Speeds, front: Sequence[str]) -> Table:
    columns = (
        Column("model", "Model"),
        Column("epochs", "Epochs of training, paper"),
        Column("paper_top1_percent", "Top-1, paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 0),
        Column("images_per_second", "Speed here (images/s)", 1),
        Column("images_per_second_q1", "lower quartile", 1),
        Column("images_per_second_q3", "upper quartile", 1),
        Column("undominated", "none faster and more accurate"),
    )
    rows = tuple(
        (
            title_of(point.model),
            point.epochs,
            point.top1_percent,
            point.images_per_second,
            speeds.images_per_second(point.model),
            *speeds.quartiles(point.model),
            point.model in front,
        )
        for point in points
    )
    return Table("figure1", "Accuracy and speed", columns, rows, (speeds.extent,))


def _draw_figure1(figure: Figure, points: Sequence[FigurePoint], speeds: Speeds) -> None:
    panels = {
        epochs: scatter_points({p.model: p.top1_percent for p in points if p.epochs == epochs}, speeds)
        for epochs in _PANELS
    }
    shown = {epochs: panel for epochs, panel in panels.items() if len(panel) >= _MIN_POINTS} or panels
    for axes, (epochs, panel) in zip(add_panels(figure, len(shown)), shown.items(), strict=True):
        draw_scatter(axes, f"Trained for {_PANELS[epochs]}", panel, _X_LABEL, _Y_LABEL)


@dataclass(frozen=True)
class Published:
    """Figures that the authors of a network publish: top-1 on ImageNet-1K, parameters in 10⁶, multiply-adds in 10⁹."""

    model: str
    top1_percent: float
    params_millions: float
    flops_billions: float
    source: str


_MOBILE_BASELINE = "mobilenet_v2"
_MOBILE_REPVGGS = ("repvgg_a0", "repvgg_a1", "repvgg_b0", "repvgg_a2")
_SHUFFLENET = "Ma et al., ECCV 2018"
_MOBILEONE = "Vasu et al., CVPR 2023"

MOBILE_MODELS = (
    *(
        Published(row.model, row.top1_percent, row.params_millions, row.flops_billions, "RepVGG, Table 4")
        for row in TABLE_4
        if row.model in _MOBILE_REPVGGS
    ),
    # 1x1 and depthwise convolutions: few multiply-adds, many bytes for each.
    Published("shufflenet_v2_x0_5", 60.3, 1.4, 0.041, _SHUFFLENET),
    Published("shufflenet_v2_x1_0", 69.4, 2.3, 0.146, _SHUFFLENET),
    Published("shufflenet_v2_x2_0", 74.9, 7.4, 0.591, _SHUFFLENET),
    Published("mobilenet_v2", 72.0, 3.4, 0.300, "Sandler et al., CVPR 2018"),
    Published("mobilenet_v3_large", 75.2, 5.4, 0.219, "Howard et al., ICCV 2019"),
    Published("mobileone_s0", 71.4, 2.1, 0.275, _MOBILEONE),
    Published("mobileone_s1", 75.9, 4.8, 0.825, _MOBILEONE),
    Published("mobileone_s2", 77.4, 7.8, 1.299, _MOBILEONE),
    Published("mobileone_s3", 78.1, 10.1, 1.896, _MOBILEONE),
    Published("mobileone_s4", 79.4, 14.8, 2.978, _MOBILEONE),
)


def _measure_mobile(settings: NetworkSettings, store: CellStore, on_progress: OnProgress) -> None:
    if COUNTS not in store:  # first, because it takes seconds and the timing minutes
        store.put(COUNTS, {row.model: _count_plain(row.model) for row in within_limit(MOBILE_MODELS, settings)})
    measure_networks(MOBILE_MODELS, _MOBILE_BASELINE, settings, store, on_progress)


def _count_plain(name: str) -> dict[str, int]:
    named = named_model(name, values=False)
    image = torch.empty(1, *named.input_shape, device="meta")  # counts need shapes only
    counts = count(plain_form(named.model, image), (1, *named.input_shape))
    return {"params": counts.params, "macs": counts.macs, "winograd_muls": counts.winograd_muls}


def _mobile_outcome(settings: NetworkSettings, values: Mapping[str, Cell]) -> Outcome:
    models = within_limit(MOBILE_MODELS, settings)
    accuracies = {row.model: row.top1_percent for row in models}
    speeds = Speeds.from_cells(values, settings.batch or 1)
    front = pareto_front(accuracies, speeds)

    def draw(figure: Figure) -> None:
        draw_scatter(figure.add_subplot(), "Accuracy and speed", scatter_points(accuracies, speeds), _X_LABEL, _Y_LABEL)

    chart = Chart("mobile", "Top-1 accuracy as published against images per second on this machine", draw)
    return Outcome(_lead(front), (_mobile_table(models, speeds, values.get(COUNTS, {}), front),), (chart,))


def _mobile_table(models: Sequence[Published], speeds: Speeds, counts: Cell, front: Sequence[str]) -> Table:
    columns = (
        Column("model", "Model"),
        Column("published_top1_percent", "Top-1, published (%)", 1),
        Column("images_per_second", "Speed here (images/s)", 1),
        Column("images_per_second_q1", "lower quartile", 1),
        Column("images_per_second_q3", "upper quartile", 1),
        Column("speed_up", f"× {title_of(_MOBILE_BASELINE)} here", 2),
        Column("published_params_millions", "Params, published (M)", 1),
        Column("params_millions", "Params here (M)", 2),
        Column("published_flops_billions", "Theo FLOPs, published (B)", 3),
        Column("flops_billions", "Theo FLOPs here (B)", 3),
        Column("winograd_muls_billions", "Wino MULs here (B)", 3),
        Column("undominated", "none faster and more accurate"),
        Column("source", "Published in"),
    )
    rows = []
    for row in models:
        params, flops, muls = counts_of(row.model, counts)
        rows.append(
            (
                title_of(row.model),
                row.top1_percent,
                speeds.images_per_second(row.model),
                *speeds.quartiles(row.model),
                speeds.speedup(row.model, _MOBILE_BASELINE),
                row.params_millions,
                params,
                row.flops_billions,
                flops,
                muls,
                row.model in front,
                row.source,
            )
        )
    notes = (
        f"{speeds.extent} Counted in the plain form, branches merged and batch norms folded.",
        "Published accuracies come of different recipes. RepVGG's are those of 120 epochs with crops and flips alone "
        "(the paper, §4.1).",
    )
    return Table("mobile", "Beside networks for small devices", columns, tuple(rows), notes)


STUDIES = (
    Study(
        name="figure1",
        title="Figure 1: accuracy against speed",
        about=(
            "Accuracies are those that the paper prints; nothing is trained here. Speeds are measured as in table4: "
            "all networks interleaved, RepVGGs in the plain form, batch norms of the others folded, medians over the "
            "rounds."
        ),
        settings=NetworkSettings,
        resolve=partial(resolve, cpu_gmacs=CPU_GMACS),
        measure=partial(measure_networks, _FIGURE_1_MODELS, "resnet50"),
        outcome=_figure1_outcome,
    ),
    Study(
        name="mobile",
        title="Beside ShuffleNet, MobileNet and MobileOne, which the paper leaves out",
        about=(
            "Accuracies are those that the authors publish; nothing is trained here. Speeds are measured as in table4: "
            "all networks interleaved, RepVGGs and MobileOnes in the plain form, batch norms of the others folded, "
            "medians over the rounds. Few multiply-adds are not speed by themselves: depthwise convolutions move many "
            "bytes for each."
        ),
        settings=NetworkSettings,
        resolve=partial(resolve, cpu_gmacs=UNLIMITED_GMACS),
        measure=_measure_mobile,
        outcome=_mobile_outcome,
    ),
)
