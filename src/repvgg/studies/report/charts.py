"""Draw charts with Matplotlib: SVG that adapts to a report page, and SVG and PNG files for slides.

A page chart is inline SVG: its text is text in the font of the page, and its colours are CSS variables, so that it
follows the light or dark scheme. Each is drawn twice, for wide and for narrow screens; ``style.css`` shows one of the
two. The slide colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart; markers
differ, too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from repvgg._files import atomic_write
from repvgg.errors import require
from repvgg.studies.report.formatting import duration, percentage, power_of_ten, printable, ratio, scientific
from repvgg.studies.report.schema import Check, Epoch, Role, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Literal colours, so that a file for slides is complete by itself. In a page each is replaced by a CSS variable: every
# colour must differ from the others.
OURS, PAPER, PAPER_TEXT, OTHERS = "#0072b2", "#9a9a9a", "#6e6e6e", "#d55e00"
INK, SOFT, RULE, NEUTRAL = "#222222", "#59616c", "#dddddd", "#9aa1a9"
ACCENT, GOOD, BAD = "#0e706a", "#14764e", "#b82a20"
_CSS_COLORS = {
    OURS: "rgb(var(--ours))",
    PAPER: "rgb(var(--paper-bar))",
    PAPER_TEXT: "var(--soft)",
    OTHERS: "rgb(var(--others))",
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    RULE: "var(--rule)",
    NEUTRAL: "var(--wire)",
    ACCENT: "rgb(var(--accent))",
    GOOD: "rgb(var(--good))",
    BAD: "rgb(var(--bad))",
}

SLIDE_INCHES = (12.0, 6.75)  # 16:9
_SLIDE_DPI = 160
_SLIDE_FONT, _NARROW_FONT, _PAGE_FONT = 17.0, 11.0, 13.0
_PX = 1 / 72  # inches: one unit of Matplotlib's SVG is one CSS pixel at natural size
_WIDE_PX, _HALF_PX, _NARROW_PX = 1056.0, 500.0, 364.0  # the column of the page, half of it, a phone's
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib: the same layout on every machine
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "large",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "repvgg",  # the same chart gives the same bytes
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_TOOLTIP = "tooltip:"  # a gid with this prefix becomes the <title> of its group


@dataclass(frozen=True, eq=False)
class Chart:
    """A chart of a study.

    Attributes:
        name: stem of its file names.
        description: what it shows, for people who do not see it.
        draw: draws it into an empty figure, whose width tells a slide from a phone.
    """

    name: str
    description: str
    draw: Callable[[Figure], None]


def write_chart(folder: Path, chart: Chart) -> str:
    """Write NAME.svg and NAME.png for slides, replacing existing files; return the chart as HTML for a page.

    Raises:
        OutputError: a file cannot be written.
    """
    # Paths instead of text: slides look the same where DejaVu Sans is not installed.
    with _figure(*SLIDE_INCHES, font=_SLIDE_FONT, text_as="path") as figure:
        chart.draw(figure)
        for suffix, metadata in (("svg", {"Date": None}), ("png", {})):
            with atomic_write(folder / f"{chart.name}.{suffix}", overwrite=True) as part:
                figure.savefig(part, format=suffix, dpi=_SLIDE_DPI, metadata=metadata)
    sizes = {"wide": (*SLIDE_INCHES, _SLIDE_FONT), "narrow": (_NARROW_PX * _PX, _NARROW_PX * _PX, _NARROW_FONT)}
    variants = []
    for variant, (width, height, font) in sizes.items():
        with _figure(width, height, font=font) as figure:
            chart.draw(figure)
            variants.append(_inline_svg(figure, f"{chart.name}-{variant}", chart.description, variant))
    return "\n".join(variants)


@contextmanager
def _figure(width: float, height: float, *, font: float, text_as: str = "none") -> Iterator[Figure]:
    """Yield an empty figure without a display, with the style in force. Sizes in inches, the font in points."""
    matplotlib = require("matplotlib", "study")
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps every figure alive

    with matplotlib.rc_context({**_STYLE, "font.size": font, "axes.titlepad": font, "svg.fonttype": text_as}):
        yield Figure(figsize=(width, height), layout="constrained")


def _inline_svg(figure: Figure, prefix: str, description: str, class_: str) -> str:
    """Return the figure as an ``<svg>`` element that shares a page with others.

    Args:
        figure: drawn with ``svg.fonttype`` ``none``.
        prefix: unique within the page; makes ids unique.
        description: for screen readers.
        class_: of the element.
    """
    buffer = StringIO()
    with warnings.catch_warnings():
        # The page has other fonts than DejaVu Sans: a glyph that is missing here affects only the estimated width.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    referenced = set(re.findall(r"#(\w+)", buffer.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML has no namespaces
        old = dict(element.attrib)
        element.attrib.clear()
        for name, value in old.items():
            key = name.rpartition("}")[2]  # xlink:href is href since SVG 2
            if key == "id" and value.startswith(_TOOLTIP):
                element.set("class", "tooltip")
                title = ElementTree.Element("title")
                title.text = value.removeprefix(_TOOLTIP)
                element.insert(0, title)
            elif key == "id" and value in referenced:
                element.set("id", f"{prefix}-{value}")
            elif key == "style":
                # The font is that of the page; only its size and weight are Matplotlib's.
                element.set("style", re.sub(r"font-family: [^;]*;? ?", "", value))
            elif key != "id":  # Matplotlib numbers groups alike in every figure: two charts would share their ids
                element.set(key, re.sub(r"#(?=[mp]\w+\)?$)", f"#{prefix}-", value))
        for child in list(element):
            # A style sheet inside a page would apply to all of it.
            if child.tag.endswith("style"):
                element.remove(child)
        if element.tag in ("svg", "g", "defs") and not (element.text or "").strip():
            element.text = None
        element.tail = None
    root.attrib.clear()
    size = (f"{72 * inches:g}" for inches in figure.get_size_inches())
    attributes = {
        "viewBox": f"0 0 {' '.join(size)}",
        "role": "img",
        "aria-label": printable(description),
        "class": class_,
    }
    for name, value in attributes.items():
        root.set(name, value)
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    return re.sub("|".join(_CSS_COLORS), lambda match: _CSS_COLORS[match[0]], text)


def _page_chart(
    name: str,
    description: str,
    draw: Callable[[Figure, bool], None],
    *,
    wide: tuple[float, float],
    narrow: tuple[float, float],
) -> str:
    """Draw a chart of a report page, sizes in CSS pixels; ``draw`` is told whether the figure is the narrow one."""
    variants = []
    for variant, (width, height) in (("wide", wide), ("narrow", narrow)):
        with _figure(width * _PX, height * _PX, font=_PAGE_FONT) as figure:
            draw(figure, variant == "narrow")
            variants.append(_inline_svg(figure, f"{name}-{variant}", description, variant))
    return "\n".join(variants)


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis over whole decades, from ``10**low`` to ``10**high``."""

    low: int
    high: int

    @classmethod
    def around(cls, values: Iterable[float | None]) -> LogScale:
        """Return the decades that hold all finite positive ``values``, at least two."""
        logs = [math.log10(value) for value in values if value is not None and 0 < value < math.inf]
        if not logs:
            return cls(-2, 0)
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low if high - low >= 2 else high - 2, high)

    def percent(self, value: float | None) -> float:
        """Return the position of ``value`` in [0, 100], clipped to the axis; NaN is at the upper end."""
        if value is None or value <= 0:
            return 0.0
        if not math.isfinite(value):
            return 100.0
        return min(100.0, max(0.0, 100 * (math.log10(value) - self.low) / (self.high - self.low)))

    def clip(self, value: float) -> float:
        """Return the value at the position of ``value``, which can be drawn."""
        return float(10 ** (self.low + (self.high - self.low) * self.percent(value) / 100))

    def ticks(self, at_most: int) -> list[int]:
        """Return evenly spaced exponents to label."""
        step = math.ceil((self.high - self.low + 1) / at_most)
        return list(range(self.low, self.high + 1, step))


