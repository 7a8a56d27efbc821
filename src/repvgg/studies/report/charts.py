"""Charts of studies: bars, scatter plots and accuracies over seeds, as files for slides and inside a page.

The colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart; markers differ, too.
A drawing function adapts to the width of the figure: a slide, or a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from repvgg._files import atomic_write
from repvgg.errors import require
from repvgg.studies.report.page_charts import (
    ACCENT,
    BAD,
    GOOD,
    INK,
    NARROW_PX,
    NEUTRAL,
    OTHERS,
    OURS,
    PAPER,
    PAPER_TEXT,
    PX,
    RULE,
    SOFT,
    inline_svg,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation, Text
    from matplotlib.transforms import Bbox

SLIDE_INCHES = (12.0, 6.75)  # 16:9
_SLIDE_DPI = 160
_SLIDE_FONT, _NARROW_FONT = 17.0, 11.0
_NARROW_LABEL = 18  # characters of a line in the labels of rows


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart of a study."""

    name: str  # stem of its file names
    description: str  # content in words, for screen readers
    draw: Callable[[Figure], None]  # draws it into an empty figure, whose width tells a slide from a phone


def write_chart(folder: Path, chart: Chart) -> str:
    """Write NAME.svg and NAME.png for slides, replacing existing files; return the chart as HTML for a page.

    Raises:
        OutputError: a file cannot be written.
    """
    # Paths instead of text: slides look the same where DejaVu Sans is not installed.
    with new_figure(*SLIDE_INCHES, font=_SLIDE_FONT, text_as="path") as figure:
        chart.draw(figure)
        for suffix, metadata in (("svg", {"Date": None}), ("png", {})):
            with atomic_write(folder / f"{chart.name}.{suffix}", overwrite=True) as part:
                figure.savefig(part, format=suffix, dpi=_SLIDE_DPI, metadata=metadata)
    sizes = {"wide": (*SLIDE_INCHES, _SLIDE_FONT), "narrow": (NARROW_PX * PX, NARROW_PX * PX, _NARROW_FONT)}
    variants = []
    for variant, (width, height, font) in sizes.items():
        with new_figure(width, height, font=font) as figure:
            chart.draw(figure)
            variants.append(inline_svg(figure, f"{chart.name}-{variant}", chart.description, variant))
    return "\n".join(variants)


@dataclass(frozen=True)
class Bar:
    """One bar of :func:`draw_bars`."""

    label: str  # left of the bar
    value: float | None  # its length; None if not measured
    paper: float | None = None  # length of the paper's bar below it; None for no such bar
    text: str = ""  # written after the bar in place of the value
    ours: bool = True  # whether it is one of ours, for the colour


def draw_bars(figure: Figure, title: str, unit: str, bars: Sequence[Bar], *, line_at: float | None = None) -> None:
    """Draw horizontal bars, the first on top, each with its value; the paper's are thinner gray bars below ours.

    Args:
        figure: an empty figure.
        title: above the bars.
        unit: of the lengths, below the axis.
        bars: what to draw.
        line_at: a length to mark with a line, such as 1 for ratios.
    """
    paper = any(bar.paper is not None for bar in bars)
    labels = [fill(bar.label, _NARROW_LABEL) if _is_narrow(figure) else bar.label for bar in bars]
    if _is_narrow(figure):
        lines = max((label.count("\n") + 1 for label in labels), default=1)
        figure.set_figheight((90 + len(bars) * max(44 if paper else 26, 16 * lines + 6)) * PX)
    # The title begins at the edge of the figure, not of the axes: on a phone it needs the width of the labels, too.
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size="large")
    axes = figure.add_subplot()
    ours_up, paper_down = (0.2, 0.24) if paper else (0.0, 0.0)
    rows = range(len(bars))
    colors = [OURS if bar.ours else OTHERS for bar in bars]
    lengths = [bar.value or 0.0 for bar in bars]
    axes.barh([row - ours_up for row in rows], lengths, 0.44 if paper else 0.7, color=colors)
    if paper:
        axes.barh([row + paper_down for row in rows], [bar.paper or 0.0 for bar in bars], 0.3, color=PAPER)
    longest = max((length for bar in bars for length in (bar.value, bar.paper) if length is not None), default=1.0)
    gap = longest * 0.012
    texts: list[Text] = []
    for row, bar in enumerate(bars):
        text = bar.text or ("not measured" if bar.value is None else f"{bar.value:.2f}{' here' if paper else ''}")
        style: dict[str, Any] = {"va": "center", "color": colors[row], "fontsize": _font(0.94)}
        texts.append(axes.text(lengths[row] + gap, row - ours_up, text, **style))
        if bar.paper is not None:
            label, style = f"{bar.paper:,.2f} paper", {"va": "center", "color": PAPER_TEXT, "fontsize": _font(0.76)}
            texts.append(axes.text(bar.paper + gap, row + paper_down, label, **style))
    if line_at is not None:
        axes.axvline(line_at, color=INK, linewidth=1.2)
    axes.set_yticks(list(rows), labels)
    axes.set_ylim(len(bars) - 0.4, -0.6)  # downwards: the first bar is on top
    axes.set_xlim(0.0, longest * 1.25)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)
    _make_space(figure, axes, texts)
    while line_at is not None and (crossing := [text for text in texts if _is_crossed(text, axes, line_at)]):
        for crossed in crossing:  # to the other side of the line; a wider axis may then let others reach the line
            crossed.set_x(line_at + gap)
        _make_space(figure, axes, texts)


