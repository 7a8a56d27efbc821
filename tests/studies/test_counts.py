"""Every row of Tables 4 and 5 agrees with the paper to the printed digits, or by another counting rule."""

from functools import cache

import pytest
import torch

from repvgg.errors import UsageError
from repvgg.measure import walk
from repvgg.models import create_baseline
from repvgg.studies import counts
from repvgg.studies.counts import (
    PRINTED_AS,
    RECOUNTS,
    TABLES,
    count_cell,
    count_rows,
    counts_of,
    printed_text,
    rounded,
    truncated,
)

pytest.importorskip("timm")


@cache
def table(name):
    return {row.model: row for row in count_rows(name)}


@pytest.mark.parametrize("name", TABLES)
def test_every_count_agrees_or_another_rule_explains_it(name):
    rows = table(name)
    assert list(rows) == [printed.model for printed in TABLES[name]]
    for row in rows.values():
        differ = {difference.column: difference for difference in row.differences}
        for column in PRINTED_AS:
            printed = printed_text(column, row.paper)
            if rounded(column, row.count(column)) == printed:
                assert column not in differ
                continue
            difference = differ[column]
            assert difference.explained, f"{row.model}: {column} is {row.count(column)}, printed as {printed}"
            assert difference.reason
            if difference.recounted == row.count(column):  # the same number, truncated
                assert truncated(column, difference.recounted) == printed
            elif printed is None:
                assert difference.recounted == row.macs, "nothing is reduced"
            else:
                assert rounded(column, difference.recounted) == printed


def test_which_rows_differ_and_why():
    """A change here means that we count something else."""
    found = {}
    for row in (row for name in TABLES for row in table(name).values()):
        for difference in row.differences:
            found.setdefault((difference.column, difference.reason), set()).add(row.model)
    assert {column for column, _ in found} == {"params", "winograd_muls"}, "all FLOPs agree"
    winograd = [models for (column, _), models in found.items() if column == "winograd_muls"]
    assert winograd == [{"efficientnet_b0", "efficientnet_b3"}, {"regnetx_3_2gf", "resnext101_32x4d", "regnetx_12gf"}]
    assert RECOUNTS.keys() == set.union(*winograd)


def winograd_macs(name, size):
    """Return all multiply-adds, and those that a Winograd algorithm can reduce, by height of the output."""
    done = walk(create_baseline(name, values=False).eval(), torch.empty(1, 3, size, size, device="meta"))
    found = {}
    for op in done.ops:
        if op.muls() < op.macs:
            height = op.outputs[0][-1]
            found[height] = found.get(height, 0) + op.macs
    return done.macs, found


def subsets_of_sizes(name, printed):
    """Return the sets of output sizes for which counting 4/9 gives the printed number."""
    macs, found = winograd_macs(name, 224)
    sizes = sorted(found, reverse=True)
    sets = [[s for bit, s in enumerate(sizes) if number >> bit & 1] for number in range(2 ** len(sizes))]
    return [chosen for chosen in sets if f"{(macs - sum(found[s] for s in chosen) * 5 / 9) / 1e9:.1f}" == printed]


def test_regnetx_12gf_is_explained_by_28_pixels_and_above_only():
    assert subsets_of_sizes("regnetx_12gf", "10.9") == [[56, 28]]
    assert [56, 28] in subsets_of_sizes("regnetx_3_2gf", "2.9")
    assert [56, 28] in subsets_of_sizes("resnext101_32x4d", "7.9")


def test_no_rule_by_size_explains_both_resnexts():
    """As the reason says: ResNeXt-50 is printed as if all sizes counted 4/9; by the rule of 28 pixels it has 4.2."""
    fifty = subsets_of_sizes("resnext50_32x4d", "4.1")
    assert [56, 28, 14, 7] in fifty
    assert [56, 28] in subsets_of_sizes("resnext50_32x4d", "4.2")
    assert not [chosen for chosen in fifty if chosen in subsets_of_sizes("resnext101_32x4d", "7.9")]


def test_resnet_v1_5_has_other_flops():
    """Why our baselines stride in the first 1x1: with the stride in the 3x3 none has the printed FLOPs."""
    for name, printed in (("resnet50", "3.9"), ("resnet101", "7.6"), ("resnet152", "11.3")):
        assert rounded("macs", table("table4")[name].macs) == printed
        assert rounded("macs", winograd_macs(f"{name}_v1_5", 224)[0]) != printed


def test_efficientnet_b3_is_counted_at_300_pixels():
    row = table("table5")["efficientnet_b3"]
    assert (row.input_size, rounded("macs", row.macs)) == (300, "1.8")
    assert rounded("macs", winograd_macs("efficientnet_b3", 224)[0]) == "1.0"


def test_vgg_has_the_same_parameters_with_and_without_norms():
    row = table("table4")["vgg16_bn"]
    without = create_baseline("vgg16", values=False)
    assert row.params == sum(p.numel() for p in without.parameters())
    assert row.params_train > row.params


def test_train_form_has_more_parameters_than_printed():
    for name in TABLES:
        for row in table(name).values():
            assert row.params_train > row.params
            text = {rounded("params", row.params_train), truncated("params", row.params_train)}
            close = row.model in {"resnet18", "vgg16_bn"}  # batch norms are a small part of them
            assert close or printed_text("params", row.paper) not in text, row.model


def test_unexplained_difference_has_no_reason(monkeypatch):
    monkeypatch.setattr(counts, "RECOUNTS", {})
    (printed,) = [row for row in TABLES["table5"] if row.model == "regnetx_12gf"]
    params, winograd = counts._count_row(printed).differences
    assert params.explained
    assert (winograd.column, winograd.explained, winograd.reason) == ("winograd_muls", False, "")


def test_rounding_and_truncation():
    assert (rounded("params", 8_309_384), truncated("params", 8_309_384)) == ("8.31", "8.30")
    assert (rounded("macs", 1_999_999_999), truncated("macs", 1_999_999_999)) == ("2.0", "1.9")
    assert (rounded("macs", 2_000_000_000), truncated("macs", 2_000_000_000)) == ("2.0", "2.0")


def test_unknown_table():
    with pytest.raises(UsageError, match="no table 'table6': choose table4 or table5"):
        count_rows("table6")


def test_cell_holds_the_counts_of_the_plain_form():
    found = count_cell("table4", ["repvgg_a0", "resnet18"])
    assert (found["repvgg_a0"]["params"], found["repvgg_a0"]["macs"]) == (8_309_384, 1_361_451_008)
    assert counts_of("resnet18", found) == pytest.approx((11.68, 1.8, 1.0), abs=0.05)
    assert counts_of("resnet34", found) == (None, None, None)
