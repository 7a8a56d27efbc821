"""Table 1 and the speed column of Table 6, with given seconds."""

import pytest

from repvgg.blocks import BranchSum
from repvgg.measure import RunSettings
from repvgg.models import create_model
from repvgg.studies import block_speed, find_study
from repvgg.studies.block_speed import macs_of
from repvgg.studies.paper import TABLE_1, TABLE_6
from tests.studies.helpers import FakeStopwatch, read_rows, run


def test_table1_by_hand(quick, tmp_path):
    """4 images of 8 channels, 6x6: 4 · 36 · 9 · 64 multiply-adds of the 3x3, in 3 seconds."""
    quick(FakeStopwatch(seconds=lambda conv: float(conv.kernel_size[0])))
    run("table1", tmp_path / "t", batch=4, channels=8, size=6, rounds=2)
    rows = read_rows(tmp_path / "t" / "table1.csv")
    assert [row["kernel"] for row in rows] == ["1 × 1", "3 × 3", "5 × 5", "7 × 7"]
    assert float(rows[1]["flops_billions"]) == pytest.approx(4 * 36 * 9 * 64 / 1e9)
    assert float(rows[1]["milliseconds"]) == 3000.0
    assert float(rows[1]["tflops"]) == pytest.approx(2 * 4 * 36 * 9 * 64 / 3 / 1e12)
    assert [float(row["paper_milliseconds"]) for row in rows] == [row.milliseconds for row in TABLE_1]


def test_table1_counts_the_same_flops_as_the_paper():
    study = find_study("table1")
    settings = study.resolve(study.settings(run=RunSettings(device="cuda")))
    for row in TABLE_1:
        assert macs_of(row.kernel, settings) / 1e9 == pytest.approx(row.flops_billions, abs=0.1)


def num_branches(model):
    return len(next((part for part in model.modules() if isinstance(part, BranchSum)), ()))


def test_table6_speed_removes_branches_from_every_block(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(block_speed, "spec_of", lambda name: "repvgg_t0")
    forms = {form.name: block_speed._build(form) for form in block_speed._FORMS}
    full = create_model("repvgg_t0")
    branches = {name: set() for name in forms}
    for name, model in forms.items():
        for part in model.modules():
            branches[name] |= set(part) if isinstance(part, BranchSum) else set()
    assert branches == {
        "dense": {"dense"},
        "dense-identity": {"dense", "identity"},
        "dense-pointwise": {"dense", "pointwise"},
        "dense-identity-pointwise": {"dense", "pointwise", "identity"},
        "converted": set(),
    }
    assert forms["dense-identity-pointwise"].state_dict().keys() == full.state_dict().keys()
    quick(FakeStopwatch(seconds=lambda model: 1.0 + num_branches(model)))
    result = run("table6-speed", tmp_path / "t", batch=1, rounds=2, input_size=8)
    rows = read_rows(tmp_path / "t" / "table6-speed.csv")
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
    assert "Conversion makes RepVGG-B0" in result.outcome.lead