@dataclass(frozen=True)
class RatioRow:
    """One row of :func:`draw_ratios`."""

    label: str  # left of the row
    paper: float  # the paper's ratio
    here: Mapping[str, tuple[float, float, float]]  # median, lower and upper quartile, by the name of the series
    verdict: str = ""  # right of the row


_SERIES_COLORS = (OTHERS, OURS, GOOD, NEUTRAL, SOFT, ACCENT, BAD)
_SERIES_MARKERS = "osD^vPX"


def draw_ratios(figure: Figure, title: str, unit: str, rows: Sequence[RatioRow]) -> None:
    """Draw ratios of several series beside the paper's: a gray bar for the paper, a marker with quartiles for each.

    A marker beyond the end of the bar is more than the paper's ratio; a line marks 1.
    """
    narrow = _is_narrow(figure)
    series = list(dict.fromkeys(name for row in rows for name in row.here))
    if narrow:
        figure.set_figheight((120 + 24 * len(series) + len(rows) * (30 + 8 * len(series))) * PX)
    figure.suptitle(fill(title, 30) if narrow else title, x=0.01, ha="left", weight="bold", size="large")
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [row.paper for row in rows], 0.8, color=RULE, label="paper (GTX 1080 Ti)")
    for index, name in enumerate(series):
        offset = 0.7 * ((index + 0.5) / len(series) - 0.5)
        found = [(row, *at.here[name]) for row, at in enumerate(rows) if name in at.here]
        medians = [median for _, median, _, _ in found]
        spread = [[median - q1 for _, median, q1, _ in found], [q3 - median for _, median, _, q3 in found]]
        axes.errorbar(
            medians,
            [row + offset for row, *_ in found],
            xerr=spread,
            fmt=_SERIES_MARKERS[index % len(_SERIES_MARKERS)],
            color=_SERIES_COLORS[index % len(_SERIES_COLORS)],
            markersize=_font(0.4),
            label=name,
        )
    axes.axvline(1.0, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(rows)), [fill(row.label, _NARROW_LABEL) if narrow else row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # downwards: the first row is on top
    axes.set_xlim(left=0.0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)
    verdicts = axes.secondary_yaxis("right")
    verdicts.set_yticks(range(len(rows)), [fill(row.verdict, 11) if narrow else row.verdict for row in rows])
    verdicts.tick_params(axis="y", length=0)
    verdicts.spines["right"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1 if narrow else min(4, len(series) + 1), fontsize=_font(0.76))


def _make_space(figure: Figure, axes: Axes, texts: Sequence[Text]) -> None:
    """Extend the x axis until each text ends inside of the axes."""
    figure.draw_without_rendering()  # the layout decides how wide the axes are
    width = axes.get_window_extent().width
    limit = axes.get_xlim()[1]
    for text in texts:
        free = width - text.get_window_extent().width - _font(0.5)
        limit = max(limit, text.get_position()[0] * width / max(free, width / 10))  # may be as long as the axes
    axes.set_xlim(0.0, limit)


def _is_crossed(text: Text, axes: Axes, line_at: float) -> bool:
    """Whether a vertical line runs through a text that begins before it."""
    line = float(axes.transData.transform((line_at, 0.0))[0])
    return text.get_position()[0] <= line_at and text.get_window_extent().x1 + _font(0.1) > line


def add_panels(figure: Figure, count: int) -> list[Axes]:
    """Return axes side by side, or one below the other on a phone."""
    if _is_narrow(figure):
        figure.set_figheight(count * NARROW_PX * PX)
        return [figure.add_subplot(count, 1, index + 1) for index in range(count)]
    return [figure.add_subplot(1, count, index + 1) for index in range(count)]


@dataclass(frozen=True)
class Point:
    """A model in :func:`draw_scatter`."""

    label: str
    x: float
    y: float
    ours: bool


def draw_scatter(axes: Axes, title: str, points: Sequence[Point], x_label: str, y_label: str) -> None:
    """Draw labelled points: ours as dots joined by a line, others as squares. The x axis is logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_title(title)
    axes.set_xscale("log")
    ours = _ours(points)
    others = [point for point in points if not point.ours]
    axes.plot([p.x for p in ours], [p.y for p in ours], "o-", color=OURS, markersize=_font(0.6), lw=2.5, zorder=3)
    axes.plot([p.x for p in others], [p.y for p in others], "s", color=OTHERS, markersize=_font(0.53), zorder=3)
    axes.margins(0.2, 0.14)  # space for the labels of points at the edges
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 1000 instead of 10³
    axes.xaxis.set_minor_formatter(NullFormatter())
    label_points(axes, points)


_OVERLAP_TEXT, _OVERLAP_LINE, _OUTSIDE = 8, 1, 16  # penalties of a label's position
_LINE_STEPS = 24  # boxes along each segment of the line, to detect labels that would cover it
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write each label next to its point, at the first of 24 positions with the smallest overlap penalty.

    Greedy, in the order of the points; positions are on three rings of eight directions around the point.
    """
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # otherwise positions of points and sizes of text are not known
    frame = axes.get_window_extent()
    taken = [(_box(axes.transData.transform((point.x, point.y)), 6.0), _OVERLAP_TEXT) for point in points]
    taken += [(box, _OVERLAP_LINE) for box in _boxes_along_line(axes, points)]
    offsets = [(_font(0.53) * ring * x, _font(0.53) * ring * y) for ring in (1, 2, 3) for x, y in _DIRECTIONS]
    for point in points:
        best: tuple[int, Annotation] | None = None
        for offset in offsets:
            label = _label(axes, point, offset)
            box = label.get_window_extent()
            penalty = sum(weight for other, weight in taken if box.overlaps(other))
            if not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1):
                penalty += _OUTSIDE
            if best is not None and penalty >= best[0]:
                label.remove()
                continue
            if best is not None:
                best[1].remove()
            best = penalty, label
            if not penalty:  # measuring text is what takes the time
                break
        assert best is not None
        taken.append((best[1].get_window_extent(), _OVERLAP_TEXT))