def loss_chart(history: Sequence[Epoch]) -> str:
    """Draw the mean training loss by epoch on a logarithmic scale."""
    scale = LogScale.around(epoch.loss for epoch in history)
    points = [(epoch.epoch, scale.clip(epoch.loss), f"{epoch.loss:.3g}") for epoch in history]
    ticks = {10.0**e: f"{10.0**e:g}" if -3 <= e <= 3 else power_of_ten(e) for e in scale.ticks(6)}
    return _curve("loss", "Training loss", points, ticks, (10.0**scale.low, 10.0**scale.high), "log")


#: Lower ends of the accuracy axis, and the number of ticks above each.
_ACCURACY_FLOORS = ((0.95, 5), (0.9, 5), (0.8, 4), (0.6, 4), (0.5, 5), (0.2, 4), (0.0, 4))


def accuracy_chart(history: Sequence[Epoch]) -> str:
    """Draw the validation accuracy by epoch."""
    lowest = min(epoch.accuracy for epoch in history)
    floor, steps = next((row for row in _ACCURACY_FLOORS if row[0] <= lowest), _ACCURACY_FLOORS[-1])
    points = [(epoch.epoch, epoch.accuracy, percentage(epoch.accuracy)) for epoch in history]
    ticks = {tick: f"{100 * tick:.0f}%" for step in range(steps + 1) for tick in [floor + (1 - floor) * step / steps]}
    return _curve("accuracy", "Validation accuracy", points, ticks, (floor, 1.0), "linear")


