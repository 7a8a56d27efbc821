"""Short representations of results, and their tables in notebooks."""

from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import repvgg
from repvgg._html import table
from repvgg.measure import profile
from repvgg.models import create_model, describe_model, load, save
from tests.bn_statistics import trained_like


def net():
    return trained_like(create_model("repvgg_t0", num_classes=10, in_channels=1))


def loaded(folder):
    model = net()
    about = describe_model(model, "train", input_size=16, metrics={"top1": 0.5})
    save(folder / "a<b>.safetensors", model, about)
    return load(folder / "a<b>.safetensors")


RESULTS = {
    "Report": lambda folder: repvgg.reparameterize(net())[1],
    "ExpandReport": lambda folder: repvgg.expand(create_model("repvgg_t0", plain=True), data=torch.randn(8, 3, 9, 9))[
        1
    ],
    "LoadedModel": loaded,
    "EquivalentConv": lambda folder: repvgg.equivalent_conv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1))),
    "Profile": lambda folder: profile(net(), torch.zeros(1, 1, 16, 16)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_short_and_in_a_notebook(name, tmp_path):
    result = RESULTS[name](tmp_path)
    text = repr(result)
    assert text.startswith(f"{name}(")
    assert text.endswith(")")
    assert len(text) < 160
    assert "\n" not in text
    tree = ElementTree.fromstring(f"<div>{result._repr_html_()}</div>")
    columns = tree.findall("table/thead/tr/th")
    rows = tree.findall("table/tbody/tr")
    assert len(rows) >= 2
    assert {len(row) for row in rows} == {len(columns)}


def test_what_they_say(tmp_path):
    assert repr(RESULTS["Report"](tmp_path)) == "Report(7 regions folded, 21,504 parameters saved)"
    assert repr(RESULTS["EquivalentConv"](tmp_path)) == "EquivalentConv(weight (5, 3, 3, 3), bias (5,), float32)"
    assert repr(loaded(tmp_path)) == "LoadedModel(repvgg_t0, train form, 10 classes, images of 1 x 16 x 16)"


def test_text_is_escaped_and_long_tables_are_cut():
    html = table("<script>", ("a & b",), [("<td>",)] * 150)
    assert "<script>" not in html
    assert ElementTree.fromstring(f"<div>{html}</div>").findall("p")[1].text == "and 50 more"
    assert html.count("<tr>") == 101
    assert table("nothing", ("a",), []) == "<p>nothing</p>"
