"""The paper's claims on speed in several engines, with networks and engines that take given times."""

import json

import pytest
from matplotlib.figure import Figure

from repvgg.errors import UsageError
from repvgg.measure import Ratio
from repvgg.studies.candidates import ENGINES, Engine
from repvgg.studies.claims import ClaimResult, claims_chart, compare_in_engines
from repvgg.studies.network_speed import NetworkSettings
from repvgg.studies.report.charts import SLIDE_INCHES
from repvgg.studies.timing import Speeds
from tests.studies.helpers import Tiny, read_rows, run

# Seconds of a call, against those of PyTorch.
FACTORS = {"repvgg": lambda name: 0.25 if name.startswith("repvgg") else 0.8, "openvino": lambda name: 0.5}


@pytest.fixture
def engines(quick, monkeypatch):
    """Replace two engines by some that run every network, plain ones in the first the fastest."""
    for engine, factor in FACTORS.items():

        def prepare(model, settings, image, factor=factor):
            return Tiny(model.seconds * factor(model.name), model.name)

        monkeypatch.setitem(ENGINES, engine, Engine(prepare, lambda model, image: None))


def test_claims_are_compared_in_each_engine_and_in_the_fastest_ones(engines, tmp_path):
    result = run(
        "table4", tmp_path / "t", input_size=8, batch=2, rounds=3, max_gmacs=4.0, engine="torch,repvgg,openvino"
    )
    rows = [row for row in read_rows(tmp_path / "t" / "table4-claims.csv") if row["model"] == "RepVGG-A0"]
    paper = 3256 / 2442
    assert [row["where"] for row in rows] == [
        "both in torch",
        "both in repvgg",
        "both in openvino",
        "each in its fastest",
    ]
    assert [(row["engine"], row["engine_of_other"]) for row in rows][-1] == ("repvgg", "openvino")
    expected = [paper, paper * 0.8 / 0.25, paper, paper * 0.5 / 0.25]
    assert [float(row["ratio"]) for row in rows] == pytest.approx(expected)
    assert [float(row["paper_ratio"]) for row in rows] == pytest.approx(4 * [paper])
    assert rows[-1]["verdict"] == "holds"
    assert result.outcome.lead == ("Of 2 comparisons of the paper, with each network in its fastest engine: holds 2.")
    speeds = {row["model"]: row for row in read_rows(tmp_path / "t" / "table4-engines.csv")}
    assert [speeds[name]["fastest"] for name in ("RepVGG-A1", "ResNet-34")] == ["repvgg", "openvino"]
    in_torch = 2 * 2339 / 10_000
    found = [float(speeds["RepVGG-A1"][f"{engine}_images_per_second"]) for engine in ("torch", "repvgg", "openvino")]
    assert found == pytest.approx([in_torch, 4 * in_torch, 2 * in_torch])
    shown = {row["model"]: float(row["images_per_second"]) for row in read_rows(tmp_path / "t" / "table4.csv")}
    assert shown["RepVGG-A1"] == pytest.approx(4 * in_torch)
    assert [chart.name for chart in result.outcome.charts] == ["table4-claims", "table4-speed"]


def test_an_engine_alone_takes_the_place_of_torch(engines, tmp_path):
    run("table4", tmp_path / "t", input_size=8, batch=2, rounds=3, max_gmacs=2.0, engine="openvino")
    (pair,) = read_rows(tmp_path / "t" / "table4-pairs.csv")
    assert float(pair["ratio"]) == pytest.approx(3256 / 2442)
    speeds = {row["model"]: float(row["images_per_second"]) for row in read_rows(tmp_path / "t" / "table4.csv")}
    assert speeds["ResNet-18"] == pytest.approx(2 * 2 * 2442 / 10_000)