def _curve(
    name: str,
    title: str,
    points: Sequence[tuple[int, float, str]],
    ticks: dict[float, str],
    limits: tuple[float, float],
    scale: str,
) -> str:
    """Draw a curve of (epoch, value, label) points over the gridlines of ``ticks``, with a tooltip at each point."""
    epochs, values, labels = zip(*points, strict=True)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot(yscale=scale, xlim=(epochs[0] - 0.5 * (len(epochs) == 1), max(epochs[-1], 1.5)))
        axes.set_ylim(*limits)
        axes.minorticks_off()
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_xticks(_epoch_ticks(epochs))
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=SOFT, pad=6)
        # Not clipped: the best accuracy lies on the upper edge.
        axes.plot(epochs, values, color=ACCENT, linewidth=2, clip_on=False, zorder=3)
        for epoch, value, label in points:
            axes.plot(
                epoch, value, "o", color=ACCENT, markersize=9, clip_on=False, gid=f"{_TOOLTIP}epoch {epoch}: {label}"
            )
        axes.plot(epochs[-1], values[-1], "o", color=ACCENT, markersize=6, clip_on=False, zorder=4)

    description = f"{title}: {labels[0]} after epoch {epochs[0]}, {labels[-1]} after epoch {epochs[-1]}"
    return _page_chart(name, description, draw, wide=(_HALF_PX, 220), narrow=(_NARROW_PX, 200))


