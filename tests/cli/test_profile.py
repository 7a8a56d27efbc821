import json
import sys
from functools import cache

import pytest
import torch

from repvgg.measure import count
from repvgg.models import create_model, list_models
from repvgg.studies.counts import count_rows


def lines(text):
    return {line.split("  ")[0]: line for line in text.splitlines()}


def test_both_forms_side_by_side(repvgg):
    outcome = repvgg("profile", "repvgg_a0")
    assert (outcome.code, outcome.err) == (0, "")
    title, header, *rows = outcome.out.splitlines()
    assert title == "repvgg_a0: batch 1, images of 3 x 224 x 224, float32"
    assert header.split() == ["train", "form", "plain", "form"]
    assert rows[0].split() == ["parameters", "9.109", "M", "8.309", "M"]
    assert rows[1].split()[-4:] == ["1.513", "G", "1.361", "G"]
    assert rows[2].split()[-4:] == ["898.4", "M", "747.3", "M"]
    assert len(rows) == 7
    assert max(map(len, outcome.out.splitlines())) < 80


def test_json_is_exact_and_agrees_with_the_counts(repvgg):
    outcome = repvgg("profile", "repvgg_a0", "--json")
    result = json.loads(outcome.out)
    assert (result["model"], result["input_size"], result["dtype"]) == ("repvgg_a0", [224, 224], "float32")
    for form, plain in (("train", False), ("plain", True)):
        with torch.device("meta"):
            expected = count(create_model("repvgg_a0", plain=plain))
        total = result["forms"][form]["total"]
        assert (total["params"], total["macs"]) == (expected.params, expected.macs)
        assert total["winograd_muls"] == expected.winograd_muls
        assert total["unknown"] == total["unknown_traffic"] == []
        assert total["macs_per_byte"] == pytest.approx(total["macs"] / total["bytes_moved"])
        assert result["forms"][form].keys() == {"total", "weight_bytes"}


@pytest.mark.parametrize(("per", "number"), [("layer", 17), ("stage", 7)])
def test_rows(repvgg, per, number):
    outcome = repvgg("profile", "repvgg_t0", "--form", "plain", "--per", per, "--json")
    rows = json.loads(outcome.out)["forms"]["plain"][f"{per}s"]
    assert len(rows) == number
    table = repvgg("profile", "repvgg_t0", "--form", "plain", "--per", per).out.splitlines()
    assert table[0].endswith(f"plain form, by {per}")
    assert table[1].split()[0] == per
    assert [line.split()[0] for line in table[2 : 2 + number]] == [row["name"] or "(root)" for row in rows]
    assert max(map(len, table)) < 100


def test_batch_dtype_and_tile(repvgg):
    def total(*more):
        done = json.loads(repvgg("profile", "repvgg_t0", "--form", "plain", "--json", *more).out)
        return done["forms"]["plain"]["total"]

    one = total()
    four = total("--batch", 4)
    assert (four["macs"], four["params"]) == (4 * one["macs"], one["params"])
    assert one["bytes_moved"] < four["bytes_moved"] < 4 * one["bytes_moved"], "weights are read once"
    assert four["peak_bytes"] == 4 * one["peak_bytes"]
    half = total("--dtype", "bfloat16")
    assert 2 * half["bytes_moved"] == one["bytes_moved"]
    fast = total("--winograd", 4)
    assert one["macs"] > one["winograd_muls"] > fast["winograd_muls"] > one["macs"] // 4
    large = total("--input-size", 64, 32)
    assert 1.9 * one["macs"] < large["macs"] < 2.0 * one["macs"]


def test_large_images_take_no_memory(repvgg, monkeypatch):
    """B3 at 713 x 713 would hold 100 MB; of the values of its parameters, 440 MB, none are made."""

    def refuse(*_, **__):
        raise AssertionError("values")

    monkeypatch.setattr(
        torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor if tensor.is_meta else refuse()
    )
    outcome = repvgg("profile", "repvgg_b3", "--input-size", 713, 713, "--json")
    forms = json.loads(outcome.out)["forms"]
    assert forms["plain"]["total"]["macs"] > 200e9
    assert forms["plain"]["total"]["peak_bytes"] > 100e6


