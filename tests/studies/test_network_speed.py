"""Tables 4 and 5, Figure 1 and the mobile networks, with networks that take the paper's time."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from repvgg.blocks import BranchSum
from repvgg.errors import UsageError
from repvgg.studies import network_speed
from repvgg.studies.candidates import deployed
from repvgg.studies.counts import title_of
from repvgg.studies.paper import FIGURE_1, MOBILE_MODELS, TABLE_4, TABLE_5
from repvgg.studies.timing import Speeds
from tests.studies.helpers import SECONDS, Tiny, fake_counts, read_rows, run

COUNT_COLUMNS = ("params_millions", "flops_billions", "winograd_muls_billions")


def test_table4_has_the_paper_columns_next_to_ours(quick, tmp_path):
    result = run("table4", tmp_path / "t", input_size=8, batch=2, rounds=3, max_gmacs=1000.0)
    assert result.complete
    rows = read_rows(tmp_path / "t" / "table4.csv")
    assert len(rows) == len(TABLE_4) == 19
    for printed, row in zip(TABLE_4, rows, strict=True):
        assert float(row["paper_top1_percent"]) == printed.top1_percent
        assert float(row["paper_images_per_second"]) == printed.images_per_second
        assert [float(row[key]) for key in COUNT_COLUMNS] == [1.5, 2.5, 3.5]
        assert float(row["images_per_second"]) == pytest.approx(printed.images_per_second * 2 / 10_000)
        assert float(row["speed_up"]) == pytest.approx(float(row["paper_speed_up"]))
    for printed, row in zip(TABLE_4, read_rows(tmp_path / "t" / "table4-counts.csv"), strict=True):
        assert float(row["paper_params_millions"]) == printed.params_millions
        assert float(row["paper_flops_billions"]) == printed.flops_billions
        assert row["paper_winograd_muls_billions"] == str(printed.winograd_muls_billions or "")
        assert [float(row[key]) for key in COUNT_COLUMNS] == [1.5, 2.5, 3.5]
        assert row["differences"] == ("Params" if printed.model == "resnet18" else "")
    assert "ResNet-18 (Params): cut in the paper." in (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    pairs = read_rows(tmp_path / "t" / "table4-pairs.csv")
    claimed = [1.33, 1.65, 1.84, 2.02, 2.66, 1.10, 1.59, 1.02]  # §4.1: 33%, 64%, 83%, 101%, 2.66x, 10%, 59%, "slightly"
    assert [float(row["paper_ratio"]) for row in pairs] == pytest.approx(claimed, abs=0.011)
    assert all(float(row["ratio"]) == pytest.approx(float(row["paper_ratio"])) for row in pairs)
    assert "Of 8 pairs that the paper compares, RepVGG is clearly faster in 8 on this machine." in result.outcome.lead


def test_table5_has_the_largest_networks(quick, tmp_path):
    result = run("table5", tmp_path / "t", input_size=8, rounds=3)
    rows = read_rows(tmp_path / "t" / "table5.csv")
    assert [row["model"] for row in rows][-2:] == ["RegNetX-12GF", "EfficientNet-B3"]
    assert len(rows) == len(TABLE_5)
    (pair,) = read_rows(tmp_path / "t" / "table5-pairs.csv")
    assert float(pair["ratio"]) == pytest.approx(1.31, abs=0.005)
    assert result.complete


def test_network_out_of_memory_is_in_the_table(quick, tmp_path, monkeypatch):
    seconds = SECONDS | {"resnet18": None}
    monkeypatch.setattr(network_speed, "deployed", lambda name: Tiny(seconds[name], name))
    result = run("table4", tmp_path / "t", input_size=8, rounds=3, max_gmacs=3.0)
    assert result.complete
    rows = {row["model"]: row for row in read_rows(tmp_path / "t" / "table4.csv")}
    assert rows["ResNet-18"]["images_per_second"] == "out of memory"
    assert float(rows["RepVGG-A0"]["images_per_second"]) > 0
    (pair,) = read_rows(tmp_path / "t" / "table4-pairs.csv")
    assert pair["ratio"] == ""


def test_pairs_share_rounds_if_not_all_networks_fit_in_memory(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(network_speed, "fit_together", lambda *_: False)
    run("table4", tmp_path / "t", input_size=8, rounds=2, max_gmacs=1000.0)
    plan = json.loads((tmp_path / "t" / "cells" / "plan.json").read_text())["groups"]
    assert ["resnet50", "repvgg_a0", "resnet18"] in plan
    assert all(group[0] == "resnet50" for group in plan)
    pairs = read_rows(tmp_path / "t" / "table4-pairs.csv")
    assert all(float(row["ratio"]) == pytest.approx(float(row["paper_ratio"])) for row in pairs)


def test_limit_below_every_network_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"take --max-gmacs 0\.4 or more"):
        run("table4", tmp_path / "t", max_gmacs=0.1)
    assert not (tmp_path / "t").exists()


def test_chosen_rows_have_no_limit_but_the_chosen_one(quick, tmp_path):
    rows = ("repvgg_b2", "resnet18")  # 18.4 and 1.8 GMACs; without rows the default on a CPU is 12
    run("table4", tmp_path / "t", input_size=8, rounds=2, rows=rows)
    assert {row["model"] for row in read_rows(tmp_path / "t" / "table4.csv")} == {"RepVGG-B2", "ResNet-18"}
    with pytest.raises(UsageError, match=r"rows repvgg_b2 have more than 12 GMACs: .* --max-gmacs 18\.4 or more"):
        run("table4", tmp_path / "u", rows=rows, max_gmacs=12.0)
    assert not (tmp_path / "u").exists()


def test_networks_are_deployed_forms_at_their_own_input_size():
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed("resnet18").modules())
    plain = deployed("repvgg_a0")
    assert not any(isinstance(part, (nn.BatchNorm2d, BranchSum)) for part in plain.modules())
    assert not plain.training
    assert title_of("repvgg_b1g4") == "RepVGG-B1g4"
    assert title_of("efficientnet_b0") == "EfficientNet-B0"
    assert network_speed._candidate("efficientnet_b3", "torch", nn.Identity, input_size=None).image == (3, 300, 300)


def test_each_engine_gets_a_network_of_its_own_and_none_is_kept(monkeypatch):
    built = []
    monkeypatch.setattr(network_speed, "deployed", lambda name: built.append(name) or Tiny(1.0, name))
    shared = network_speed._SharedNetwork()
    first, second, third = (shared.make("a", last) for last in (False, False, True))
    first.to(torch.float16)
    assert [str(first.weight.dtype), str(second.weight.dtype), third.name] == ["torch.float16", "torch.float32", "a"]
    assert len({id(one.weight) for one in (first, second, third)}) == 3
    assert built == ["a"]
    assert not shared._kept
    shared.make("b", last=False)
    shared.make("c", last=True)
    assert built == ["a", "b", "c"]
    assert not shared._kept


def test_figure1_marks_the_pareto_front(quick, tmp_path):
    result = run("figure1", tmp_path / "f", input_size=8, rounds=2, max_gmacs=1000.0)
    rows = read_rows(tmp_path / "f" / "figure1.csv")
    assert len(rows) == 24
    front = {row["model"] for row in rows if row["undominated"] == "True"}
    assert {"RepVGG-A0", "RepVGG-A1", "RepVGG-A2"} <= front
    assert not {"ResNet-18", "VGG-16", "EfficientNet-B3"} & front
    speeds = {row["model"]: float(row["images_per_second"]) for row in rows}
    assert speeds["RepVGG-B3"] / speeds["RegNetX-12GF"] == pytest.approx(1.31, abs=0.005)
    assert "are RepVGG" in result.outcome.lead


def test_panel_with_few_networks_is_not_drawn():
    """With a limit on the arithmetic, the right panel may hold two networks only, which show no relation."""
    cells = {"plan": {"groups": [list(SECONDS)]}, "round-00-0000": {"seconds": SECONDS}}
    speeds = Speeds.from_cells(cells, 1)
    few = [point for point in FIGURE_1 if point.epochs == 120 or point.model in ("repvgg_b2g4", "efficientnet_b3")]
    for points, panels in ((FIGURE_1, 2), (few, 1)):
        drawn = Figure()
        network_speed._draw_figure1(drawn, points, speeds)
        assert len(drawn.axes) == panels
        labels = [text.get_text() for axes in drawn.axes for text in axes.texts]
        assert {"RepVGG-A0", "A1", "B2g4", "ResNet-50"} <= set(labels)


def test_mobile_has_published_numbers_next_to_ours(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(network_speed, "deployed", lambda name: Tiny(2.0 if name.startswith("repvgg") else 1.0, name))
    monkeypatch.setattr(network_speed, "_count_plain", lambda name: fake_counts("", [name])[name])
    result = run("mobile", tmp_path / "m", input_size=8, rounds=2)
    rows = {row["model"]: row for row in read_rows(tmp_path / "m" / "mobile.csv")}
    assert len(rows) == len(MOBILE_MODELS)
    assert float(rows["MobileNetV2"]["published_top1_percent"]) == 72.0
    assert [float(rows[name]["speed_up"]) for name in ("RepVGG-A0", "MobileNetV2")] == [0.5, 1.0]
    assert {name for name, row in rows.items() if row["undominated"] == "True"} == {"MobileOne-S4"}
    assert result.outcome.lead.endswith("0 are RepVGG.")


@pytest.mark.parametrize("row", MOBILE_MODELS, ids=lambda row: row.model)
def test_mobile_counts_agree_with_the_published_ones(row):
    """Up to the rounding; some authors count classifiers and gates, and others do not."""
    found = network_speed._count_plain(row.model)
    assert found["params"] / 1e6 == pytest.approx(row.params_millions, rel=0.03, abs=0.06)
    assert found["macs"] / 1e9 == pytest.approx(row.flops_billions, rel=0.04)
