"""Figure 3: feature maps that are live at the peak of a block."""

import pytest
from torch import nn

from repvgg.studies import figure3
from tests.studies.helpers import Tiny, read_rows, run


def test_residual_block_holds_two_maps_and_plain_chain_one(tmp_path, monkeypatch):
    """Weights are small compared with maps of 1 MB; libraries pad channels to a multiple of 16."""
    monkeypatch.setattr(figure3, "deployed", lambda name: nn.ReLU())
    result = run("figure3", tmp_path / "f", batch=1, channels=16, size=128, input_size=16)
    rows = {row["block"]: row for row in read_rows(tmp_path / "f" / "figure3.csv")}
    residual, plain = rows["residual block"], rows["plain chain of two"]
    assert float(residual["extra_channels_last"]) == pytest.approx(2.0, abs=0.02)
    assert float(plain["extra_channels_last"]) == pytest.approx(1.0, abs=0.02)
    assert float(residual["extra_contiguous"]) - float(plain["extra_contiguous"]) == pytest.approx(1.0, abs=0.02)
    assert float(rows["RepVGG block, train form"]["extra_channels_last"]) > 2.5
    assert float(rows["residual block"]["input_megabytes"]) == 16 * 128 * 128 * 4 / 1e6
    networks = read_rows(tmp_path / "f" / "figure3-networks.csv")
    output_megabytes = 3 * 16 * 16 * 4 / 1e6
    assert [float(row["peak_megabytes"]) for row in networks] == [output_megabytes] * 4
    assert "the paper draws 2 and 1" in result.outcome.lead


def test_continues_and_records_networks_out_of_memory(tmp_path, monkeypatch):
    def starved(name):
        if name == "resnet18":
            raise KeyboardInterrupt
        return Tiny(None if name == "repvgg_a0" else 1.0)

    monkeypatch.setattr(figure3, "deployed", starved)
    small = {"batch": 1, "channels": 2, "size": 8, "input_size": 8}
    assert not run("figure3", tmp_path / "f", **small).complete
    rows = read_rows(tmp_path / "f" / "figure3-networks.csv")
    assert [row["peak_megabytes"] for row in rows] == ["out of memory", "", "", ""]
    measured = []
    monkeypatch.setattr(figure3, "deployed", lambda name: measured.append(name) or Tiny(1.0))
    assert run("figure3", tmp_path / "f", **small).complete
    assert measured == ["resnet18", "repvgg_a2", "resnet50"]