def test_a_baseline_is_collapsed_for_its_plain_form(repvgg):
    forms = json.loads(repvgg("profile", "mobileone_s0", "--input-size", 64, 64, "--json").out)["forms"]
    assert forms["plain"]["total"]["params"] == 2078504
    assert forms["train"]["total"]["params"] == 5293272


def test_checkpoints(repvgg, refused, files):
    forms = json.loads(repvgg("profile", files.train, "--json").out)
    assert (list(forms["forms"]), forms["channels"], forms["input_size"]) == (["train", "plain"], 1, [16, 16])
    plain = json.loads(repvgg("profile", files.plain, "--json").out)
    assert list(plain["forms"]) == ["plain"]
    assert plain["forms"]["plain"] == forms["forms"]["plain"]
    assert "profile it with --form plain" in refused("profile", files.plain, "--form", "train")


NET = """
import torch
from torch import nn


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if bool((x == 0).all()) else x


class Strange(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x)
"""


def test_a_forward_that_looks_at_values_is_run_with_some(repvgg, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    total = json.loads(repvgg("profile", f"{tmp_path}/net.py:Looks", "--input-size", 10, 10, "--json").out)
    assert total["forms"]["train"]["total"]["macs"] == 4 * 64 * 27


def test_unknown_ops_are_listed(repvgg, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    out = repvgg("profile", f"{tmp_path}/net.py:Strange", "--input-size", 8, 8).out
    assert "multiply-adds of these ops are unknown and not in the sums: aten._cdist_forward" in out
    assert "bytes of these ops are unknown and not in the sums: aten._cdist_forward" in out
    assert ">= 0" in lines(out)["multiply-adds (the paper's FLOPs)"]


def test_bad_input(refused, monkeypatch):
    assert "at least 1" in refused("profile", "repvgg_t0", "--batch", 0)
    assert "at least 1" in refused("profile", "repvgg_t0", "--input-size", 0, 5)
    assert "did you mean repvgg_a0" in refused("profile", "repvgg_a00")
    assert "There is no file" in refused("profile", "missing.safetensors")
    assert "does not run on inputs[0]: float32 (1, 3, 2, 2)" in refused(
        "profile", "torchvision:squeezenet1_1", "--input-size", 2, 2
    )
    assert "give it alone" in refused("profile", "repvgg_t0", "--paper", "table4")
    assert "give it alone" in refused("profile", "--paper", "table4", "--batch", 2)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'repvgg[timm]'" in refused("profile", "mobileone_s0")
    assert "pip install 'repvgg[timm]'" in refused("profile", "--paper", "table5")


def test_the_tables_of_the_paper(repvgg, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("repvgg.studies.counts.count_rows", cache(count_rows))
    outcome = repvgg("profile", "--paper", "table5")
    assert (outcome.code, outcome.err) == (0, "")
    head, *rows = outcome.out.split("\n\n")[0].splitlines()
    assert head.split()[0] == "model"
    assert rows[2].split() == ["RepVGG-B3", "123.09", "110.96", "110.96", "26.2", "26.2", "12.9", "12.9"]
    assert rows[3].split()[-1] == "b"
    reasons = outcome.out.split("\n\n")[1]
    assert "b: 4/9 for the 3x3 convolutions on 28x28 pixels and above only." in reasons
    assert "RegNetX-12GF 10.91." in reasons
    assert "not explained" not in outcome.out
    data = json.loads(repvgg("profile", "--paper", "table5", "--json").out)
    assert [row["model"] for row in data] == [
        "repvgg_b2g4",
        "repvgg_b3g4",
        "repvgg_b3",
        "regnetx_12gf",
        "efficientnet_b3",
    ]
    assert all(difference["explained"] for row in data for difference in row["differences"])
    assert data[2]["paper"]["params_millions"] == 110.96


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_row(repvgg, name):
    assert repvgg("profile", name, "--per", "layer").code == 0
