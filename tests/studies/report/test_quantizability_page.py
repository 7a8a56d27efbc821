"""The quantizability report, from a quantization of a small network and given gains."""

import re
from dataclasses import replace

import pytest
from torch import nn

from repvgg.quantization import Quality, QuantizationSettings, Step, StepReport, quantize
from repvgg.studies.report import quantizability_page
from repvgg.studies.report.quantizability_charts import decibels, gain
from repvgg.studies.report.quantizability_page import QuantizabilityPage, channel_ranges
from tests.quantization.networks import images, random_


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(quantizability_page, "environment", lambda: {"cpu": "a CPU", "threads": "2"})


def network():
    """The first layer has channels of very different ranges; those of the last cannot be rescaled."""
    model = random_(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(2)))
    model[0].weight.data[2] *= 50
    model[0].bias.data[2] *= 50
    model[2].weight.data[:, 2] /= 50
    return model


@pytest.fixture(scope="module")
def report():
    return quantize(network(), images(6), QuantizationSettings(rounding_sweeps=0))[1]


def quality(sqnr, agreement=1.0):
    return Quality(sqnr, agreement, 120)


STEPS = StepReport(
    quality(10.0, 0.5),
    (
        Step("bias correction", quality(9.0, 0.4), -1.0),
        Step("weights per channel", quality(25.0, 0.9), 15.0),
        Step("<b>another</b>", quality(12.0, 0.6), 2.0),
    ),
    quality(31.5, 0.975),
)


def page(report, **changes):
    settings = {
        "name": "tiny <net>",
        "created": "2026-12-01T10:00:00+00:00",
        "command": "repvgg quantize tiny --report-only",
        "steps": STEPS,
        "report": report,
        "channels": channel_ranges(network(), report),
        "calibration": 6,
        "images": 120,
    }
    return QuantizabilityPage(**settings | changes).render()


def text_of(html):
    text = re.sub(r"<(style|svg).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)  # of no-break spaces, too


def test_steps_are_ranked_by_their_gain_and_training_is_named(report):
    html = page(report)
    text = text_of(html)
    assert "97.5% of 120 validation images keep their class" in text
    assert "Fewer than 99% of the images keep their class" in text
    assert "By itself, weights per channel gains most: +15.0 dB." in text
    assert "&lt;b&gt;another&lt;/b&gt;" in html
    assert "tiny &lt;net&gt;" in html
    rows = re.findall(r'<th scope="row">(.*?)</th>', html)
    assert rows[:3] == ["weights per channel", "&lt;b&gt;another&lt;/b&gt;", "bias correction"]
    assert rows[3:6] == ["quantization-aware training", "QARepVGG blocks", "RepOptimizer"]
    assert text.count("needs training") == 3
    assert "−1.0 dB" in text


def test_each_layer_has_its_ranges_and_pictures(report):
    html = page(report)
    first, last = report.layers
    assert first.spread > 20
    assert first.equalized_spread < 5
    assert f"{first.spread:.1f} → {first.equalized_spread:.1f}" in text_of(html)
    assert (
        "In 1 of 2 layers the widest channel is more than 8 times the median one; after equalization in 0."
        in text_of(html)
    )
    assert "not rescaled: it is an output of the network" in text_of(html)
    # Two pictures for each layer; two charts, each for wide and for narrow screens.
    assert html.count("<svg") == 2 * len(report.layers) + 4
    for bound in last.quantized_range:
        assert f"{bound:.3g}" in text_of(html)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert not re.search(r'(?:src|href)="https?:', html)


def test_ranges_of_channels_are_those_of_the_weights(report):
    ranges = channel_ranges(network(), report)
    weight = network()[0].weight.detach().abs().flatten(1).amax(1)
    assert ranges["0"].before == pytest.approx(weight.tolist(), rel=1e-6)
    before, after = (max(one) / min(one) for one in ranges["0"])
    assert after < before / 10
    assert channel_ranges(network(), replace(report, equalization=None))["0"].after == ranges["0"].before


def test_runtimes_are_compared_where_they_were_run(report):
    assert "Which weights on this CPU?" not in page(report)
    runtimes = {"8-bit weights per channel": quality(17.9, 0.9), "7-bit weights per channel": quality(28.0)}
    text = text_of(page(report, runtimes=runtimes))
    assert "Best here: 7-bit weights per channel" in text
    assert "+10.1 dB" in text


def test_numbers_and_infinities():
    assert decibels(float("inf")) == "exact"
    assert decibels(12.34) == "12.3\u00a0dB"
    assert gain(-0.04) == "−0.0\u00a0dB"
