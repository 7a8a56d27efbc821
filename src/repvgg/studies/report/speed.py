"""How fast the forms run side by side."""

from __future__ import annotations

from collections.abc import Sequence

from repvgg.studies.report.formatting import duration, quantity, ratio
from repvgg.studies.report.layout import figures, section
from repvgg.studies.report.markup import Child, Markup, element, join, percent
from repvgg.studies.report.schema import Report, Timing
from repvgg.studies.report.svg import LinearAxis, line, rect, strip

_HEIGHT = 30
_COLUMNS = ("Form", "Median a batch", "Middle half of the rounds", "Times as fast as the train form", "Batch")


def speed(report: Report) -> Markup:
    """One sentence on the outcome, bars with the spread, and the figures."""
    timings = report.timings
    if not timings:
        return section("speed", "How fast is it?", "Nothing was timed.")
    axis = LinearAxis(0.0, max(max(timing.q3_seconds, timing.median_seconds) for timing in timings) * 1.02)
    rows = [part for timing in timings for part in _bar(timing, axis)]
    bars = element("div", *rows, class_="bars")
    numbers = figures("Time a batch", _COLUMNS, map(_row, timings), "timings")
    return section("speed", "How fast is it?", outcome(report), _method(timings), bars, numbers)


def outcome(report: Report) -> Markup:
    """The verdict on the plain form: faster, not faster, or too close to call."""
    plain = report.timing("plain")
    if plain is None:
        return join("The plain form was not timed.")
    half = f"(middle half of the rounds {plain.speedup_q1:.2f}–{ratio(plain.speedup_q3)})"
    spread = f"{ratio(plain.speedup)} {half}"
    if plain.speedup <= 1:
        words = "The plain form is not faster than the train form here: "
        return join(element("strong", words, class_="bad"), f"{spread}.")
    if plain.speedup_q1 <= 1:
        words = "The plain form is not clearly faster than the train form here: "
        return join(element("strong", words), f"{spread}, so some of the rounds went the other way.")
    return join("The plain form runs ", element("strong", ratio(plain.speedup)), f" as fast as the train form {half}.")


def _method(timings: Sequence[Timing]) -> Markup:
    rounds = sorted({timing.rounds for timing in timings})
    spread = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return element(
        "p",
        f"All forms took turns, {spread} rounds each. Bars are medians, whiskers span the middle half; shorter is "
        "faster.",
        class_="quiet",
    )


def _bar(timing: Timing, axis: LinearAxis) -> tuple[Markup, Markup, Markup]:
    """Name, bar with whiskers, figures."""
    low, high = (percent(axis.position(edge)) for edge in (timing.q1_seconds, timing.q3_seconds))
    middle = _HEIGHT / 2
    bar = rect(0, 5, percent(axis.position(timing.median_seconds)), _HEIGHT - 10, f"bar {timing.role}", radius=2)
    whiskers = (
        line(low, middle, high, middle, "whisker"),
        line(low, middle - 5, low, middle + 5, "whisker"),
        line(high, middle - 5, high, middle + 5, "whisker"),
    )
    name = timing.name
    figure = join(duration(timing.median_seconds), element("small", f" {ratio(timing.speedup)}"))
    return (
        element("span", name, class_="strip-label"),
        strip(_HEIGHT, f"{name}: median {duration(timing.median_seconds)}", bar, *whiskers),
        element("span", figure, class_="strip-value"),
    )


def _row(timing: Timing) -> tuple[str, tuple[Child, ...]]:
    spread = f"{duration(timing.q1_seconds)} – {duration(timing.q3_seconds)}"
    speedup = join(
        ratio(timing.speedup),
        None if timing.role == "train" else element("small", f"{timing.speedup_q1:.2f}–{ratio(timing.speedup_q3)}"),
    )
    return timing.name, (duration(timing.median_seconds), spread, speedup, quantity(timing.batch, "image"))
