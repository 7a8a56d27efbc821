"""Charts need no display, are the same each time, and show what the numbers say."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial
from importlib.resources import files

import pytest
from matplotlib.figure import Figure

from repvgg.errors import OutputError
from repvgg.studies.report import Epoch, charts
from repvgg.studies.report.charts import (
    SLIDE_INCHES,
    Bar,
    Chart,
    LogScale,
    Point,
    accuracy_chart,
    add_panels,
    draw_accuracies,
    draw_bars,
    draw_scatter,
    error_chart,
    loss_chart,
    timing_chart,
    write_chart,
)

BARS = [Bar("one", 1.5, 2.0), Bar("two", None, 1.0), Bar("three", 0.5, text="out of memory", ours=False)]
POINTS = [Point(f"network {i}", 10.0 + i, 70.0 + 2.0 * (i % 3), bool(i % 2)) for i in range(6)]
NARROW_INCHES = (5.0, 5.0)


def scatter(figure, points):
    draw_scatter(figure.add_subplot(), "Scatter", points, "speed", "accuracy")


def drawn(monkeypatch, chart, data, narrow=False):
    """The axes of a page chart."""
    monkeypatch.setattr(charts, "_page_chart", lambda name, description, draw, **sizes: draw)
    figure = Figure(figsize=NARROW_INCHES if narrow else SLIDE_INCHES)
    chart(data)(figure, narrow)
    return figure.axes[0]


@pytest.mark.parametrize(
    "draw",
    [
        partial(draw_bars, title="Bars", unit="times", bars=BARS, line_at=1.0),
        partial(draw_bars, title="Bars", unit="times", bars=[Bar("one", 2.0)]),
        partial(draw_bars, title="Nothing yet", unit="times", bars=[Bar("one", None)]),
        partial(scatter, points=POINTS),
        partial(scatter, points=[]),
    ],
)
def test_files_are_complete_and_reproducible(tmp_path, draw):
    markup = write_chart(tmp_path, Chart("p", "words", draw))
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "<text" not in svg, "slides must not depend on installed fonts"
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "p.svg"]
    before = (tmp_path / "p.png").read_bytes()
    assert write_chart(tmp_path, Chart("p", "words", draw)) == markup
    assert (tmp_path / "p.svg").read_text(encoding="utf-8") == svg
    assert (tmp_path / "p.png").read_bytes() == before


def test_page_markup_has_a_wide_and_a_narrow_variant_in_the_colors_of_the_page(tmp_path):
    draw = partial(draw_bars, title="<b>Bars</b> for $1", unit="times", bars=BARS, line_at=1.0)
    markup = write_chart(tmp_path, Chart("p", 'a "b" <c>', draw))
    wide, narrow = ET.fromstring(f"<div>{markup}</div>")
    assert [svg.get("class") for svg in (wide, narrow)] == ["wide", "narrow"]
    for svg in (wide, narrow):
        assert (svg.get("role"), svg.get("aria-label")) == ("img", 'a "b" <c>')
        assert "<b>Bars</b> for $1" in [text.text for text in svg.iter("text")]
    widths = [float(svg.get("viewBox").split()[2]) for svg in (wide, narrow)]
    assert widths == [864.0, 364.0]
    assert not re.search("#[0-9a-f]{6}|font-family|xmlns|<style|<metadata", markup)
    ids = re.findall(r' id="([^"]*)"', markup)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'#([\w-]+)[")]', markup)) == set(ids)


def test_colors_are_distinct_and_their_variables_exist_in_both_schemes():
    css = files("repvgg.studies.report").joinpath("style.css").read_text(encoding="utf-8")
    assert len({color.lower() for color in charts._CSS_COLORS}) == len(charts._CSS_COLORS)
    for variable in charts._CSS_COLORS.values():
        name = re.search(r"--[\w-]+", variable)[0]
        assert len(re.findall(f"{name}:", css)) >= 2, name
        assert (re.search(f"{name}: (#)?", css)[1] is None) == variable.startswith("rgb("), name


def test_drawing_needs_no_display():
    figure = Figure(figsize=SLIDE_INCHES)
    draw_bars(figure, "Bars", "times", BARS)
    assert not figure.canvas.manager
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["1.50 here", "2.00 paper", "not measured", "1.00 paper", "out of memory"]


def test_labels_cover_neither_points_nor_each_other():
    figure = Figure(figsize=SLIDE_INCHES, layout="constrained")
    scatter(figure, POINTS)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(POINTS)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    places = [figure.axes[0].transData.transform((point.x, point.y)) for point in POINTS]
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_a_narrow_figure_is_as_high_as_it_needs():
    few, many = Figure(figsize=NARROW_INCHES), Figure(figsize=NARROW_INCHES)
    draw_bars(few, "Bars", "times", BARS[:1])
    draw_bars(many, "Bars", "times", BARS * 4)
    assert many.get_figheight() > few.get_figheight() + 12 * 0.3
    slide = Figure(figsize=SLIDE_INCHES)
    draw_accuracies(slide, [("one", [90.0], None)] * 20)
    assert tuple(slide.get_size_inches()) == SLIDE_INCHES


def test_panels_are_side_by_side_on_a_slide_and_stacked_on_a_phone():
    for size, same in ((SLIDE_INCHES, "y0"), (NARROW_INCHES, "x0")):
        one, other = (axes.get_position() for axes in add_panels(Figure(figsize=size), 2))
        assert getattr(one, same) == getattr(other, same)


def test_a_missing_folder(tmp_path):
    with pytest.raises(OutputError, match="no folder"):
        write_chart(tmp_path / "missing", Chart("p", "words", lambda figure: None))


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([3e-7, 2e-5, None], LogScale(-7, -4)),
        ([1e-6], LogScale(-8, -6)),
        ([0.0, float("inf"), float("nan")], LogScale(-2, 0)),
        ([], LogScale(-2, 0)),
    ],
)
def test_log_scale_spans_whole_decades(values, scale):
    assert LogScale.around(values) == scale


def test_positions_on_a_log_scale():
    scale = LogScale(-8, -4)
    expected = {1e-8: 0, 1e-6: 50, 1e-4: 100, 1.0: 100, 1e-20: 0, 0.0: 0, float("nan"): 100, float("inf"): 100}
    assert {value: scale.percent(value) for value in expected} == pytest.approx(expected, nan_ok=True)
    assert [scale.clip(value) for value in (0.0, 1e-6, 1.0)] == pytest.approx([1e-8, 1e-6, 1e-4])
    assert len(LogScale(-16, 0).ticks(6)) <= 6


@pytest.mark.parametrize("narrow", [False, True])
def test_timing_bars_and_whiskers_are_as_long_as_the_times(monkeypatch, report, narrow):
    axes = drawn(monkeypatch, timing_chart, report.timings, narrow)
    assert [bar.get_width() for bar in axes.patches] == [timing.median_seconds for timing in report.timings]
    whiskers = [collection.get_segments()[0][:, 0].tolist() for collection in axes.collections]
    assert whiskers == [pytest.approx([timing.q1_seconds, timing.q3_seconds]) for timing in report.timings]
    written = [text.get_text() for text in axes.texts]
    assert {"plain form", "5.02\u00a0ms", "1.92×"} <= set(written)
    assert axes.get_xlim() == pytest.approx((0.0, 1.02 * report.timings[0].q3_seconds))


@pytest.mark.parametrize("narrow", [False, True])
def test_errors_and_tolerances_are_at_their_values(monkeypatch, report, narrow):
    failed = replace(report.evidence[0], passed=False, relative_error=1.0, reference_error=None)
    checks = (report.evidence[0], failed)
    axes = drawn(monkeypatch, error_chart, checks, narrow)
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [pytest.approx((1e-7, 1.19e-5))] * 2
    bound, own, error, other_bound, other_error = (line.get_xdata() for line in axes.lines)
    assert list(bound) == list(other_bound) == pytest.approx([1.2e-5] * 2)
    assert [own[0], error[0], other_error[0]] == pytest.approx([2.7e-7, 2.9e-7, 1.0])
    assert [axes.lines[index].get_color() for index in (2, 4)] == [charts.GOOD, charts.BAD]
    assert axes.get_xlim() == pytest.approx((1e-7, 1.0))


def test_not_a_number_is_at_the_upper_end_of_the_axis(monkeypatch, report):
    broken = replace(report.evidence[0], relative_error=float("nan"), reference_error=None)
    axes = drawn(monkeypatch, error_chart, (broken,))
    assert axes.lines[-1].get_xdata()[0] == pytest.approx(axes.get_xlim()[1])


def test_learning_curves_go_through_every_epoch(monkeypatch, report):
    history = report.training.history
    losses = drawn(monkeypatch, loss_chart, history)
    accuracies = drawn(monkeypatch, accuracy_chart, history)
    assert list(losses.lines[0].get_ydata()) == pytest.approx([1.9, 0.31, 0.042])
    assert list(accuracies.lines[0].get_ydata()) == [0.62, 0.91, 0.95]
    assert [line.get_gid() for line in accuracies.lines[1:4]] == [
        "tooltip:epoch 1: 62.0%",
        "tooltip:epoch 2: 91.0%",
        "tooltip:epoch 3: 95.0%",
    ]
    assert accuracies.get_ylim() == (0.6, 1.0)
    assert losses.get_ylim() == (0.01, 10.0)
    assert [tick.get_text() for tick in losses.get_yticklabels()] == ["0.01", "0.1", "1", "10"]


def test_one_epoch_is_drawn_too():
    for chart in (loss_chart, accuracy_chart):
        assert chart([Epoch(1, 0.5, 0.5)]).count("<title>epoch 1: ") == 2


@pytest.mark.parametrize(
    ("epochs", "ticks"), [((1, 20), [1, 4, 8, 12, 16, 20]), ((1, 3), [1, 2, 3]), ((1, 1), [1]), ((5, 6), [5, 6])]
)
def test_ticks_of_epochs_include_the_first_and_the_last(epochs, ticks):
    assert charts._epoch_ticks(range(epochs[0], epochs[1] + 1)) == ticks