def _ours(points: Iterable[Point]) -> list[Point]:
    return sorted((point for point in points if point.ours), key=lambda point: point.x)


def _boxes_along_line(axes: Axes, points: Sequence[Point]) -> list[Bbox]:
    corners = [axes.transData.transform((point.x, point.y)) for point in _ours(points)]
    steps = [step / _LINE_STEPS for step in range(1, _LINE_STEPS)]
    return [_box(a + step * (b - a), 1.0) for a, b in pairwise(corners) for step in steps]


def _box(center: Iterable[float], radius: float) -> Bbox:
    """Return a square around a point, in display pixels."""
    from matplotlib.transforms import Bbox

    x, y = center
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _label(axes: Axes, point: Point, offset: tuple[float, float]) -> Annotation:
    right, up = offset
    return axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=offset,
        textcoords="offset points",
        ha="left" if right > 0 else "right" if right else "center",
        va="bottom" if up > 0 else "top" if up else "center",
        fontsize=_font(0.76),
        color=OURS if point.ours else OTHERS,
    )


#: Title of a variant, its accuracy with each seed in percent, and the paper's.
Accuracies = tuple[str, Sequence[float], float | None]

_MOST_LARGE_ROWS = 14  # a slide has space for as many rows in the usual font


def draw_accuracies(figure: Figure, results: Sequence[Accuracies], metric: str = "top-1 accuracy") -> None:
    """Draw a dot per seed and a line at their mean for each variant; at the right the paper's accuracies, if any.

    The two panels share their rows but not their scales: the order is to be compared, and its spread over seeds.
    """
    narrow = _is_narrow(figure)
    if narrow:
        figure.set_figheight((90 + 44 * len(results)) * PX)
    printed = any(paper is not None for _, _, paper in results)
    panels = figure.subplots(1, 2 if printed else 1, sharey=True, squeeze=False, width_ratios=(3, 2)[: 1 + printed])[0]
    size = _font(0.88 if narrow or len(results) <= _MOST_LARGE_ROWS else 0.59)
    unit = f"{metric.split()[0] if narrow else metric} (%)"
    _accuracy_panel(panels[0], "Here", [seeds for _, seeds, _ in results], OURS, size, unit)
    if printed:
        paper = [[] if value is None else [value] for _, _, value in results]
        _accuracy_panel(panels[1], "Paper" if narrow else "Paper, ImageNet", paper, PAPER_TEXT, size, unit)
    titles = [fill(title, _NARROW_LABEL) if narrow else title for title, _, _ in results]
    panels[0].set_yticks(range(len(results)), titles, fontsize=size)
    panels[0].set_ylim(len(results) - 0.4, -0.6)