def _epoch_ticks(epochs: Sequence[int]) -> list[int]:
    """Return the first and the last epoch, and multiples of a step in between that leave space for these two."""
    first, last = epochs[0], epochs[-1]
    step = max(1, -(-(last - first) // 5))
    inner = [
        epoch for epoch in range(first, last) if epoch % step == 0 and min(epoch - first, last - epoch) >= step / 2
    ]
    return sorted({first, *inner, last})


def error_chart(checks: Sequence[Check]) -> str:
    """Draw the relative error of each check and its tolerance on one logarithmic axis."""
    scale = LogScale.around(
        error for check in checks for error in (check.relative_error, check.tolerance, check.reference_error)
    )
    left, right = 10.0**scale.low, 10.0**scale.high

    def draw(figure: Figure, narrow: bool) -> None:
        labels = [(check.subject, check.inputs) for check in checks]
        axes = _labelled_rows(figure, labels, narrow, right=12, scale=True)
        axes.set_xscale("log", subs=[])
        axes.set_xlim(left, right)
        exponents = scale.ticks(4 if narrow else 8)
        axes.set_xticks([10.0**e for e in exponents], [power_of_ten(e) for e in exponents])
        axes.grid(axis="x", color=RULE, linewidth=1)
        for row, check in enumerate(checks):
            bound, error = scale.clip(check.tolerance), scale.clip(check.relative_error)
            axes.barh(row, bound - left, left=left, height=_BAR_HEIGHT, color=GOOD, alpha=0.16, linewidth=0)
            axes.plot(
                [bound, bound],
                [row - _BAR_HEIGHT * 0.7, row + _BAR_HEIGHT * 0.7],
                color=GOOD,
                linewidth=2,
                clip_on=False,
            )
            if check.reference_error is not None:
                own = f"rounding error of the train form: {scientific(check.reference_error)}"
                axes.plot(
                    scale.clip(check.reference_error),
                    row,
                    "o",
                    markersize=13,
                    markerfacecolor="none",
                    markeredgecolor=SOFT,
                    clip_on=False,
                    gid=_TOOLTIP + own,
                )
            color, error_text = GOOD if check.passed else BAD, f"relative error: {scientific(check.relative_error)}"
            axes.plot(error, row, "o", markersize=8, color=color, clip_on=False, gid=_TOOLTIP + error_text)

    words = (
        f"{check.subject} on {check.inputs}: error {scientific(check.relative_error)}, tolerance "
        f"{scientific(check.tolerance)}"
        for check in checks
    )
    description = f"Relative errors on a logarithmic scale. {'; '.join(words)}"
    wide, narrow = (_WIDE_PX, 44 * len(checks) + 34), (_NARROW_PX, 66 * len(checks) + 34)
    return _page_chart("errors", description, draw, wide=wide, narrow=narrow)


_ROLE_COLORS: dict[Role, tuple[str, float]] = {  # with the opacity
    "train": (NEUTRAL, 1.0),
    "folded": (NEUTRAL, 1.0),
    "plain": (ACCENT, 1.0),
    "runtime": (ACCENT, 0.5),
}


def timing_chart(timings: Sequence[Timing]) -> str:
    """Draw the median time of each form as a bar, with the quartiles as whiskers."""
    longest = max(max(timing.q3_seconds, timing.median_seconds) for timing in timings)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = _labelled_rows(figure, [(timing.name, "") for timing in timings], narrow, right=0 if narrow else 160)
        axes.set_xlim(0, 1.02 * longest)
        axes.xaxis.set_visible(False)
        for row, timing in enumerate(timings):
            color, opacity = _ROLE_COLORS[timing.role]
            median = timing.median_seconds
            axes.barh(row, median, height=_BAR_HEIGHT, color=color, alpha=opacity, linewidth=0)
            # Quartiles on the wrong side of the median, from an edited file, would be lengths that Matplotlib refuses.
            whiskers = [[max(0.0, median - timing.q1_seconds)], [max(0.0, timing.q3_seconds - median)]]
            axes.errorbar(median, row, xerr=whiskers, color=INK, linewidth=1.3, capsize=4)
            for text, style, to_the_right in (
                (duration(median), _NAME, 98),
                (ratio(timing.speedup), _NOTE, 160),
            ):
                _write(axes, row, text, x=1, right=to_the_right - (160 if narrow else 0), above=narrow, **style)

    words = (f"{timing.name}: median {duration(timing.median_seconds)}" for timing in timings)
    return _page_chart(
        "timings",
        f"Time per batch. {'; '.join(words)}",
        draw,
        wide=(_WIDE_PX, 42 * len(timings)),
        narrow=(_NARROW_PX, 58 * len(timings)),
    )


_BAR_HEIGHT = 0.42  # in rows
_LABELS_PX = 300.0  # width of the column of labels in a wide chart
_SCALE_PX = 28.0  # height of the labels of the x axis
_NAME: dict[str, Any] = {"weight": "bold", "size": 14}
_NOTE: dict[str, Any] = {"color": SOFT, "size": 13}


def _labelled_rows(
    figure: Figure, labels: Sequence[tuple[str, str]], narrow: bool, *, right: float, scale: bool = False
) -> Axes:
    """Return axes with a row for each (name, note), the first on top; the labels are left of the bars, or above them.

    Args:
        figure: an empty one.
        labels: of the rows.
        narrow: put the labels above the bars.
        right: space to the right of the axes, in pixels.
        scale: leave space for the labels of the x axis.
    """
    width, height = 72 * figure.get_size_inches()
    left, bottom = 0.0 if narrow else _LABELS_PX, _SCALE_PX if scale else 0.0
    figure.set_layout_engine("none")
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom) / height), frameon=False
    )
    axes.set_ylim((len(labels) - 0.7, -0.7) if narrow else (len(labels) - 0.5, -0.5))
    axes.yaxis.set_visible(False)
    axes.tick_params(length=0, labelcolor=SOFT, pad=8)
    for row, (name, note) in enumerate(labels):
        line = 9 if note else 0  # half the distance of two lines
        _write(axes, row, name, right=-left, up=2 * line if narrow else line, above=narrow, ha="left", **_NAME)
        _write(axes, row, note, right=-left, up=0 if narrow else -line, above=narrow, ha="left", **_NOTE)
    return axes


def _write(
    axes: Axes,
    row: float,
    text: str,
    *,
    x: float = 0,
    right: float = 0,
    up: float = 0,
    above: bool = False,
    ha: str = "right",
    **style: Any,
) -> None:
    """Write text in a row or above its bar, ``right`` and ``up`` pixels from ``x`` in [0, 1] of the axes."""
    if above:
        row, up = row - _BAR_HEIGHT / 2, up + 11
    axes.annotate(
        printable(text),
        (x, row),
        xycoords=axes.get_yaxis_transform(),
        xytext=(right, up),
        textcoords="offset points",
        ha=ha,
        va="center",
        annotation_clip=False,
        **style,
    )


