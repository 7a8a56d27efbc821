"""Accuracies over seeds, row by row, beside those that the paper prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from repvgg.studies.pictures import HERE, INK, RULE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 14  # rows for which words are as large as elsewhere

#: Title of a row, its accuracy with each seed in percent, and the paper's.
Row = tuple[str, Sequence[float], float | None]


def draw_accuracies(figure: Figure, results: Sequence[Row]) -> None:
    """Left the accuracies here, a dot for each seed and a line at their mean; right the paper's, if it prints any.

    The panels share their rows and not their scales: what is to be compared is the order, and what seeds leave of it.
    """
    printed = any(paper is not None for _, _, paper in results)
    panels = figure.subplots(1, 2 if printed else 1, sharey=True, squeeze=False, width_ratios=(3, 2)[: 1 + printed])[0]
    size = 15.0 if len(results) <= _MOST else 10.0
    _panel(panels[0], "Here", [seeds for _, seeds, _ in results], HERE, size)
    if printed:
        paper = [[] if value is None else [value] for _, _, value in results]
        _panel(panels[1], "Paper, ImageNet", paper, "#6E6E6E", size)
    panels[0].set_yticks(range(len(results)), [title for title, _, _ in results], fontsize=size)
    panels[0].set_ylim(len(results) - 0.4, -0.6)


def _panel(axes: Axes, title: str, rows: Sequence[Sequence[float]], color: str, size: float) -> None:
    axes.set_title(title)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("top-1 accuracy (%)")
    axes.margins(x=0.2)
    for place, values in enumerate(rows):
        axes.plot(values, [place] * len(values), "o", color=color, markersize=size * 0.6, alpha=0.75, zorder=3)
        if values:
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [place - 0.32, place + 0.32], color=INK, linewidth=2.5, zorder=4)
            axes.annotate(
                f"{mean:.2f}",
                (max(values), place),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=size,
            )
