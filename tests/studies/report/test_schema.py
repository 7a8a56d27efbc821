import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from repvgg.errors import UsageError
from repvgg.studies.report.schema import Report, Sample

V1_FILE = Path(__file__).with_name("report_v1.json")


def through_json(report):
    return Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


def test_json_round_trip(report):
    assert through_json(report) == report


def test_file_of_the_first_version_is_read_and_written_unchanged():
    """A ``report.json`` of the first version of the quickstart, shortened, and with an infinite error put into it."""
    stored = json.loads(V1_FILE.read_text(encoding="utf-8"))
    report = Report.from_dict(stored)
    assert report.passed
    assert report.to_dict() == stored
    assert report.model.params_plain == 181_546
    assert report.evidence[0].relative_error == stored["evidence"][0]["relative_error"]
    assert math.isinf(report.evidence[3].absolute_error)
    assert report.regions[2].branches == ("3x3 conv + BN", "1x1 conv + BN", "identity + BN")
    assert report.timing("runtime").name == "Plain form, ONNX Runtime"


def test_keys_are_the_field_names(report):
    stored = report.to_dict()
    assert stored["schema_version"] == 1
    assert stored["regions"][2]["branches"] == ["3x3 conv + BN", "1x1 conv + BN", "identity + BN"]
    assert stored["regions"][1]["stride"] == [2, 2]
    assert stored["training"]["confusion"][8][1] == 1
    assert stored["evidence"][2]["reference_error"] is None
    assert stored["environment"]["torch"] == "2.11.0"


@pytest.mark.parametrize(("value", "word"), [(math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_infinity_round_trip(report, value, word):
    broken = replace(report, evidence=(replace(report.evidence[0], absolute_error=value),))
    assert broken.to_dict()["evidence"][0]["absolute_error"] == word
    assert through_json(broken).evidence[0].absolute_error == value


def test_nan_round_trip(report):
    broken = replace(report, evidence=(replace(report.evidence[0], relative_error=math.nan),))
    assert broken.to_dict()["evidence"][0]["relative_error"] == "NaN"
    assert math.isnan(through_json(broken).evidence[0].relative_error)


def test_integers_are_accepted_for_floats(report):
    stored = report.to_dict()
    stored["training"]["accuracy"] = 1
    accuracy = Report.from_dict(stored).training.accuracy
    assert (accuracy, type(accuracy)) == (1.0, float)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda stored: stored.pop("seed"), "report lacks seed"),
        (lambda stored: stored.update(extra=1), "report has no field 'extra'"),
        (lambda stored: stored["model"].update(params_plain="many"), r"report: model: params_plain .*int"),
        (lambda stored: stored["model"].update(params_plain=True), r"report: model: params_plain .*int"),
        (lambda stored: stored["timings"][1].update(role="fast"), r"report: timings\[1\]: role"),
        (lambda stored: stored["data"].update(classes="0123456789"), r"report: data: classes"),
        (lambda stored: stored.update(left=[1]), r"report: left\[0\] has to be a mapping"),
        (lambda stored: stored.update(schema_version=99), "schema version 99"),
        (lambda stored: stored["training"]["confusion"].pop(), "confusion matrix of 10 classes"),
        (lambda stored: stored["samples"][0].update(truth=10), r"class indices of a sample must be in \[0, 10\)"),
        (lambda stored: stored["regions"][0].update(branches=[]), r"blocks\.0\.conv needs at least one branch"),
    ],
)
def test_invalid_data_is_refused_with_its_place(report, spoil, text):
    stored = report.to_dict()
    spoil(stored)
    with pytest.raises(UsageError, match=text):
        Report.from_dict(stored)


@pytest.mark.parametrize("pixels", [(), ((),), ((0, 1), (2,)), ((256,),), ((-1,),)])
def test_pixels_must_be_a_rectangle_of_gray_values(pixels):
    with pytest.raises(UsageError, match="pixels of a sample"):
        Sample(pixels, 0, 0, 1.0)


def test_passed_covers_all_checks(report):
    failed = replace(report.evidence[2], passed=False)
    assert report.passed
    assert not replace(report, evidence=(*report.evidence[:2], failed)).passed
    assert not replace(report, evidence=()).passed
