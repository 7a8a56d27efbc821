"""The printed numbers, checked against the text of the paper."""

import pytest

from repvgg.models import BASELINES, SPECS
from repvgg.studies.paper import (
    FIGURE_1,
    TABLE_1,
    TABLE_1_BATCH,
    TABLE_1_CHANNELS,
    TABLE_1_SIZE,
    TABLE_4,
    TABLE_5,
    TABLE_6,
    TABLE_7,
)

ROWS = {row.model: row for row in (*TABLE_5, *TABLE_4)}  # a model in both tables keeps its row of Table 4


def test_models_are_architectures_or_baselines():
    assert len(TABLE_4) == 19
    assert len(TABLE_5) == 5
    assert all((row.model in SPECS) != (row.model in BASELINES) for row in ROWS.values())
    assert len({row.model for row in TABLE_4}) == len(TABLE_4)
    assert {(point.model, point.epochs) for point in FIGURE_1} >= {("repvgg_b3", 200), ("repvgg_a0", 120)}


def test_tables_agree_on_a_model_in_both():
    both = [(row, ROWS[row.model]) for row in TABLE_5 if row in TABLE_4 or row is not ROWS[row.model]]
    assert [row.model for row, _ in both] == ["repvgg_b2g4"]
    for row, other in both:
        assert row.images_per_second == other.images_per_second
        assert row.params_millions == other.params_millions


# §4.1: speed-up of a model over another, and the points by which it is better ("slightly faster" is 1.02)
CLAIMS = [
    ("repvgg_a0", "resnet18", 1.33, 1.25),
    ("repvgg_a1", "resnet34", 1.64, 0.29),
    ("repvgg_a2", "resnet50", 1.83, 0.17),
    ("repvgg_b1g4", "resnet101", 2.01, 0.37),
    ("repvgg_b1g2", "resnet152", 2.66, 0.00),
    ("repvgg_b2", "vgg16_bn", 1.10, 6.57),
    ("repvgg_a2", "efficientnet_b0", 1.59, 1.37),
    ("repvgg_b1", "regnetx_3_2gf", 1.02, 0.39),
    ("repvgg_b3", "regnetx_12gf", 1.31, None),
]


@pytest.mark.parametrize(("model", "baseline", "ratio", "better"), CLAIMS)
def test_ratios_in_the_text_follow_from_the_tables(model, baseline, ratio, better):
    ours, theirs = ROWS[model], ROWS[baseline]
    assert ours.images_per_second / theirs.images_per_second == pytest.approx(ratio, abs=0.0101)
    if better is not None:
        assert ours.top1_percent - theirs.top1_percent == pytest.approx(better, abs=1e-6)


def test_tables_are_sorted_by_speed():
    assert [row.images_per_second for row in TABLE_4] == sorted((r.images_per_second for r in TABLE_4), reverse=True)
    assert [row.images_per_second for row in TABLE_5] == sorted((r.images_per_second for r in TABLE_5), reverse=True)


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: f"{row.kernel}x{row.kernel}")
def test_table_1_columns_are_consistent(row):
    macs = TABLE_1_BATCH * TABLE_1_SIZE**2 * TABLE_1_CHANNELS**2 * row.kernel**2
    assert macs // 10**8 == round(10 * row.flops_billions)  # truncated, not rounded
    computed = 10.06 if row.kernel == 5 else row.tflops  # the paper's 10.57 does not follow from its own columns
    assert 2 * row.flops_billions / row.milliseconds == pytest.approx(computed, abs=0.011)


def test_table_6_is_about_b0():
    *_, full = TABLE_6
    assert (full.identity, full.pointwise, full.top1_percent) == (True, True, ROWS["repvgg_b0"].top1_percent)
    assert TABLE_6[0].images_per_second < ROWS["repvgg_b0"].images_per_second
    assert len({(row.identity, row.pointwise) for row in TABLE_6}) == len(TABLE_6)


def test_table_7_is_about_b0_and_agrees_with_the_text():
    rows = {row.name: row.top1_percent for row in TABLE_7}
    assert len(rows) == len(TABLE_7) == 8
    assert rows["repvgg"] == TABLE_6[-1].top1_percent
    assert rows["repvgg"] - rows["residual_reorg"] == pytest.approx(0.58)  # §4.2
    assert max(rows, key=rows.__getitem__) == "repvgg_relu"
    assert rows["repvgg_post_bn"] < rows["repvgg_identity_without_bn"] < rows["repvgg"]
