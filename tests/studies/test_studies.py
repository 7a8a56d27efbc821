"""Each study from its settings to its folder, with tiny networks and seconds that the test gives."""

import csv
import json
import re
from dataclasses import fields
from functools import partial

import pytest
from rich.console import Console
from torch import nn

from repvgg.blocks import BranchSum
from repvgg.errors import OutputExistsError, UsageError
from repvgg.measure import RunSettings
from repvgg.models import create_model
from repvgg.studies import (
    count_table,
    figure1,
    figure3,
    mobile,
    network_tables,
    networks,
    study,
    table6_speed,
)
from repvgg.studies.ablation import AblationSettings
from repvgg.studies.paper import FIGURE_1, TABLE_1, TABLE_4, TABLE_5, TABLE_6
from repvgg.studies.registry import STUDIES, study_of
from repvgg.studies.report import charts
from repvgg.studies.study import PAGE, flat, run_study
from tests.studies.helpers import SECONDS, Stopwatch, Tiny, counted

COUNTED = ("params_millions", "flops_billions", "winograd_muls_billions")
QUIET = Console(quiet=True)


@pytest.fixture
def quick(monkeypatch):
    """Networks that say how long they take, as in the paper; returns how to put in another stopwatch."""

    def use(stopwatch):
        monkeypatch.setattr(RunSettings, "stopwatch", lambda setting, batch: stopwatch)
        return stopwatch

    monkeypatch.setattr(networks, "deployed", lambda name: Tiny(SECONDS[name], name))
    monkeypatch.setattr(network_tables, "counted", counted)
    monkeypatch.setattr(study, "write_chart", lambda folder, picture: "<svg/>")  # drawing is most of the time
    use(Stopwatch())
    return use


def run(name, folder, **chosen):
    wanted = STUDIES[name]
    return run_study(wanted, wanted.settings(**chosen), folder, command=f"repvgg study {name}", console=QUIET)


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_registry_names_each_by_its_name():
    names = ["table1", "table4", "table5", "table6", "table6-speed", "table7", "blocks", "figure1", "figure3", "mobile"]
    assert list(STUDIES) == names
    assert all(name == study.name for name, study in STUDIES.items())
    with pytest.raises(UsageError, match="did you mean table4"):
        study_of("tabel4")
    with pytest.raises(UsageError, match="there are table1"):
        study_of("xyzzy")


@pytest.mark.parametrize("name", [name for name in STUDIES if STUDIES[name].settings is not AblationSettings])
def test_settings_are_flat_and_resolved_for_the_device(name):
    wanted = STUDIES[name]
    names = [field.name for field in fields(wanted.settings) if field.name != "setting"]
    assert not set(names) & {field.name for field in fields(RunSettings)}
    on_cpu, on_gpu = (flat(wanted.resolve(wanted.settings(setting=RunSettings(device=d)))) for d in ("cpu", "cuda"))
    assert on_cpu["batch"] < on_gpu["batch"]
    assert {key for key, value in on_gpu.items() if value is None} <= {"threads", "input_size"}
    for name in names:
        with pytest.raises(UsageError):
            wanted.settings(**{name: 0})