def _accuracy_panel(
    axes: Axes, title: str, rows: Sequence[Sequence[float]], color: str, size: float, unit: str
) -> None:
    axes.set_title(title)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    narrow = _is_narrow(axes.get_figure())
    axes.set_xlabel(unit)
    axes.margins(x=0.5 if narrow else 0.2)  # space for the mean after the last dot
    for row, values in enumerate(rows):
        # Transparent: seeds with the same accuracy are darker.
        axes.plot(values, [row] * len(values), "o", color=color, markersize=size * 0.6, alpha=0.75, zorder=3)
        if values:
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [row - 0.32, row + 0.32], color=INK, linewidth=2.5, zorder=4)
            axes.annotate(
                f"{mean:.2f}",
                (max(values), row),
                xytext=(size * 0.6, 0),
                textcoords="offset points",
                va="center",
                color=color,
                fontsize=size,
            )


@dataclass(frozen=True)
class Curve:
    """A line in :func:`draw_curves`."""

    label: str
    values: Sequence[float]  # at 1, 2, …


_LINE_STYLES = ("-", "--", "-.", ":")
_CURVE_COLORS = (OURS, OTHERS, INK)  # times the line styles: twelve curves can be told apart


def draw_curves(figure: Figure, curves: Sequence[Curve], x_label: str, y_label: str) -> None:
    """Draw curves over 1, 2, … in one panel, the best last value first in the legend."""
    narrow = _is_narrow(figure)
    if narrow:
        figure.set_figheight((NARROW_PX + 18 * len(curves)) * PX)
    axes = figure.add_subplot()
    ranked = sorted(enumerate(curves), key=lambda item: -item[1].values[-1])
    for index, curve in ranked:
        axes.plot(
            range(1, len(curve.values) + 1),
            curve.values,
            _LINE_STYLES[index // len(_CURVE_COLORS) % len(_LINE_STYLES)],
            color=_CURVE_COLORS[index % len(_CURVE_COLORS)],
            label=curve.label,
        )
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.legend(loc="outside lower center" if narrow else "outside right center", fontsize=_font(0.76))


def _is_narrow(figure: Any) -> bool:
    """Whether the figure is for a phone; a drawing function may then set another height."""
    return bool(figure.get_figwidth() < 0.6 * SLIDE_INCHES[0])


def _font(factor: float) -> float:
    """Return a size in points, relative to the font size in force."""
    matplotlib = require("matplotlib", "study")
    return float(matplotlib.rcParams["font.size"]) * factor
