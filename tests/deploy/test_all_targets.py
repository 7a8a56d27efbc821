import json
from pathlib import Path

import pytest
import torch
from torch import nn

from repvgg.deploy.all_targets import TABLE, export_all, file_name
from repvgg.deploy.targets import TARGETS, ExportRequest
from repvgg.errors import ExportError, OutputExistsError
from tests.deploy.test_targets import SHAPE, STATISTICS, network, pixels, request


def test_a_folder_with_a_table_and_a_reason_for_each_target_that_is_missing(tmp_path, monkeypatch):
    given = request("c", tmp_path, out=tmp_path / "all")
    monkeypatch.setattr(
        "repvgg.deploy.targets.importlib.util.find_spec", lambda name: None if name == "executorch" else object()
    )
    table = export_all(given, rounds=2, names=("torchscript", "executorch", "litert"))
    script, missing, refused = table.rows
    assert (script.status, script.file) == ("equal", "model.torchscript")
    assert script.size == (tmp_path / "all" / "model.torchscript").stat().st_size
    assert 0 < script.error < script.tolerance
    assert 0 < script.photograph_error < script.tolerance
    low, middle, high = script.milliseconds
    assert 0 < low <= middle <= high
    assert (missing.status, missing.file, missing.milliseconds) == ("not installed", "", None)
    assert "pip install 'repvgg[executorch]'" in missing.reason
    assert refused.status == "failed"
    assert "requires an older PyTorch" in refused.reason
    stored = json.loads((tmp_path / "all" / TABLE).read_text())
    assert [row["status"] for row in stored["rows"]] == ["equal", "not installed", "failed"]
    page = (tmp_path / "all" / "README.md").read_text()
    assert "| executorch |  |  |  |  |  | not installed: This needs 'executorch'" in page
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == ["README.md", TABLE, "model.torchscript"]
    with pytest.raises(OutputExistsError):
        export_all(given, rounds=2, names=("torchscript",))


def test_no_two_targets_write_a_file_of_one_name():
    names = [Path(file_name(name)).with_suffix(end).name for name, one in TARGETS.items() for end in one.suffixes]
    assert len(set(names)) == len(names) > len([one for one in TARGETS.values() if one.suffix])
    assert [file_name(name) for name in ("onnx", "openvino", "ncnn", "tensorrt", "c")] == [
        "model.onnx", "model.xml", "model.ncnn.param", "model.tensorrt.onnx", "c"
    ]  # fmt: skip


def test_a_file_that_differs_is_a_row_and_nothing_at_all_is_an_error(tmp_path):
    given = request("c", tmp_path, out=tmp_path / "all", plain=network(1))
    with pytest.raises(ExportError, match="No file could be written: torchscript"):
        export_all(given, rounds=2, names=("torchscript", "litert"))
    assert list(tmp_path.iterdir()) == []


def test_the_reference_runs_once_for_all_targets(tmp_path):
    class Counting(nn.Module):
        runs = 0

        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            if x.dtype is torch.float64:
                Counting.runs += 1
            return self.model(x)

    given = ExportRequest(
        Counting(), network(), tmp_path / "all", SHAPE, [STATISTICS.apply(pixels())], preprocessing=STATISTICS
    )
    export_all(given, rounds=2, names=("torchscript", "pt2"))
    assert Counting.runs == 4  # three batches of border images, and one of photographs