def test_chosen_rows_are_timed_in_pairs(engines, tmp_path):
    rows = ("repvgg_a0", "resnet18", "repvgg_a2", "efficientnet_b0", "resnet50")
    run("table4", tmp_path / "t", input_size=8, rounds=2, engine="torch,repvgg", rows=rows)
    plan = json.loads((tmp_path / "t" / "cells" / "plan.json").read_text())["groups"]
    assert plan[0] == ["repvgg_a0", "repvgg_a0.repvgg", "resnet18", "resnet18.repvgg"]
    assert [group[::2] for group in plan[1:]] == [["repvgg_a2", "resnet50"], ["repvgg_a2", "efficientnet_b0"]]
    assert len(read_rows(tmp_path / "t" / "table4.csv")) == len(rows)
    with pytest.raises(UsageError, match="no row 'repvgg_a9': did you mean repvgg_a"):
        run("table4", tmp_path / "u", rows=("repvgg_a9",))


def test_figure1_shows_each_network_in_its_fastest_engine(engines, tmp_path):
    run("figure1", tmp_path / "f", input_size=8, rounds=2, max_gmacs=2.0, engine="torch,repvgg,openvino")
    speeds = {row["model"]: float(row["images_per_second"]) for row in read_rows(tmp_path / "f" / "figure1.csv")}
    assert speeds["RepVGG-A0"] / speeds["ResNet-18"] == pytest.approx(2 * 3256 / 2442)
    assert {row["model"] for row in read_rows(tmp_path / "f" / "figure1-engines.csv")} == set(speeds)


def test_networks_that_the_engine_of_this_library_runs_fastest_also_meet_the_best_other():
    seconds = {"repvgg_a0": 4.0, "repvgg_a0.repvgg": 1.0, "resnet18": 5.0, "resnet18.repvgg": 2.0}
    cells = {"plan": {"groups": [list(seconds)]}, "round-00-0000": {"seconds": seconds}}
    claims = {("repvgg_a0", "resnet18"): 1.3, ("repvgg_a2", "resnet50"): 1.8}
    found = compare_in_engines(claims, Speeds.from_cells(cells, 1), ["torch", "repvgg"])
    assert [(one.where, one.engines, one.here.median) for one in found] == [
        ("both in torch", ("torch", "torch"), 1.25),
        ("both in repvgg", ("repvgg", "repvgg"), 2.0),
        ("each in its fastest", ("repvgg", "repvgg"), 2.0),
        ("in repvgg against the best other", ("repvgg", "torch"), 5.0),
    ]


@pytest.mark.parametrize(
    ("quartiles", "verdict"),
    [
        ((1.5, 1.6, 1.7), "holds"),
        ((1.1, 1.3, 1.7), "faster, but by less"),
        ((1.0, 1.6, 1.7), "undecided"),
        ((0.8, 0.9, 1.0), "undecided"),
        ((0.8, 0.9, 0.99), "does not hold"),
    ],
)
def test_verdicts(quartiles, verdict):
    q1, median, q3 = quartiles
    assert ClaimResult("a", "b", "", ("torch", "torch"), 1.5, Ratio(median, q1, q3)).verdict == verdict


def test_the_chart_has_a_row_for_each_claim_with_its_verdict():
    names = {"repvgg_a0": "resnet18", "repvgg_a1": "resnet34"}
    results = [
        ClaimResult(model, other, where, ("torch", "torch"), 1.5, Ratio(median, median - 0.1, median + 0.2))
        for model, other in names.items()
        for where, median in (("both in torch", 1.3), ("each in its fastest", 1.7))
    ]
    for size in (SLIDE_INCHES, (5.0, 5.0)):
        figure = Figure(figsize=size, layout="constrained")
        claims_chart("table4", results).draw(figure)
        (axes,) = figure.axes
        right = axes.child_axes[0]
        assert [text.get_text() for text in right.get_yticklabels()] == ["holds", "holds"]
        assert [bar.get_width() for bar in axes.containers[0]] == [1.5, 1.5]
        series = {container.get_label(): container for container in axes.containers[1:]}
        assert list(series["each in its fastest"].lines[0].get_xdata()) == [1.7, 1.7]
        whiskers = series["both in torch"].lines[2][0].get_segments()
        assert [list(part[:, 0]) for part in whiskers] == [pytest.approx([1.2, 1.5])] * 2


def test_unknown_engines_and_settings_that_an_engine_lacks_are_refused():
    with pytest.raises(UsageError, match="There is no engine 'onnx'"):
        NetworkSettings(engine="torch,onnx")
    with pytest.raises(UsageError, match="each once"):
        NetworkSettings(engine="torch,torch")
