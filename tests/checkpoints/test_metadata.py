import json

import pytest
import torch
from safetensors.torch import save_file

from repvgg.checkpoints import Metadata, read_checkpoint
from repvgg.errors import CheckpointError

GOOD = {"model": "repvgg_t0", "form": "plain", "num_classes": 2, "in_channels": 3, "input_size": 32}


def write(path, header):
    save_file({"a": torch.zeros(1)}, path, {"repvgg": header if isinstance(header, str) else json.dumps(header)})
    return path


def test_required_fields_only(tmp_path):
    found = read_checkpoint(write(tmp_path / "a.safetensors", GOOD)).metadata
    assert found == Metadata("repvgg_t0", "plain", 2, 3, 32)


def test_fields_of_later_versions_are_ignored(tmp_path):
    found = read_checkpoint(write(tmp_path / "a.safetensors", {**GOOD, "colour": "red"})).metadata
    assert found == Metadata("repvgg_t0", "plain", 2, 3, 32)


@pytest.mark.parametrize(
    "header", ["", "{", "no json", "5", "null", "[]", "[1]", "{}", '"text"', "[" * 100_000, '{"model": "repvgg_t0"}']
)
def test_unreadable_headers(tmp_path, header):
    with pytest.raises(CheckpointError, match=r"header that cannot be read \(.+\): save it again\.$"):
        read_checkpoint(write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("model", value) for value in (5, None, ["repvgg_t0"])),
        *(("form", value) for value in ("deploy", None, ["plain"])),
        *(
            (field, value)
            for field in ("num_classes", "in_channels", "input_size")
            for value in (0, -1, "3", 3.0, True, None, 10**30)
        ),
        *((field, value) for field in ("mean", "std") for value in ([0.5], ["a", "b", "c"], "abc", [True, 1, 2])),
        *(("classes", value) for value in (["one"], [1, 2], "abc")),
        *(("recipe", value) for value in ("x", [1], 5)),
        *(("metrics", value) for value in ([0.5], {"top1": "high"}, 5)),
        ("version", 3),
        *(("palette", value) for value in ([[0, 0, 0]], [[0, 0], [1, 1]], [[0, 0, 256]] * 2, [["a", 1, 2]] * 2)),
    ],
)
def test_invalid_fields(tmp_path, field, value):
    with pytest.raises(CheckpointError, match=f"header with an invalid '{field}': save it again") as caught:
        read_checkpoint(write(tmp_path / "a.safetensors", {**GOOD, field: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["mean", "std", "classes"])
@pytest.mark.parametrize("value", [5, None])
def test_fields_that_should_be_lists(tmp_path, field, value):
    with pytest.raises(CheckpointError, match="header that cannot be read"):
        read_checkpoint(write(tmp_path / "a.safetensors", {**GOOD, field: value}))


OLD_HEADER = (  # of version 0.1.0, with every field
    '{"classes": ["cat", "dog"], "ema": true, "form": "train", "in_channels": 3, "input_size": 8, '
    '"mean": [0.485, 0.456, 0.406], "metrics": {"held_out_accuracy": 0.75, "held_out_top5": 1.0}, '
    '"model": "tiny", "num_classes": 2, "recipe": {"data": {"mean": null, "uri": "fake:96x4"}, "epochs": 2, '
    '"optim": {"clip": null, "lr": 0.05}}, "source": "timm", "spec": {"name": "tiny"}, "std": [0.229, 0.224, 0.225], '
    '"version": "0.1.0"}'
)


def test_a_header_of_version_0_1_0(tmp_path):
    found = read_checkpoint(write(tmp_path / "a.safetensors", OLD_HEADER)).metadata
    assert found == Metadata(
        "tiny",
        "train",
        num_classes=2,
        in_channels=3,
        input_size=8,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classes=("cat", "dog"),
        recipe={"epochs": 2, "data": {"uri": "fake:96x4", "mean": None}, "optim": {"lr": 0.05, "clip": None}},
        metrics={"held_out_accuracy": 0.75, "held_out_top5": 1.0},
        version="0.1.0",
        ema=True,
        source="timm",
        spec={"name": "tiny"},
    )
    assert found.to_header() == {"format": "pt", "repvgg": OLD_HEADER}
