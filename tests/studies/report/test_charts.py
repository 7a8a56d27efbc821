"""Charts of studies need no display and are the same each time; their labels do not overlap."""

import re
import xml.etree.ElementTree as ET
from functools import partial
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from repvgg.errors import OutputError
from repvgg.studies.report import charts
from repvgg.studies.report.charts import (
    SLIDE_INCHES,
    Bar,
    Chart,
    Point,
    add_panels,
    draw_accuracies,
    draw_bars,
    draw_scatter,
    write_chart,
)

BARS = [Bar("one", 1.5, 2.0), Bar("two", None, 1.0), Bar("three", 0.5, text="out of memory", ours=False)]
POINTS = [Point(f"network {i}", 10.0 + i, 70.0 + 2.0 * (i % 3), bool(i % 2)) for i in range(6)]
NARROW_INCHES = (5.0, 5.0)


def scatter(figure, points):
    draw_scatter(figure.add_subplot(), "Scatter", points, "speed", "accuracy")


@pytest.mark.parametrize(
    ("draw", "again"),
    [
        (partial(draw_bars, title="Bars", unit="times", bars=BARS, line_at=1.0), True),
        (partial(draw_bars, title="Bars", unit="times", bars=[Bar("one", 2.0)]), False),
        (partial(draw_bars, title="Nothing yet", unit="times", bars=[Bar("one", None)]), False),
        (partial(scatter, points=POINTS), True),
        (partial(scatter, points=[]), False),
    ],
)
def test_files_are_complete_and_reproducible(tmp_path, monkeypatch, draw, again):
    monkeypatch.setattr(charts, "_SLIDE_DPI", 40)  # drawing millions of pixels takes the time
    markup = write_chart(tmp_path, Chart("p", "words", draw))
    svg = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "<text" not in svg, "slides must not depend on installed fonts"
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "p.svg"]
    if not again:  # drawn of the same parts as those that are drawn twice
        return
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


@pytest.mark.parametrize("size", [NARROW_INCHES, SLIDE_INCHES])
@pytest.mark.parametrize("values", [(1.0, 2.0), (123456.789, 98765.4), (0.01, 3000.0)])
def test_values_after_bars_are_inside_and_free_of_labels(size, values):
    labels = ("repvgg_b1g4, train form, onnxruntime", "a")
    figure = Figure(size, layout="constrained")
    draw_bars(
        figure, "Bars", "times", [Bar(label, value, 2 * value) for label, value in zip(labels, values, strict=True)]
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    right = figure.bbox.x1
    ticks = [tick.label1.get_window_extent() for tick in axes.yaxis.get_major_ticks()]
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x1 <= right
        assert not any(box.overlaps(label) for label in ticks)
    assert not any(one.overlaps(other) for one, other in pairwise(ticks))


@pytest.mark.parametrize("size", [NARROW_INCHES, SLIDE_INCHES])
def test_the_line_at_one_crosses_no_value(size):
    values = (0.99, 0.5, 0.94, 1.0, 1.02, 0.1)
    bars = [Bar("one network vs another", value, 1.94 - value) for value in values]
    bars.append(Bar("two", 0.2, text="more memory than this machine has"))
    figure = Figure(size, layout="constrained")
    draw_bars(figure, "Bars", "times as fast", bars, line_at=1.0)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    line, _ = axes.transData.transform((1.0, 0.0))
    assert len(axes.texts) == 2 * len(bars) - 1
    for text in axes.texts:
        box = text.get_window_extent()
        assert not box.x0 < line < box.x1
        assert box.x1 <= figure.bbox.x1
