import pytest

from repvgg.deploy import OnnxRunner
from tests.cli.helpers import contents

FEW = ("--data", "digits:", "--calibration-images", "16", "--test-images", "24", "--rounding-sweeps", "0")


def test_a_train_form_is_quantized_and_evaluated(repvgg, files, tmp_path):
    out = tmp_path / "int8.onnx"
    # Random weights classify by hair's breadths: how many decisions agree says nothing here.
    outcome = repvgg("quantize", files.train, out, *FEW, "--min-agreement", "0", "--granularity", "per_tensor")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "made plain first: 7 regions folded"
    assert "8-bit weights per tensor in bounded pairs, ranges by mse, equalized, biases corrected" in lines[1]
    assert any(line.startswith("ONNX Runtime: agreement ") and "SQNR" in line and "95 %" in line for line in lines)
    assert lines[-1].startswith(f"wrote {out}: ")
    runner = OnnxRunner(out)
    assert runner.input_shape == (None, 1, 16, 16)
    assert "repvgg" in " ".join(runner.notes)
    assert runner.notes["quantization"].startswith("8-bit weights per tensor")


@pytest.mark.slow
def test_a_network_that_agrees_too_little_is_not_written(repvgg, files, tmp_path):
    outcome = repvgg("quantize", files.plain, tmp_path / "a.onnx", *FEW, "--weight-bits", "7", "--min-agreement", "1.0")
    # 7 bits and a network of random weights: SQNR is finite, and not every decision of 24 need survive.
    if outcome.code == 0:
        assert "agreement 100.00%" in outcome.out
    else:
        assert outcome.code == 2
        assert "of the images keep their class, fewer than --min-agreement 1" in outcome.err
        assert not contents(tmp_path)


@pytest.mark.slow
def test_what_each_step_is_worth(repvgg, files, tmp_path):
    page = tmp_path / "page.html"
    outcome = repvgg("quantize", files.plain, tmp_path / "a.onnx", *FEW, "--report-only", "--html", page)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == f"wrote {page}"
    html = page.read_text()
    assert "How well does it quantize to 8 bits?" in html
    assert html.count('<tr><th scope="row">stages.') == 6
    page.unlink()
    steps = ("rounding alone", "cross-layer equalization", "bias correction", "weights per channel", "all together")
    for step in steps:
        assert step in outcome.out
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a.pt2",), "end "),
        (("a.onnx", "--min-agreement", "2"), "--min-agreement is a share in [0, 1], got 2."),
        (("a.onnx", "--calibration-images", "0"), "--calibration-images and --selection-images are at least 1"),
        (("a.onnx", "--input-size", "16", "24"), "Data sets give square images"),
        (("a.onnx", "--html", "page.html"), "--html is the page of --report-only"),
    ],
)
def test_bad_options_are_refused(refused, files, arguments, sentence, tmp_path):
    out, *options = arguments
    assert sentence in refused("quantize", files.plain, tmp_path / out, "--data", "digits:", *options)
