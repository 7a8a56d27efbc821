"""The learning curve: training loss and held-out accuracy, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from repvgg.studies.report.formatting import duration, integer, percentage, power, quantity
from repvgg.studies.report.layout import section
from repvgg.studies.report.markup import Markup, element, percent
from repvgg.studies.report.schema import Epoch, Report
from repvgg.studies.report.svg import LinearAxis, LogAxis, circle, line, strip, text

_HEIGHT = 170
_FLOORS = ((0.95, 5), (0.9, 5), (0.8, 4), (0.6, 4), (0.5, 5), (0.2, 4), (0.0, 4))  # lowest accuracy shown, steps to 1

Tick = tuple[float, str]  # position in percent, label


def learning(report: Report) -> Markup:
    """Two charts side by side."""
    training, data = report.training, report.data
    lead = (
        f"{quantity(training.epochs, 'epoch')} over {integer(data.train_count)} training images took "
        f"{duration(training.seconds)}; the last one ended at {percentage(training.accuracy)} on the "
        f"{integer(data.held_out_count)} held-out images."
    )
    if not training.history:
        return section("learning", "Learning curve", lead, element("p", "No history was kept."))
    charts = element("div", _loss(training.history), _accuracy(training.history), class_="charts")
    return section("learning", "Learning curve", lead, charts)


def _loss(history: Sequence[Epoch]) -> Markup:
    axis = LogAxis.around(epoch.loss for epoch in history)
    ticks = [(axis.position(10.0**exponent), _decade(exponent)) for exponent in axis.ticks()]
    points = [(epoch.epoch, axis.position(epoch.loss), f"{epoch.loss:.3g}") for epoch in history]
    return _chart("Training loss by epoch, logarithmic scale", "loss", points, ticks)


def _accuracy(history: Sequence[Epoch]) -> Markup:
    lowest = min(epoch.accuracy for epoch in history)
    floor, steps = next((row for row in _FLOORS if row[0] <= lowest), _FLOORS[-1])
    position = LinearAxis(floor, 1.0).position
    ticks = [(100 * step / steps, f"{100 * (floor + (1 - floor) * step / steps):.0f}%") for step in range(steps + 1)]
    points = [(epoch.epoch, position(epoch.accuracy), percentage(epoch.accuracy)) for epoch in history]
    return _chart("Held-out accuracy by epoch", "accuracy", points, ticks)


def _decade(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 3 else power(exponent)


def _chart(title: str, class_: str, points: Sequence[tuple[int, float, str]], ticks: Sequence[Tick]) -> Markup:
    """A curve through ``points`` (epoch, height in percent, figure) over the gridlines of ``ticks``."""
    epochs = [epoch for epoch, _, _ in points]
    place = LinearAxis(epochs[0], epochs[-1]).position if len(points) > 1 else _in_the_middle
    curve = [(place(epoch), _down(height), f"epoch {epoch}: {figure}") for epoch, height, figure in points]
    words = f"{title}: {points[0][2]} after epoch {epochs[0]}, {points[-1][2]} after epoch {epochs[-1]}"
    drawing = strip(_HEIGHT, words, *map(_grid, ticks), _curve(curve), *_dots(curve), *_epochs(epochs, place))
    caption = element("figcaption", title, element("output", points[-1][2]))
    return element("figure", caption, drawing, class_=f"chart {class_}")


def _in_the_middle(_: float) -> float:
    return 50.0


def _down(height: float) -> float:
    """Pixels from the top, for a height in percent."""
    return _HEIGHT * (1 - height / 100)


def _grid(tick: Tick) -> Markup:
    at, label = tick
    y = _down(at)
    return element("g", line(0, y, "100%", y, "grid"), text(-8, y + 4, label, "tick end"))


def _curve(curve: Sequence[tuple[float, float, str]]) -> Markup:
    """The line, in a box that stretches sideways with its place while the stroke keeps its width."""
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y, _ in curve)
    stretched = element("polyline", points=points, class_="curve", vector_effect="non-scaling-stroke")
    box = f"0 0 100 {_HEIGHT}"
    return element(
        "svg", stretched, viewBox=box, width="100%", height=_HEIGHT, preserveAspectRatio="none", class_="stretch"
    )


def _dots(curve: Sequence[tuple[float, float, str]]) -> list[Markup]:
    """A dot an epoch that tells its figure when pointed at; only the last one is always seen."""
    dots = [circle(percent(x), y, 5, "touch", hint) for x, y, hint in curve]
    x, y, hint = curve[-1]
    return [*dots, circle(percent(x), y, 4, "last", hint)]


def _epochs(epochs: Sequence[int], place: Callable[[float], float]) -> list[Markup]:
    """Labels under the chart: first and last epoch, and whole steps between."""
    step = max(1, -(-(epochs[-1] - epochs[0]) // 5))
    inner = [epoch for epoch in epochs if epoch % step == 0 and epochs[-1] - epoch >= step / 2 < epoch - epochs[0]]
    shown = sorted({epochs[0], *inner, epochs[-1]})
    return [text(percent(place(epoch)), _HEIGHT + 21, str(epoch), "tick middle") for epoch in shown]
