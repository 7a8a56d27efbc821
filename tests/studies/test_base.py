"""The registry of studies, and what all of them share: folders, interruption, files and progress."""

import json
import re
from dataclasses import fields

import pytest
from rich.console import Console

from repvgg.errors import OutputExistsError, UsageError
from repvgg.measure import RunSettings
from repvgg.studies import all_studies, base, find_study, network_speed
from repvgg.studies.ablation import AblationSettings
from repvgg.studies.base import PAGE, flatten, run_study
from repvgg.studies.int8 import Int8Settings
from repvgg.studies.paper import TABLE_4
from repvgg.studies.report import charts
from repvgg.studies.segmentation import SegmentationSettings
from tests.studies.helpers import FakeStopwatch, read_rows, run

STUDIES = all_studies()


def test_registry_finds_each_study_by_name():
    names = [
        "table1",
        "table4",
        "table5",
        "table6",
        "table6-speed",
        "table7",
        "table8",
        "blocks",
        "figure1",
        "figure3",
        "int8",
        "mobile",
    ]
    assert list(STUDIES) == names
    assert all(name == study.name for name, study in STUDIES.items())
    with pytest.raises(UsageError, match="did you mean table4"):
        find_study("tabel4")
    with pytest.raises(UsageError, match="choose one of table1"):
        find_study("xyzzy")


WITHOUT_A_DEVICE_TO_CHOOSE = (AblationSettings, SegmentationSettings, Int8Settings)  # they train, or need the CPU


@pytest.mark.parametrize("name", [name for name in STUDIES if STUDIES[name].settings not in WITHOUT_A_DEVICE_TO_CHOOSE])
def test_settings_are_flat_and_resolved_for_the_device(name):
    study = STUDIES[name]
    names = [field.name for field in fields(study.settings) if field.name != "run"]
    assert not set(names) & {field.name for field in fields(RunSettings)}
    on_cpu, on_gpu = (flatten(study.resolve(study.settings(run=RunSettings(device=d)))) for d in ("cpu", "cuda"))
    assert on_cpu["batch"] < on_gpu["batch"]
    assert {key for key, value in on_gpu.items() if value is None} <= {"threads", "input_size"}
    for name in set(names) - {"engine", "rows"}:  # the others are numbers
        with pytest.raises(UsageError):
            study.settings(**{name: 0})


def test_study_writes_complete_files_and_a_page(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "write_chart", charts.write_chart)
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
    assert "networks of the paper's table were left out" in text


def test_ctrl_c_writes_tables_and_the_same_call_continues(quick, tmp_path):
    small = {"input_size": 8, "rounds": 4, "max_gmacs": 3.0}
    networks = sum(row.flops_billions <= 3.0 for row in TABLE_4)
    quick(FakeStopwatch(2 * networks + 2 * networks + 1))
    result = run("table4", tmp_path / "t", **small)
    assert not result.complete
    assert "2 rounds, 8 images a call." in (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    assert "Interrupted" in (tmp_path / "t" / PAGE).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "t" / "table4.json").read_text())["finished"] is None
    assert float(read_rows(tmp_path / "t" / "table4.csv")[0]["images_per_second"]) > 0
    stopwatch = quick(FakeStopwatch())
    assert run("table4", tmp_path / "t", **small).complete
    assert set(stopwatch.calls.values()) == {2 + 2}, "two to warm up, two missing rounds"
    assert "4 rounds" in (tmp_path / "t" / "table4.md").read_text(encoding="utf-8")
    with pytest.raises(OutputExistsError, match="finished study"):
        run("table4", tmp_path / "t", **small)


def test_ctrl_c_before_the_first_cell_writes_nothing(quick, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(network_speed, "count_cell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("table4", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_other_settings_are_refused_and_files_left_unchanged(quick, tmp_path):
    quick(FakeStopwatch(20))
    run("table4", tmp_path / "t", input_size=8, rounds=9, max_gmacs=2.0)
    before = {path: path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="rounds 9, not 8"):
        run("table4", tmp_path / "t", input_size=8, rounds=8, max_gmacs=2.0)
    assert {path: path.read_bytes() for path in (tmp_path / "t").rglob("*") if path.is_file()} == before


def test_progress_bar_on_a_terminal(quick, tmp_path, capsys):
    console = Console(force_terminal=True, stderr=True)
    study = find_study("table4")
    run_study(study, study.settings(input_size=8, rounds=2, max_gmacs=0.5), tmp_path / "t", console=console)
    assert "measuring" in capsys.readouterr().err
