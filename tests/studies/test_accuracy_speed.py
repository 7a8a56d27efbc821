"""Figure 1 and the mobile networks: published accuracies against given speeds."""

import pytest
from matplotlib.figure import Figure

from repvgg.studies import accuracy_speed, network_speed
from repvgg.studies.accuracy_speed import MOBILE_MODELS
from repvgg.studies.paper import FIGURE_1
from repvgg.studies.timing import Speeds
from tests.studies.helpers import SECONDS, Tiny, fake_counts, read_rows, run


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
    """With a limit on the arithmetic the paper's right panel may hold two networks, whose axes would say nothing."""
    cells = {"plan": {"groups": [list(SECONDS)]}, "round-00-0000": {"seconds": SECONDS}}
    speeds = Speeds.from_cells(cells, 1)
    few = [point for point in FIGURE_1 if point.epochs == 120 or point.model in ("repvgg_b2g4", "efficientnet_b3")]
    for points, panels in ((FIGURE_1, 2), (few, 1)):
        drawn = Figure()
        accuracy_speed._draw_figure1(drawn, points, speeds)
        assert len(drawn.axes) == panels
        labels = [text.get_text() for axes in drawn.axes for text in axes.texts]
        assert {"RepVGG-A0", "A1", "B2g4", "ResNet-50"} <= set(labels)


def test_mobile_has_published_numbers_beside_ours(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(network_speed, "deployed", lambda name: Tiny(2.0 if name.startswith("repvgg") else 1.0, name))
    monkeypatch.setattr(accuracy_speed, "_count_plain", lambda name: fake_counts("", [name])[name])
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
    found = accuracy_speed._count_plain(row.model)
    assert found["params"] / 1e6 == pytest.approx(row.params_millions, rel=0.03, abs=0.06)
    assert found["macs"] / 1e9 == pytest.approx(row.flops_billions, rel=0.04)
