"""The study of INT8 on a network with random weights and a few digits."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from repvgg import reparameterize
from repvgg.errors import UsageError
from repvgg.models import create_model, describe_model, load, save
from repvgg.quantization import Reference, in_batches
from repvgg.studies import base, int8
from repvgg.studies.int8 import Int8Settings, cell_key
from repvgg.studies.int8_libraries import NNCF_SETTINGS, ONNX_RUNTIME_SETTINGS
from repvgg.studies.int8_rows import FLOAT, OURS, ROWS, TRAINED, Subject
from tests.bn_statistics import trained_like
from tests.studies.helpers import read_rows, run

FEW = {"data": "digits:", "calibration_images": 8, "test_images": 16, "rounds": 2}
TWO = ("ours-nearest", "onnxruntime-u8s8-tensor-minmax")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain, _ = reparameterize(trained_like(create_model("repvgg_t0", num_classes=10, in_channels=1)))
    save(folder / "plain.safetensors", plain, describe_model(plain, "plain", input_size=16))
    return folder


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    monkeypatch.setattr(base, "write_chart", lambda folder, chart: "<svg/>")


def test_rows_are_beside_the_float_network(checkpoint, tmp_path):
    result = run("int8", tmp_path / "s", checkpoints=(f"net={checkpoint}",), rows=TWO, **FEW)
    assert result.complete
    rows = {row["row"]: row for row in read_rows(tmp_path / "s" / "int8-net.csv")}
    assert list(rows) == ["float32", "ours: per tensor, whole ranges, nearest", "ONNX Runtime U8S8 per tensor, MinMax"]
    exact, ours, theirs = rows.values()
    assert float(exact["onnxruntime_agreement_percent"]) == 100
    assert float(exact["onnxruntime_sqnr_db"]) > 90 > float(ours["onnxruntime_sqnr_db"])
    for row in (ours, theirs):
        assert 10 < float(row["onnxruntime_sqnr_db"]) < 60
        low, high = (float(row[f"onnxruntime_difference_{end}"]) for end in ("low", "high"))
        assert low <= float(row["onnxruntime_difference_points"]) <= high
    costs = {row["row"]: row for row in read_rows(tmp_path / "s" / "int8-net-cost.csv")}
    sizes = [float(costs[name]["megabytes"]) for name in rows]
    assert sizes[0] > 2 * max(sizes[1:])
    assert all(float(row["onnxruntime_milliseconds"]) > 0 for row in costs.values())
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert "ONNX Runtime U8S8 per tensor, MinMax" in page
    assert json.loads((tmp_path / "s" / "int8.json").read_text(encoding="utf-8"))["settings"]["test_images"] == 16


@pytest.mark.slow
def test_an_interrupted_study_continues_cell_by_cell(checkpoint, tmp_path, monkeypatch):
    calls = []

    def write(subject, out):
        calls.append(out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        FLOAT.write(subject, out)

    rows = (FLOAT, *(replace(FLOAT, key=f"ours-{name}", title=name, family="ours", write=write) for name in "ab"))
    monkeypatch.setattr(int8, "ROWS", rows)
    first = run("int8", tmp_path / "s", checkpoints=(str(checkpoint),), **FEW)
    assert not first.complete
    assert run("int8", tmp_path / "s", checkpoints=(str(checkpoint),), **FEW).complete
    assert len(calls) == 3  # the first row was not measured again


@pytest.mark.slow
def test_a_row_that_fails_is_shown_with_the_reason(checkpoint, tmp_path, monkeypatch):
    def write(subject, out):
        raise RuntimeError("no such operator")

    broken = replace(FLOAT, key="nncf-broken", title="broken", family="nncf", write=write)
    monkeypatch.setattr(int8, "ROWS", (FLOAT, broken))
    result = run("int8", tmp_path / "s", checkpoints=(f"net={checkpoint}",), **FEW)
    assert result.complete
    assert "broken: RuntimeError: no such operator" in result.outcome.tables[0].notes
    assert read_rows(tmp_path / "s" / "int8-net.csv")[1]["onnxruntime_sqnr_db"] == ""


def test_integers_of_a_training_become_a_row(checkpoint, tmp_path):
    """And are missed where the row is asked for."""
    assert TRAINED not in Int8Settings(**FEW).rows_of("digits")
    trained = shutil.copytree(checkpoint, tmp_path / "net")
    settings = {"checkpoints": (str(trained),), "rows": ("trained",), **FEW}
    assert Int8Settings(**settings).rows_of("net") == (FLOAT,)
    with pytest.raises(UsageError, match=r"'net' has no int8\.onnx: give --trained net=FOLDER"):
        run("int8", tmp_path / "s", **settings)
    (trained / "int8.onnx").touch()
    assert Int8Settings(**settings).rows_of("net") == (FLOAT, replace(TRAINED, source=trained / "int8.onnx"))


def measured(images):
    """What a cell holds."""
    agreement, accuracy = (
        1 - 1 / images,
        {"reference": 0.9, "candidate": 0.8, "difference": -0.1, "interval": [-0.2, 0]},
    )
    one = {"sqnr_db": float(images), "agreement": agreement, "images": images, "saturation_db": 0, "accuracy": accuracy}
    return {"bytes": 1000, "seconds": 1.0, "runtimes": {"ONNX Runtime": one, "OpenVINO": one}}


def test_a_folder_takes_more_networks_rows_and_trainings(checkpoint, tmp_path, monkeypatch):
    """And shows them together; what it has is not measured again."""
    calls = []

    def load_network(settings, path, folder):
        model = nn.Flatten()
        return Subject(model, folder / "float.onnx", torch.zeros(1)), Reference(model, in_batches(torch.ones(16, 1)))

    def cell(row, subject, reference, settings, file):
        calls.append(row.key)
        return measured(sum(len(batch.images) for batch in reference))

    monkeypatch.setattr(int8, "_load", load_network)
    monkeypatch.setattr(int8, "_cell", cell)
    copies = {name: shutil.copytree(checkpoint, tmp_path / name) for name in ("a-qat", "b")}
    (copies["a-qat"] / "int8.onnx").touch()
    settings = {**FEW, "rounds": 0, "baseline_images": 5}
    rows = ("rescaled-float", "onnxruntime-u8u8-tensor-minmax", OURS)
    assert run("int8", tmp_path / "s", checkpoints=(f"a={checkpoint}",), rows=rows, **settings).complete
    assert calls == [OURS, "float", rows[1], rows[0]]
    table = read_rows(tmp_path / "s" / "int8-a.csv")
    assert [row["images"] for row in table] == ["16", "16", "5"]
    (rescaled,) = read_rows(tmp_path / "s" / "int8-a-rescaled.csv")
    assert (rescaled["onnxruntime_sqnr_db"], rescaled["onnxruntime_rescaled_sqnr_db"]) == ("16.0", "5.0")
    assert list(read_rows(tmp_path / "s" / "int8-a-cost.csv")[0]) == ["row", "megabytes", "seconds"]

    networks = {"checkpoints": (f"a={checkpoint}", f"b={copies['b']}"), "trained": (f"a={copies['a-qat']}",)}
    del calls[:]
    assert run("int8", tmp_path / "s", rows=("trained", *rows[1:]), **networks, **settings).complete
    assert calls == ["trained-a-qat", OURS, "float", rows[1]]  # of a, and of b
    summary = {row["row"]: row for row in read_rows(tmp_path / "s" / "int8-summary.csv")}
    trained, unsigned = (summary[name] for name in ("quantization-aware training, a-qat", table[2]["row"]))
    assert (trained["a_openvino_sqnr_db"], trained["b_openvino_sqnr_db"]) == ("16.0", "")
    assert (unsigned["a_openvino_sqnr_db"], unsigned["b_openvino_sqnr_db"]) == ("5.0", "5.0")
    assert float(unsigned["lowest_agreement_percent"]) == pytest.approx(80)
    assert float(unsigned["lowest_difference_points"]) == pytest.approx(-10)

    console = Console(file=io.StringIO())
    run("int8", tmp_path / "s", console, checkpoints=networks["checkpoints"][1:], rows=rows[1:], **settings)
    assert "The folder has more results of a: name" in console.file.getvalue()
    (copies["a-qat"] / "int8.onnx").write_bytes(b"trained again")
    with pytest.raises(UsageError, match="'a' with other weights"):
        run("int8", tmp_path / "s", rows=("trained", *rows[1:]), **networks, **settings)
    (copies["a-qat"] / "int8.onnx").write_bytes(b"")
    save(copies["b"] / "plain.safetensors", *other_network(), overwrite=True)
    with pytest.raises(UsageError, match="'b' with other weights"):
        run("int8", tmp_path / "s", rows=("trained", *rows[1:]), **networks, **settings)

    (cell,) = (tmp_path / "s" / "cells").glob("a*trained-a-qat.json")
    old = {name: value for name, value in json.loads(cell.read_text(encoding="utf-8")).items() if name != "integers"}
    cell.write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(UsageError, match="results measured by an earlier version"):
        run("int8", tmp_path / "s", rows=("trained", *rows[1:]), **networks, **settings)


def other_network():
    other = create_model("repvgg_t0", num_classes=10, in_channels=1)
    return other, describe_model(other, "train", input_size=16)


@pytest.mark.slow
def test_a_network_with_rescaled_channels_and_a_training_are_compared_with_the_float_network(checkpoint, tmp_path):
    trained = shutil.copytree(checkpoint, tmp_path / "qat")
    subject = Subject(load(checkpoint / "plain.safetensors").model, tmp_path / "f.onnx", torch.rand(8, 1, 16, 16))
    next(row for row in ROWS if row.key == "ours-nearest").write(subject, trained / "int8.onnx")
    networks = {"checkpoints": (f"a={checkpoint}",), "trained": (f"a={trained}",)}
    rows = ("rescaled-float", "rescaled-ours-nearest", "trained")
    run("int8", tmp_path / "s", rows=rows, **networks, **{**FEW, "rounds": 0})
    same, broken = read_rows(tmp_path / "s" / "int8-a-rescaled.csv")
    assert float(same["onnxruntime_rescaled_sqnr_db"]) > 80  # it is the same function
    assert float(broken["onnxruntime_rescaled_sqnr_db"]) < 10
    integers = read_rows(tmp_path / "s" / "int8-a.csv")[1]
    assert 10 < float(integers["onnxruntime_sqnr_db"]) < 60


def test_no_two_cells_have_one_key():
    rows = {row.key: row for row in ROWS}
    assert cell_key("a", rows["rescaled-float"]) != cell_key("a-rescaled", rows["float"])
    ((name, _),) = Int8Settings(**FEW | {"checkpoints": ("a--B-=x",)}).named_checkpoints
    assert name == "a-b"  # without the separator


def test_every_setting_has_a_name_of_its_own():
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert len(ONNX_RUNTIME_SETTINGS) == 2 * 2 * 2 * 3 + 2 * 3
    assert len(NNCF_SETTINGS) == 7
    assert sum(bool(row.rescales) for row in ROWS) == 9
    assert {row.rescales for row in ROWS} <= {"", *(row.key for row in ROWS)}
    assert OURS in {row.key for row in ROWS}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rows": ("other",)}, "No row begins with 'other'"),
        ({"checkpoints": ("a=x", "a=y"), "data": "digits:"}, "Two checkpoints have one name"),
        ({"checkpoints": ("x",)}, "nothing to calibrate on"),
        ({"trained": ("b=runs/qat",)}, "No checkpoint is named 'b'"),
        ({"trained": ("digits=a/qat", "digits=b/qat")}, "folders of one name"),
        ({"rounds": -1}, "rounds must be at least 0"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Int8Settings(**settings)


def test_a_checkpoint_that_does_not_exist_is_refused_first(tmp_path):
    with pytest.raises(UsageError, match="There is no checkpoint"):
        run("int8", tmp_path / "s", checkpoints=(str(tmp_path / "x.safetensors"),), **FEW)
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match=r"has no int8\.onnx"):
        run("int8", tmp_path / "s", trained=(f"digits={tmp_path / 'run'}",), **FEW)
    assert not (tmp_path / "s").exists()
