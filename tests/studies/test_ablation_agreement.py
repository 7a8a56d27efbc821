"""Agreement of ablations with the paper: verdicts by hand, orders of rows, accuracies against epochs."""

import pytest
from matplotlib.figure import Figure

from repvgg.studies.ablation_agreement import (
    Agreement,
    agreement_table,
    agreements,
    confidence_half_width,
    epoch_chart,
    epoch_table,
    rank_agreement,
)
from repvgg.studies.ablation_results import Results, Spread
from repvgg.studies.variants import TABLE_6_VARIANTS


def cell(seed, *by_epoch, history=True):
    found = {"seed": seed, "trained": {"top1_percent": by_epoch[-1]}}
    return found | {"top1_percent_by_epoch": list(by_epoch)} if history else found


def results(history=True):
    accuracies = {
        "repvgg": [(50.0, 80.0), (52.0, 82.0), (54.0, 84.0)],
        "repvgg_no_identity": [(40.0, 78.0), (43.0, 79.9), (44.0, 82.1)],  # -2.0, -2.1, -1.9
        "repvgg_no_pointwise": [(60.0, 79.0), (61.0, 85.0), (62.0, 83.5)],  # -1.0, 3.0, -0.5
        "conv_bn": [(45.0, 81.0), (46.0, 83.1), (47.0, 84.9)],  # 1.0, 1.1, 0.9
    }
    cells = {
        f"{name}-seed{seed}": cell(seed, *values, history=history)
        for name, seeds in accuracies.items()
        for seed, values in enumerate(seeds)
    }
    return Results(TABLE_6_VARIANTS, cells, 1)


def test_interval_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for values in ([1.0, 2.0], [1.0, 2.5, 2.0], [0.3, 0.1, -0.4, 0.9]):
        spread = Spread(dict(enumerate(values)))
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        assert confidence_half_width(spread) == pytest.approx(half, rel=1e-3)  # the quantiles have four digits
    assert confidence_half_width(Spread({0: 1.0})) is None


def test_verdicts_of_each_row():
    found = agreements(results())
    assert {name: one.verdict for name, one in found.items()} == {
        "repvgg_no_identity": "agrees",
        "repvgg_no_pointwise": "not told apart",
        "conv_bn": "contradicts",
    }
    assert Agreement(-1.0, Spread({0: -1.0})).verdict == "one seed"
    assert Agreement(-1.0, Spread({})).verdict == "not trained"


def test_pairs_in_the_same_order():
    assert rank_agreement([(1, 10), (2, 20), (3, 15)]) == (2, 3)
    assert rank_agreement([(1, 10), (1, 20), (3, 5)]) == (0, 2), "a tie in one of them is not counted"
    assert rank_agreement([]) == (0, 0)


def test_table_of_agreement_names_the_order():
    table = agreement_table("table6", results())
    # Means here: conv-BN 83.0, no 1x1 82.5, no identity 80.0, full 82.0; the paper 72.39, 74.79, 73.15, 75.14.
    assert "3 of 6 pairs of rows are in the paper's order." not in table.notes[0]
    assert table.notes[-1] == "2 of 6 pairs of rows are in the paper's order."


def test_accuracy_against_epochs():
    table = epoch_table("table6", results())
    rows = {row[0]: row[1:] for row in table.rows}
    assert [column.key for column in table.columns] == ["row", "epoch_1", "epoch_2"]
    assert rows["RepVGG"] == (52.0, 82.0)
    assert rows["conv-BN"] == pytest.approx((-6.0, 1.0))
    chart = epoch_chart("table6", results())
    figure = Figure(layout="constrained")
    chart.draw(figure)
    figure.draw_without_rendering()
    assert {tuple(line.get_ydata()) for line in figure.axes[0].lines} >= {(52.0, 82.0), (46.0, 83.0)}


def test_cells_without_a_history_have_no_curves():
    assert epoch_table("table6", results(history=False)) is None
    assert epoch_chart("table6", results(history=False)) is None
