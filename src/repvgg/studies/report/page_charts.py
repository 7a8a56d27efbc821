"""Charts of a report page: Matplotlib figures as inline SVG; learning curves, errors and timings of the quickstart.

The text of an inline SVG is text in the font of the page, and its colours are CSS variables, so that it follows the
light or dark scheme. Each chart is drawn twice, for wide and for narrow screens; ``style.css`` shows one of the two.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from repvgg.errors import require
from repvgg.studies.report.formatting import duration, percentage, power_of_ten, printable, ratio, scientific
from repvgg.studies.report.schema import Check, Epoch, Role, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

_FONT = 13.0  # points, and pixels of the page
PX = 1 / 72  # inches: one unit of Matplotlib's SVG is one CSS pixel at natural size
WIDE_PX, _HALF_PX, NARROW_PX = 1056.0, 500.0, 364.0  # the column of the page, half of it, a phone's
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
TOOLTIP = "tooltip:"  # a gid with this prefix becomes the <title> of its group


@contextmanager
def new_figure(width: float, height: float, *, font: float, text_as: str = "none") -> Iterator[Figure]:
    """Yield an empty figure without a display, with the style in force. Sizes in inches, the font in points."""
    matplotlib = require("matplotlib", "study")
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps every figure alive

    with matplotlib.rc_context({**_STYLE, "font.size": font, "axes.titlepad": font, "svg.fonttype": text_as}):
        yield Figure(figsize=(width, height), layout="constrained")


def inline_svg(figure: Figure, prefix: str, description: str, class_: str) -> str:
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
            if key == "id" and value.startswith(TOOLTIP):
                element.set("class", "tooltip")
                title = ElementTree.Element("title")
                title.text = value.removeprefix(TOOLTIP)
                element.insert(0, title)
            elif key == "id" and value in referenced:
                element.set("id", f"{prefix}-{value}")
            elif key == "style":
                # The font is that of the page; only its size and weight are Matplotlib's.
                element.set("style", re.sub(r"font-family: [^;]*;? ?", "", value))
            elif key != "id":  # Matplotlib numbers groups alike in every figure: two charts would share their ids
                element.set(key, re.sub(r"#(?=[mp]\w+\)?$)", f"#{prefix}-", value))
        for style in element.findall("{*}style"):  # inside a page it would apply to all of it
            element.remove(style)
        if element.tag in ("svg", "g", "defs") and not (element.text or "").strip():
            element.text = None
        element.tail = None
    width, height = figure.get_size_inches() / PX
    root.attrib.clear()  # without a width and a height, which are in points, the size is that of the style sheet
    root.attrib |= {
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": printable(description),
        "class": class_,
    }
    text = ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    return re.sub("|".join(_CSS_COLORS), lambda match: _CSS_COLORS[match[0]], text)


def page_chart(
    name: str,
    description: str,
    draw: Callable[[Figure, bool], None],
    *,
    wide: tuple[float, float],
    narrow: tuple[float, float],
) -> str:
    """Draw a chart of a report page, sizes in CSS pixels; ``draw`` takes whether the figure is the narrow one."""
    variants = []
    for variant, (width, height) in (("wide", wide), ("narrow", narrow)):
        with new_figure(width * PX, height * PX, font=_FONT) as figure:
            draw(figure, variant == "narrow")
            variants.append(inline_svg(figure, f"{name}-{variant}", description, variant))
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
    """Draw the mean training loss by epoch on a logarithmic scale, and the validation loss as a dashed line."""
    validation = [(epoch.epoch, epoch.val_loss) for epoch in history if epoch.val_loss is not None]
    scale = LogScale.around([epoch.loss for epoch in history] + [loss for _, loss in validation])
    points = [(epoch.epoch, scale.clip(epoch.loss), f"{epoch.loss:.3g}") for epoch in history]
    ticks = {10.0**e: f"{10.0**e:g}" if -3 <= e <= 3 else power_of_ten(e) for e in scale.ticks(6)}
    limits = (10.0**scale.low, 10.0**scale.high)
    second = [(epoch, scale.clip(loss)) for epoch, loss in validation]
    return _curve("loss", "Training loss", points, ticks, limits, "log", second)


#: Lower ends of the accuracy axis, and the number of ticks above each.
_ACCURACY_FLOORS = ((0.95, 5), (0.9, 5), (0.8, 4), (0.6, 4), (0.5, 5), (0.2, 4), (0.0, 4))


def accuracy_chart(history: Sequence[Epoch], title: str = "Validation accuracy") -> str:
    """Draw the validation accuracy, or another share that ``title`` names, by epoch."""
    lowest = min(epoch.accuracy for epoch in history)
    floor, steps = next((row for row in _ACCURACY_FLOORS if row[0] <= lowest), _ACCURACY_FLOORS[-1])
    points = [(epoch.epoch, epoch.accuracy, percentage(epoch.accuracy)) for epoch in history]
    ticks = {tick: f"{100 * tick:.0f}%" for step in range(steps + 1) for tick in [floor + (1 - floor) * step / steps]}
    return _curve("accuracy", title, points, ticks, (floor, 1.0), "linear")


def _curve(
    name: str,
    title: str,
    points: Sequence[tuple[int, float, str]],
    ticks: dict[float, str],
    limits: tuple[float, float],
    scale: str,
    second: Sequence[tuple[int, float]] = (),
) -> str:
    """Draw a curve of (epoch, value, label) points over the gridlines of ``ticks``, with a tooltip at each point.

    ``second`` are the points (epoch, value) of a dashed line.
    """
    epochs, values, labels = zip(*points, strict=True)

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot(yscale=scale, xlim=(epochs[0] - 0.5 * (len(epochs) == 1), max(epochs[-1], 1.5)))
        axes.set_ylim(*limits)
        axes.minorticks_off()  # a logarithmic axis has eight per decade
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_xticks(_epoch_ticks(epochs))
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=SOFT, pad=6)
        if second:
            axes.plot(*zip(*second, strict=True), "--", color=SOFT, linewidth=1.6, clip_on=False, zorder=2)
        # Not clipped: the best accuracy lies on the upper edge.
        axes.plot(epochs, values, color=ACCENT, linewidth=2, clip_on=False, zorder=3)
        for epoch, value, label in points:
            axes.plot(
                epoch, value, "o", color=ACCENT, markersize=9, clip_on=False, gid=f"{TOOLTIP}epoch {epoch}: {label}"
            )
        axes.plot(epochs[-1], values[-1], "o", color=ACCENT, markersize=6, clip_on=False, zorder=4)

    description = f"{title}: {labels[0]} after epoch {epochs[0]}, {labels[-1]} after epoch {epochs[-1]}"
    return page_chart(name, description, draw, wide=(_HALF_PX, 220), narrow=(NARROW_PX, 200))


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
        axes, bar = labelled_rows(figure, labels, narrow, right=12, scale=True)
        axes.set_xscale("log", subs=[])
        axes.set_xlim(left, right)
        exponents = scale.ticks(4 if narrow else 8)
        axes.set_xticks([10.0**e for e in exponents], [power_of_ten(e) for e in exponents])
        axes.grid(axis="x", color=RULE, linewidth=1)
        for row, check in enumerate(checks):
            bound, error = scale.clip(check.tolerance), scale.clip(check.relative_error)
            axes.barh(row, bound - left, left=left, height=bar, color=GOOD, alpha=0.16, linewidth=0)
            axes.plot([bound] * 2, [row - 0.7 * bar, row + 0.7 * bar], color=GOOD, linewidth=2, clip_on=False)
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
                    gid=TOOLTIP + own,
                )
            color, error_text = GOOD if check.passed else BAD, f"relative error: {scientific(check.relative_error)}"
            axes.plot(error, row, "o", markersize=8, color=color, clip_on=False, gid=TOOLTIP + error_text)

    words = (
        f"{check.subject} on {check.inputs}: error {scientific(check.relative_error)}, tolerance "
        f"{scientific(check.tolerance)}"
        for check in checks
    )
    description = f"Relative errors on a logarithmic scale. {'; '.join(words)}"
    wide, narrow = (WIDE_PX, 46 * len(checks) + 34), (NARROW_PX, 76 * len(checks) + 34)
    return page_chart("errors", description, draw, wide=wide, narrow=narrow)


@dataclass(frozen=True)
class IouBar:
    """One bar of :func:`iou_chart`."""

    name: str  # of a class
    iou: float | None  # None: the class is absent


def iou_chart(bars: Sequence[IouBar]) -> str:
    """Draw the intersection over union of each class as a bar from 0 to 100 %."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes, bar = labelled_rows(figure, [(one.name, "") for one in bars], narrow, right=0 if narrow else 80)
        axes.set_xlim(0, 1)
        axes.xaxis.set_visible(False)
        for row, one in enumerate(bars):
            axes.barh(row, 1, height=bar, color=RULE, linewidth=0)
            axes.barh(row, one.iou or 0.0, height=bar, color=ACCENT, linewidth=0)
            text = "absent" if one.iou is None else percentage(one.iou)
            write_in_row(axes, row, text, x=1, right=0 if narrow else 80, above=narrow, **NAME_STYLE)

    words = (f"{one.name}: {'absent' if one.iou is None else percentage(one.iou)}" for one in bars)
    wide, narrow = (WIDE_PX, 34 * len(bars)), (NARROW_PX, 54 * len(bars))
    return page_chart("iou", f"IoU of each class. {'; '.join(words)}", draw, wide=wide, narrow=narrow)


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
        labels = [(timing.name, "") for timing in timings]
        axes, bar = labelled_rows(figure, labels, narrow, right=0 if narrow else 160)
        axes.set_xlim(0, 1.02 * longest)
        axes.xaxis.set_visible(False)
        for row, timing in enumerate(timings):
            color, opacity = _ROLE_COLORS[timing.role]
            median = timing.median_seconds
            axes.barh(row, median, height=bar, color=color, alpha=opacity, linewidth=0)
            # Quartiles on the wrong side of the median, from an edited file, would be lengths that Matplotlib refuses.
            whiskers = [[max(0.0, median - timing.q1_seconds)], [max(0.0, timing.q3_seconds - median)]]
            axes.errorbar(median, row, xerr=whiskers, color=INK, linewidth=1.3, capsize=4)
            for text, style, to_the_right in (
                (duration(median), NAME_STYLE, 98),
                (ratio(timing.speedup), NOTE_STYLE, 160),
            ):
                write_in_row(axes, row, text, x=1, right=to_the_right - (160 if narrow else 0), above=narrow, **style)

    words = (f"{timing.name}: median {duration(timing.median_seconds)}" for timing in timings)
    return page_chart(
        "timings",
        f"Time per batch. {'; '.join(words)}",
        draw,
        wide=(WIDE_PX, 42 * len(timings)),
        narrow=(NARROW_PX, 54 * len(timings)),
    )