def test_table4_holds_the_papers_columns_beside_ours(quick, tmp_path):
    done = run("table4", tmp_path / "t", input_size=8, batch=2, rounds=3, max_gmacs=1000.0)
    assert done.complete
    rows = rows_of(tmp_path / "t" / "table4.csv")
    assert len(rows) == len(TABLE_4) == 19
    for printed, row in zip(TABLE_4, rows, strict=True):
        assert float(row["paper_top1_percent"]) == printed.top1_percent
        assert float(row["paper_images_per_second"]) == printed.images_per_second
        assert [float(row[key]) for key in COUNTED] == [1.5, 2.5, 3.5]
        assert float(row["images_per_second"]) == pytest.approx(printed.images_per_second * 2 / 10_000)
        assert float(row["speed_up"]) == pytest.approx(float(row["paper_speed_up"]))
    for printed, row in zip(TABLE_4, rows_of(tmp_path / "t" / "table4-counts.csv"), strict=True):
        assert float(row["paper_params_millions"]) == printed.params_millions
        assert float(row["paper_flops_billions"]) == printed.flops_billions
        assert row["paper_winograd_muls_billions"] == str(printed.winograd_muls_billions or "")
        assert [float(row[key]) for key in COUNTED] == [1.5, 2.5, 3.5]
        assert row["differences"] == ("Params" if printed.model == "resnet18" else "")
    assert "ResNet-18 (Params): cut in the paper." in (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    pairs = {row["model"]: row for row in rows_of(tmp_path / "t" / "table4-pairs.csv")}
    claimed = {"RepVGG-A0": 1.33, "RepVGG-A1": 1.65, "RepVGG-A2": 1.84, "RepVGG-B1g4": 2.02, "RepVGG-B1g2": 2.66}
    assert {name: float(row["paper_ratio"]) for name, row in pairs.items()} == pytest.approx(claimed, abs=0.01)
    assert all(float(row["ratio"]) == pytest.approx(float(row["paper_ratio"])) for row in pairs.values())
    assert "Of 5 pairs that the paper compares, RepVGG is clearly faster in 5 on this machine." in done.outcome.lead


def test_table5_takes_the_largest(quick, tmp_path):
    done = run("table5", tmp_path / "t", input_size=8, rounds=3)
    rows = rows_of(tmp_path / "t" / "table5.csv")
    assert [row["model"] for row in rows][-2:] == ["RegNetX-12GF", "EfficientNet-B3"]
    assert len(rows) == len(TABLE_5)
    (pair,) = rows_of(tmp_path / "t" / "table5-pairs.csv")
    assert float(pair["ratio"]) == pytest.approx(1.31, abs=0.005)
    assert done.complete


def test_a_study_leaves_whole_files_and_a_page(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "write_chart", charts.write_chart)
    run("table4", tmp_path / "t", input_size=8, rounds=3, max_gmacs=4.0)
    names = {path.name for path in (tmp_path / "t").iterdir()}
    drawn = {f"table4-{what}.{suffix}" for what in ("pairs", "speed") for suffix in ("svg", "png")}
    tables = {"table4.csv", "table4-pairs.csv", "table4-counts.csv", "table4.md", "table4.json"}
    assert names == {"cells", "study.json", PAGE} | drawn | tables
    data = json.loads((tmp_path / "t" / "table4.json").read_text(encoding="utf-8"))
    assert data["settings"]["max_gmacs"] == 4.0
    assert {"cpu", "torch", "load"} <= data["environment"].keys()
    assert data["finished"] >= data["started"] > "2026"
    assert data["tables"]["table4"]["rows"][0]["model"] == "RepVGG-A0"
    page = (tmp_path / "t" / PAGE).read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count('<figure class="plot study"') == 2
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "Interrupted" not in page
    text = (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    assert "| Model | Top-1, paper (%) | Speed, paper (images/s) |" in text
    assert "- cpu: " in text
    assert "repvgg study table4" in text
    assert "larger networks of the paper's table were left out" in text


def test_ctrl_c_writes_the_tables_of_what_there_is_and_the_same_call_goes_on(quick, tmp_path):
    small = {"input_size": 8, "rounds": 4, "max_gmacs": 3.0}
    there = sum(row.flops_billions <= 3.0 for row in TABLE_4)
    quick(Stopwatch(2 * there + 2 * there + 1))
    done = run("table4", tmp_path / "t", **small)
    assert not done.complete
    assert "2 rounds, 8 images a call." in (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    assert "Interrupted" in (tmp_path / "t" / PAGE).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "t" / "table4.json").read_text())["finished"] is None
    assert float(rows_of(tmp_path / "t" / "table4.csv")[0]["images_per_second"]) > 0
    stopwatch = quick(Stopwatch())
    assert run("table4", tmp_path / "t", **small).complete
    assert set(stopwatch.calls.values()) == {2 + 2}, "two to warm up, two rounds that were missing"
    assert "4 rounds" in (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    with pytest.raises(OutputExistsError, match="finished study"):
        run("table4", tmp_path / "t", **small)


def test_ctrl_c_before_anything_was_measured_leaves_nothing(quick, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(network_tables, "counted", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("table4", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_other_settings_are_refused_and_nothing_is_touched(quick, tmp_path):
    quick(Stopwatch(20))
    run("table4", tmp_path / "t", input_size=8, rounds=9, max_gmacs=2.0)
    before = {path: path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="rounds 9, and now it is 8"):
        run("table4", tmp_path / "t", input_size=8, rounds=8, max_gmacs=2.0)
    assert {path: path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file()} == before


def test_a_network_without_memory_is_in_the_table(quick, tmp_path, monkeypatch):
    starved = SECONDS | {"resnet18": None}
    monkeypatch.setattr(networks, "deployed", lambda name: Tiny(starved[name], name))
    done = run("table4", tmp_path / "t", input_size=8, rounds=3, max_gmacs=3.0)
    assert done.complete
    rows = {row["model"]: row for row in rows_of(tmp_path / "t" / "table4.csv")}
    assert rows["ResNet-18"]["images_per_second"] == "out of memory"
    assert float(rows["RepVGG-A0"]["images_per_second"]) > 0
    (pair,) = rows_of(tmp_path / "t" / "table4-pairs.csv")
    assert pair["ratio"] == ""


def test_pairs_share_rounds_where_all_do_not_fit(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "fit_together", lambda *_: False)
    run("table4", tmp_path / "t", input_size=8, rounds=2, max_gmacs=1000.0)
    plan = json.loads((tmp_path / "t" / "cells" / "plan.json").read_text())["groups"]
    assert ["resnet50", "repvgg_a0", "resnet18"] in plan
    assert all(group[0] == "resnet50" for group in plan)
    pairs = rows_of(tmp_path / "t" / "table4-pairs.csv")
    assert all(float(row["ratio"]) == pytest.approx(float(row["paper_ratio"])) for row in pairs)


def test_too_few_multiply_adds_for_any(tmp_path):
    with pytest.raises(UsageError, match=r"take --max-gmacs 0\.4 or more"):
        run("table4", tmp_path / "t", max_gmacs=0.1)
    assert not (tmp_path / "t").exists()


def test_figure1_tells_which_are_best_of_both(quick, tmp_path):
    done = run("figure1", tmp_path / "f", input_size=8, rounds=2, max_gmacs=1000.0)
    rows = rows_of(tmp_path / "f" / "figure1.csv")
    assert len(rows) == 24
    best = {row["model"] for row in rows if row["undominated"] == "True"}
    assert {"RepVGG-A0", "RepVGG-A1", "RepVGG-A2"} <= best
    assert not {"ResNet-18", "VGG-16", "EfficientNet-B3"} & best
    speeds = {row["model"]: float(row["images_per_second"]) for row in rows}
    assert speeds["RepVGG-B3"] / speeds["RegNetX-12GF"] == pytest.approx(1.31, abs=0.005)
    assert "are RepVGG" in done.outcome.lead


def test_few_networks_of_a_panel_are_left_to_the_table():
    """With a limit on the arithmetic the paper's right panel may hold two networks, whose axes would say nothing."""
    from matplotlib.figure import Figure

    speeds = networks.speeds_of(
        networks.NetworkSettings(batch=1),
        {
            "plan": {"groups": [list(SECONDS)]},
            "round-00-0000": {"seconds": SECONDS},
        },
    )
    few = [point for point in FIGURE_1 if point.epochs == 120 or point.model in ("repvgg_b2g4", "efficientnet_b3")]
    for points, panels in ((FIGURE_1, 2), (few, 1)):
        drawn = Figure()
        figure1._draw(drawn, points, speeds)
        assert len(drawn.axes) == panels
        words = [text.get_text() for axes in drawn.axes for text in axes.texts]
        assert {"RepVGG-A0", "A1", "B2g4", "ResNet-50"} <= set(words)


def test_mobile_sets_published_numbers_beside_ours(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "deployed", lambda name: Tiny(2.0 if name.startswith("repvgg") else 1.0, name))
    monkeypatch.setattr(mobile, "_counted", lambda name: counted("", [name])[name])
    done = run("mobile", tmp_path / "m", input_size=8, rounds=2)
    rows = {row["model"]: row for row in rows_of(tmp_path / "m" / "mobile.csv")}
    assert len(rows) == len(mobile.ROWS)
    assert float(rows["MobileNetV2"]["published_top1_percent"]) == 72.0
    assert [float(rows[name]["speed_up"]) for name in ("RepVGG-A0", "MobileNetV2")] == [0.5, 1.0]
    assert {name for name, row in rows.items() if row["undominated"] == "True"} == {"MobileOne-S4"}
    assert done.outcome.lead.endswith("0 are RepVGG.")


@pytest.mark.parametrize("row", mobile.ROWS, ids=lambda row: row.model)
def test_mobile_counts_what_the_authors_publish(row):
    """To what they round to; classifiers and gates are counted by some and not by others."""
    found = mobile._counted(row.model)
    assert found["params"] / 1e6 == pytest.approx(row.params_millions, rel=0.03, abs=0.06)
    assert found["macs"] / 1e9 == pytest.approx(row.flops_billions, rel=0.04)


def test_table1_counts_and_divides_by_hand(quick, tmp_path):
    """4 images of 8 channels, 6x6: 4 · 36 · 9 · 64 multiply-adds of the 3x3, in 3 seconds."""
    quick(Stopwatch(seconds=lambda conv: float(conv.kernel_size[0])))
    run("table1", tmp_path / "t", batch=4, channels=8, size=6, rounds=2)
    rows = rows_of(tmp_path / "t" / "table1.csv")
    assert [row["kernel"] for row in rows] == ["1 × 1", "3 × 3", "5 × 5", "7 × 7"]
    assert float(rows[1]["flops_billions"]) == pytest.approx(4 * 36 * 9 * 64 / 1e9)
    assert float(rows[1]["milliseconds"]) == 3000.0
    assert float(rows[1]["tflops"]) == pytest.approx(2 * 4 * 36 * 9 * 64 / 3 / 1e12)
    assert [float(row["paper_milliseconds"]) for row in rows] == [row.milliseconds for row in TABLE_1]


def test_table1_agrees_with_the_paper_on_the_arithmetic():
    from repvgg.studies.table1 import STUDY, macs_of

    settings = STUDY.resolve(STUDY.settings(setting=RunSettings(device="cuda")))
    for row in TABLE_1:
        assert macs_of(row.kernel, settings) / 1e9 == pytest.approx(row.flops_billions, abs=0.1)


def branches_of(model):
    return len(next((part for part in model.modules() if isinstance(part, BranchSum)), ()))


def test_table6_removes_branches_from_every_block(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(table6_speed, "spec_of", lambda name: "repvgg_t0")
    forms = {form.name: table6_speed._build(form) for form in table6_speed._FORMS}
    full = create_model("repvgg_t0")
    kinds = {name: set() for name in forms}
    for name, model in forms.items():
        for part in model.modules():
            kinds[name] |= set(part) if isinstance(part, BranchSum) else set()
    assert kinds == {
        "dense": {"dense"},
        "dense-identity": {"dense", "identity"},
        "dense-pointwise": {"dense", "pointwise"},
        "dense-identity-pointwise": {"dense", "pointwise", "identity"},
        "converted": set(),
    }
    assert forms["dense-identity-pointwise"].state_dict().keys() == full.state_dict().keys()
    quick(Stopwatch(seconds=lambda model: 1.0 + branches_of(model)))
    done = run("table6-speed", tmp_path / "t", batch=1, rounds=2, input_size=8)
    rows = rows_of(tmp_path / "t" / "table6-speed.csv")
    assert [float(row["paper_images_per_second"]) for row in rows[:4]] == [row.images_per_second for row in TABLE_6]
    assert [(row["identity"], row["pointwise"]) for row in rows] == [
        ("False", "False"),
        ("True", "False"),
        ("False", "True"),
        ("True", "True"),
        ("", ""),
    ]
    speeds = [float(row["speed_up"]) for row in rows]
    assert speeds[3] == 1.0
    assert speeds[0] > speeds[3], "the stem has no identity: 1 branch against 2"
    assert speeds[4] > speeds[0]
    assert "Conversion makes RepVGG-B0" in done.outcome.lead


def test_figure3_holds_one_and_two_maps_beside_the_one_that_is_written(tmp_path, monkeypatch):
    """Weights are small beside maps of 1 MB; libraries pad channels to a multiple of 16."""
    monkeypatch.setattr(figure3, "deployed", lambda name: nn.ReLU())
    done = run("figure3", tmp_path / "f", batch=1, channels=16, size=128, input_size=16)
    rows = {row["block"]: row for row in rows_of(tmp_path / "f" / "figure3.csv")}
    residual, plain = rows["residual block"], rows["plain chain of two"]
    assert float(residual["extra_channels_last"]) == pytest.approx(2.0, abs=0.02)
    assert float(plain["extra_channels_last"]) == pytest.approx(1.0, abs=0.02)
    assert float(residual["extra_contiguous"]) - float(plain["extra_contiguous"]) == pytest.approx(1.0, abs=0.02)
    assert float(rows["RepVGG block, train form"]["extra_channels_last"]) > 2.5
    assert float(rows["residual block"]["input_megabytes"]) == 16 * 128 * 128 * 4 / 1e6
    networks_csv = rows_of(tmp_path / "f" / "figure3-networks.csv")
    out = 3 * 16 * 16 * 4 / 1e6
    assert [float(row["peak_megabytes"]) for row in networks_csv] == [out] * 4
    assert "the paper draws 2 and 1" in done.outcome.lead


def test_figure3_goes_on_and_records_what_has_no_memory(tmp_path, monkeypatch):
    def starved(name):
        if name == "resnet18":
            raise KeyboardInterrupt
        return Tiny(None if name == "repvgg_a0" else 1.0)

    monkeypatch.setattr(figure3, "deployed", starved)
    small = {"batch": 1, "channels": 2, "size": 8, "input_size": 8}
    assert not run("figure3", tmp_path / "f", **small).complete
    rows = rows_of(tmp_path / "f" / "figure3-networks.csv")
    assert [row["peak_megabytes"] for row in rows] == ["out of memory", "", "", ""]
    done = []
    monkeypatch.setattr(figure3, "deployed", lambda name: done.append(name) or Tiny(1.0))
    assert run("figure3", tmp_path / "f", **small).complete
    assert done == ["resnet18", "repvgg_a2", "resnet50"]


def test_progress_is_shown_on_a_terminal(quick, tmp_path, capsys):
    console = Console(force_terminal=True, stderr=True)
    wanted = STUDIES["table4"]
    run_study(wanted, wanted.settings(input_size=8, rounds=2, max_gmacs=0.5), tmp_path / "t", console=console)
    assert "measuring" in capsys.readouterr().err


def test_counts_are_those_of_the_plain_form():
    found = count_table.counted("table4", ["repvgg_a0", "resnet18"])
    assert (found["repvgg_a0"]["params"], found["repvgg_a0"]["macs"]) == (8_309_384, 1_361_451_008)
    assert count_table.counts_of("resnet18", found) == pytest.approx((11.68, 1.8, 1.0), abs=0.05)
    assert count_table.counts_of("resnet34", found) == (None, None, None)


def test_the_networks_are_those_that_one_would_deploy():
    assert not any(isinstance(part, nn.BatchNorm2d) for part in networks.deployed("resnet18").modules())
    plain = networks.deployed("repvgg_a0")
    assert not any(isinstance(part, (nn.BatchNorm2d, BranchSum)) for part in plain.modules())
    assert not plain.training
    assert networks.title_of("repvgg_b1g4") == "RepVGG-B1g4"
    assert networks.title_of("efficientnet_b0") == "EfficientNet-B0"
    assert partial(networks._candidate, input_size=None)("efficientnet_b3").image == (3, 300, 300)