@dataclass(frozen=True)
class Bar:
    """One bar of :func:`draw_bars`.

    Attributes:
        label: left of the bar.
        value: its length; None if not measured.
        paper: length of the paper's bar below it; None for no such bar.
        text: written after the bar in place of the value.
        ours: whether it is one of ours, for the colour.
    """

    label: str
    value: float | None
    paper: float | None = None
    text: str = ""
    ours: bool = True


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
    if _is_narrow(figure):
        figure.set_figheight((90 + len(bars) * (44 if paper else 26)) * _PX)
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
    for row, bar in enumerate(bars):
        text = bar.text or ("not measured" if bar.value is None else f"{bar.value:.2f}{' here' if paper else ''}")
        axes.text(lengths[row] + gap, row - ours_up, text, va="center", color=colors[row], fontsize=_font(0.94))
        if bar.paper is not None:
            label = f"{bar.paper:,.2f} paper"
            axes.text(bar.paper + gap, row + paper_down, label, va="center", color=PAPER_TEXT, fontsize=_font(0.76))
    if line_at is not None:
        axes.axvline(line_at, color=INK, linewidth=1.2)
    axes.set_yticks(list(rows), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0.0, longest * (1.4 if _is_narrow(figure) else 1.25))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)


def add_panels(figure: Figure, count: int) -> list[Axes]:
    """Return axes side by side, or one below the other on a phone."""
    if _is_narrow(figure):
        figure.set_figheight(count * _NARROW_PX * _PX)
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
    axes.margins(0.2, 0.14)
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
    """Write each label beside its point, at the first of 24 positions with the smallest overlap penalty.

    Greedy, in the order of the points; positions are on three rings of eight directions around the point.
    """
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # otherwise positions of points and sizes of text are not known
    frame = axes.get_window_extent()
    taken = [(_box(*axes.transData.transform((point.x, point.y)), radius=6.0), _OVERLAP_TEXT) for point in points]
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
            if not penalty:
                break
        assert best is not None
        taken.append((best[1].get_window_extent(), _OVERLAP_TEXT))


def _ours(points: Iterable[Point]) -> list[Point]:
    return sorted((point for point in points if point.ours), key=lambda point: point.x)


def _boxes_along_line(axes: Axes, points: Sequence[Point]) -> list[Bbox]:
    corners = [axes.transData.transform((point.x, point.y)) for point in _ours(points)]
    steps = [step / _LINE_STEPS for step in range(1, _LINE_STEPS)]
    return [_box(*(a + step * (b - a)), radius=1.0) for a, b in pairwise(corners) for step in steps]


def _box(x: float, y: float, radius: float) -> Bbox:
    """Return a square around a point, in display pixels."""
    from matplotlib.transforms import Bbox

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


def draw_accuracies(figure: Figure, results: Sequence[Accuracies]) -> None:
    """Draw a dot per seed and a line at their mean for each variant; at the right the paper's accuracies, if any.

    The two panels share their rows but not their scales: the order is to be compared, and its spread over seeds.
    """
    narrow = _is_narrow(figure)
    if narrow:
        figure.set_figheight((90 + 40 * len(results)) * _PX)
    printed = any(paper is not None for _, _, paper in results)
    panels = figure.subplots(1, 2 if printed else 1, sharey=True, squeeze=False, width_ratios=(3, 2)[: 1 + printed])[0]
    size = _font(0.88 if narrow or len(results) <= _MOST_LARGE_ROWS else 0.59)
    _accuracy_panel(panels[0], "Here", [seeds for _, seeds, _ in results], OURS, size)
    if printed:
        paper = [[] if value is None else [value] for _, _, value in results]
        _accuracy_panel(panels[1], "Paper, ImageNet", paper, PAPER_TEXT, size)
    titles = [fill(title, 18) if narrow else title for title, _, _ in results]
    panels[0].set_yticks(range(len(results)), titles, fontsize=size)
    panels[0].set_ylim(len(results) - 0.4, -0.6)


def _accuracy_panel(axes: Axes, title: str, rows: Sequence[Sequence[float]], color: str, size: float) -> None:
    axes.set_title(title)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("top-1 accuracy (%)")
    axes.margins(x=0.2)
    for row, values in enumerate(rows):
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


def _is_narrow(figure: Figure) -> bool:
    """Whether the figure is for a phone; a drawing function may then set another height."""
    return bool(figure.get_figwidth() < 0.6 * SLIDE_INCHES[0])


def _font(factor: float) -> float:
    """Return a size in points, relative to the font size in force."""
    matplotlib = require("matplotlib", "study")
    return float(matplotlib.rcParams["font.size"]) * factor