_BAR_PX = 18.0  # thickness of a bar
_LABELS_PX = 300.0  # width of the column of labels in a wide chart
_SCALE_PX = 28.0  # height of the labels of the x axis
NAME_STYLE: dict[str, Any] = {"weight": "bold", "size": 14}
NOTE_STYLE: dict[str, Any] = {"color": SOFT, "size": 13}


def labelled_rows(
    figure: Figure, labels: Sequence[tuple[str, str]], narrow: bool, *, right: float, scale: bool = False
) -> tuple[Axes, float]:
    """Return axes with a labelled row for each (name, note), the first on top, and the thickness of a bar in rows.

    Args:
        figure: an empty one.
        labels: of the rows.
        narrow: put the labels above the bars instead of to their left.
        right: space to the right of the axes, in pixels.
        scale: leave space for the labels of the x axis.
    """
    width, height = figure.get_size_inches() / PX
    left, bottom = 0.0 if narrow else _LABELS_PX, _SCALE_PX if scale else 0.0
    figure.set_layout_engine("none")  # fixed margins: the bars of both charts begin at the same x
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom) / height), frameon=False
    )
    below = 0.3 if narrow else 0.5  # the share of a row below the middle of its bar
    axes.set_ylim(len(labels) - 1 + below, below - 1)
    axes.yaxis.set_visible(False)
    axes.tick_params(length=0, labelcolor=SOFT, pad=8)
    for row, (name, note) in enumerate(labels):
        line = 9 if note else 0  # half the distance of two lines
        write_in_row(
            axes, row, name, right=-left, up=2 * line if narrow else line, above=narrow, ha="left", **NAME_STYLE
        )
        write_in_row(axes, row, note, right=-left, up=0 if narrow else -line, above=narrow, ha="left", **NOTE_STYLE)
    return axes, _BAR_PX * len(labels) / (height - bottom)


def write_in_row(
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
        up += _BAR_PX / 2 + 11
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
