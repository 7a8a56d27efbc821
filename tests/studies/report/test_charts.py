"""Pictures are drawn without a screen, the same each time, and their words do not cover each other."""

import xml.etree.ElementTree as ET
from functools import partial

import pytest
from matplotlib.figure import Figure

from repvgg.errors import OutputError
from repvgg.studies.report.charts import WIDE, Bar, Chart, Point, draw_bars, draw_scatter, write_chart

BARS = [Bar("one", 1.5, 2.0), Bar("two", None, 1.0), Bar("three", 0.5, text="out of memory", ours=False)]
POINTS = [Point(f"network {i}", 10.0 + i, 70.0 + 2.0 * (i % 3), bool(i % 2)) for i in range(6)]


def plane(figure, points):
    draw_scatter(figure.add_subplot(), "Plane", points, "speed", "accuracy")


@pytest.mark.parametrize(
    "draw",
    [
        partial(draw_bars, title="Bars", unit="times", bars=BARS, line_at=1.0),
        partial(draw_bars, title="Bars", unit="times", bars=[Bar("one", 2.0)]),
        partial(draw_bars, title="Nothing yet", unit="times", bars=[Bar("one", None)]),
        partial(plane, points=POINTS),
        partial(plane, points=[]),
    ],
)
def test_svg_and_png_are_whole_and_the_same_each_time(tmp_path, draw):
    svg = write_chart(tmp_path, Chart("p", "words", draw))
    assert ET.fromstring(svg).tag.endswith("svg")
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "p.svg"]
    before = (tmp_path / "p.png").read_bytes()
    assert write_chart(tmp_path, Chart("p", "words", draw)) == svg
    assert (tmp_path / "p.png").read_bytes() == before


def test_drawing_needs_no_screen_and_no_pyplot():
    figure = Figure(figsize=WIDE)
    draw_bars(figure, "Bars", "times", BARS)
    assert not figure.canvas.manager
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["1.50 here", "2.00 paper", "not measured", "1.00 paper", "out of memory"]


def test_names_cover_neither_points_nor_each_other():
    figure = Figure(figsize=WIDE, layout="constrained")
    plane(figure, POINTS)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(POINTS)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    places = [figure.axes[0].transData.transform((point.x, point.y)) for point in POINTS]
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="no folder"):
        write_chart(tmp_path / "missing", Chart("p", "words", lambda figure: None))
