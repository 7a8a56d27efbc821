"""Charts of the quickstart's page show what the numbers say."""

import re
from dataclasses import replace
from importlib.resources import files

import pytest
from matplotlib.figure import Figure

from repvgg.studies.report import page_charts
from repvgg.studies.report.page_charts import LogScale, accuracy_chart, error_chart, loss_chart, timing_chart
from repvgg.studies.report.schema import Epoch


def drawn(monkeypatch, chart, data, narrow=False):
    """Return the axes of a chart."""
    monkeypatch.setattr(page_charts, "page_chart", lambda name, description, draw, **sizes: draw)
    figure = Figure(figsize=(5.0, 5.0) if narrow else (12.0, 5.0))
    chart(data)(figure, narrow)
    return figure.axes[0]


def test_colors_are_distinct_and_their_variables_exist_in_both_schemes():
    css = files("repvgg.studies.report").joinpath("style.css").read_text(encoding="utf-8")
    assert len({color.lower() for color in page_charts._CSS_COLORS}) == len(page_charts._CSS_COLORS)
    for variable in page_charts._CSS_COLORS.values():
        name = re.search(r"--[\w-]+", variable)[0]
        assert len(re.findall(f"{name}:", css)) >= 2, name
        assert (re.search(f"{name}: (#)?", css)[1] is None) == variable.startswith("rgb("), name


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
    assert [axes.lines[index].get_color() for index in (2, 4)] == [page_charts.GOOD, page_charts.BAD]
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
    assert page_charts._epoch_ticks(range(epochs[0], epochs[1] + 1)) == ticks
