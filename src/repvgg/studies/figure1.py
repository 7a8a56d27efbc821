"""Figure 1 of the paper: accuracy against speed. The accuracy is what the paper prints, the speed is measured here.

repvgg study figure1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from repvgg.studies.cells import Cell
from repvgg.studies.networks import (
    NetworkSettings,
    lead_of,
    measure_table,
    plane_points,
    resolved,
    speeds_of,
    taking_part,
    title_of,
    undominated,
)
from repvgg.studies.paper import FIGURE_1, TABLE_4, TABLE_5, FigurePoint
from repvgg.studies.report.charts import Chart, add_panels, draw_scatter
from repvgg.studies.speeds import Speeds
from repvgg.studies.study import Outcome, Study
from repvgg.studies.tables import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = tuple({row.model: row for row in (*TABLE_4, *TABLE_5)}.values())  # B2g4 stands in both
_EPOCHS = {120: "120 epochs", 200: "200 epochs"}
_FEWEST_SHOWN = 3  # networks in a panel


def _outcome(settings: NetworkSettings, values: Mapping[str, Cell]) -> Outcome:
    names = {row.model for row in taking_part(_ROWS, settings)}
    speeds = speeds_of(settings, values)
    points = [point for point in FIGURE_1 if point.model in names]
    best = _frontier(points, speeds)
    words = "Top-1 accuracy as the paper prints it against images per second on this machine"
    picture = Chart("figure1", words, partial(_draw, points=points, speeds=speeds))
    return Outcome(lead_of(best), (_table(points, speeds, best),), (picture,))


def _frontier(points: Sequence[FigurePoint], speeds: Speeds) -> list[str]:
    """The best of each training, see :func:`undominated`."""
    panels = [{p.model: p.top1_percent for p in points if p.epochs == epochs} for epochs in _EPOCHS]
    return list(dict.fromkeys(name for panel in panels for name in undominated(panel, speeds)))


def _table(points: Sequence[FigurePoint], speeds: Speeds, best: Sequence[str]) -> Table:
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
            point.model in best,
        )
        for point in points
    )
    return Table("figure1", "Accuracy and speed", columns, rows, (speeds.extent,))


def _draw(figure: Figure, points: Sequence[FigurePoint], speeds: Speeds) -> None:
    """The panels of the paper, side by side; one in which next to nothing was measured is left to the table."""
    panels = {
        epochs: plane_points({p.model: p.top1_percent for p in points if p.epochs == epochs}, speeds)
        for epochs in _EPOCHS
    }
    shown = {epochs: panel for epochs, panel in panels.items() if len(panel) >= _FEWEST_SHOWN} or panels
    for axes, (epochs, panel) in zip(add_panels(figure, len(shown)), shown.items(), strict=True):
        draw_scatter(axes, f"Trained for {_EPOCHS[epochs]}", panel, "images per second here", "top-1 accuracy (%)")


STUDY = Study(
    name="figure1",
    title="Figure 1: accuracy against speed",
    about=(
        "Accuracies are those that the paper prints; nothing is trained here. Speeds are measured as in table4: all "
        "networks interleaved, ours in the plain form, batch norms of the others folded, medians over the rounds."
    ),
    settings=NetworkSettings,
    resolve=partial(resolved, gmacs_on_cpu=12.0),
    measure=measure_table(_ROWS, "resnet50"),
    outcome=_outcome,
)
