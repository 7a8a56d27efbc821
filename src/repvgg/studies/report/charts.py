"""Pictures fit for a slide: few words, large ones, beside what they name; drawn without a screen, as SVG and PNG.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; marks differ, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repvgg._files import atomic_write
from repvgg.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

HERE, PAPER, OTHERS, INK, RULE = "#0072B2", "#9A9A9A", "#D55E00", "#222222", "#DDDDDD"
WIDE = (12.0, 6.75)  # inches: a slide of 16 to 9
_DOTS = 160  # to the inch
_STYLE: dict[Any, Any] = {
    "font.size": 17,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 21,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 18,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "repvgg",  # the same picture gives the same bytes
    "svg.fonttype": "path",
}
_WORDS, _LINE = 8, 1  # how bad it is to cover them
_STEPS = 24  # from one point of a line to the next, for what is written beside it
_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_PLACES = tuple((9 * ring * x, 9 * ring * y) for ring in (1, 2, 3) for x, y in _AROUND)  # of a label, from its point


@dataclass(frozen=True, eq=False)
class Chart:
    """One figure.

    Attributes:
        name: of its files, without the suffix.
        words: what it shows, for those who do not see it.
        draw: puts it into an empty figure.
    """

    name: str
    words: str
    draw: Callable[[Figure], None]


def write_chart(folder: Path, picture: Chart) -> str:
    """Draw it into NAME.svg and NAME.png, replacing what is there; return the SVG.

    Raises:
        OutputError: a file cannot be written.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=WIDE, layout="constrained")
        picture.draw(figure)
        for suffix, metadata in (("svg", {"Date": None}), ("png", {})):
            target = folder / f"{picture.name}.{suffix}"
            with atomic_write(target, overwrite=True) as part:
                figure.savefig(part, format=suffix, dpi=_DOTS, metadata=metadata)
    try:
        return (folder / f"{picture.name}.svg").read_text(encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{picture.name}.svg in {str(folder)!r} cannot be read back: {error.strerror}.") from error


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, a second one for the paper, what stands behind it, and whether it is ours."""

    label: str
    value: float | None
    paper: float | None = None
    text: str = ""
    ours: bool = True


def draw_bars(figure: Figure, title: str, unit: str, bars: Sequence[Bar], *, line_at: float | None = None) -> None:
    """Horizontal bars, the first on top; the paper's as thinner gray ones below ours, each with its figure behind it.

    Args:
        figure: an empty one.
        title: what is to be seen.
        unit: of the lengths, under the axis.
        bars: what to draw.
        line_at: a length that matters, such as 1 where ratios are drawn.
    """
    axes = figure.add_subplot()
    axes.set_title(title)
    both = any(bar.paper is not None for bar in bars)
    top, low = (0.2, 0.24) if both else (0.0, 0.0)
    places = range(len(bars))
    colors = [HERE if bar.ours else OTHERS for bar in bars]
    axes.barh(
        [place - top for place in places], [bar.value or 0.0 for bar in bars], 0.44 if both else 0.7, color=colors
    )
    if both:
        axes.barh([place + low for place in places], [bar.paper or 0.0 for bar in bars], 0.3, color=PAPER)
    longest = max((length for bar in bars for length in (bar.value, bar.paper) if length is not None), default=1.0)
    for place, bar in enumerate(bars):
        words = bar.text or ("not measured" if bar.value is None else f"{bar.value:.2f}{' here' if both else ''}")
        _write_behind(axes, bar.value or 0.0, place - top, words, colors[place], longest)
        if bar.paper is not None:
            _write_behind(axes, bar.paper, place + low, f"{bar.paper:,.2f} paper", "#6E6E6E", longest, 13)
    if line_at is not None:
        axes.axvline(line_at, color=INK, linewidth=1.2)
    axes.set_yticks(list(places), [bar.label for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0.0, longest * 1.25)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)


def _write_behind(
    axes: Axes, length: float, place: float, words: str, color: str, longest: float, size: float = 16
) -> None:
    axes.text(length + longest * 0.012, place, words, va="center", color=color, fontsize=size)


@dataclass(frozen=True)
class Point:
    """A model in the plane."""

    label: str
    x: float
    y: float
    ours: bool


def draw_scatter(axes: Axes, title: str, points: Sequence[Point], x_label: str, y_label: str) -> None:
    """Points with their names beside them, ours as blue dots on a line, others as orange squares; x is logarithmic."""
    axes.set_title(title)
    axes.set_xscale("log")
    ours = sorted((point for point in points if point.ours), key=lambda point: point.x)
    others = [point for point in points if not point.ours]
    axes.plot([p.x for p in ours], [p.y for p in ours], "o-", color=HERE, markersize=10, linewidth=2.5, zorder=3)
    axes.plot([p.x for p in others], [p.y for p in others], "s", color=OTHERS, markersize=9, zorder=3)
    axes.margins(0.2, 0.14)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _plain_numbers(axes)
    label_points(axes, points)


def _plain_numbers(axes: Axes) -> None:
    """1000 rather than 10³ on the axis of speeds."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def label_points(axes: Axes, points: Iterable[Point], size: float = 13) -> None:
    """Write each name beside its point, where it covers no point and no other name as far as there is such a place."""
    points = list(points)
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # so that the places of points and the sizes of words are known
    taken = [(_around(axes, point), _WORDS) for point in points]
    taken += [(box, _LINE) for box in _along_the_line(axes, points)]
    for point in points:
        best, fewest = None, None
        for place in _PLACES:
            text = _label(axes, point, place, size)
            box = text.get_window_extent()
            clashes = sum(weight for other, weight in taken if box.overlaps(other))
            clashes += 0 if _inside(axes, box) else 2 * _WORDS
            if fewest is None or clashes < fewest:
                if best is not None:
                    best.remove()
                best, fewest = text, clashes
            else:
                text.remove()
        assert best is not None
        taken.append((best.get_window_extent(), _WORDS))


def _around(axes: Axes, point: Point) -> Bbox:
    x, y = axes.transData.transform((point.x, point.y))
    return _square(x, y, 6.0)


def _square(x: float, y: float, radius: float) -> Bbox:
    """In dots of the picture."""
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _along_the_line(axes: Axes, points: Sequence[Point]) -> list[Bbox]:
    """Small squares where the line through our points runs."""
    ours = sorted((point for point in points if point.ours), key=lambda point: point.x)
    places = [axes.transData.transform((point.x, point.y)) for point in ours]
    shares = [step / _STEPS for step in range(1, _STEPS)]
    return [
        _square(one[0] + share * (other[0] - one[0]), one[1] + share * (other[1] - one[1]), 1.0)
        for one, other in pairwise(places)
        for share in shares
    ]


def _inside(axes: Axes, box: Bbox) -> bool:
    frame = axes.get_window_extent()
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def _label(axes: Axes, point: Point, place: tuple[int, int], size: float) -> Any:
    across = "left" if place[0] > 0 else "right" if place[0] else "center"
    along = "bottom" if place[1] > 0 else "top" if place[1] else "center"
    return axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=place,
        textcoords="offset points",
        ha=across,
        va=along,
        fontsize=size,
        color=HERE if point.ours else OTHERS,
    )


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
