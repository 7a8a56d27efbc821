import json
import math
from dataclasses import replace

import pytest

from repvgg.errors import UsageError
from repvgg.studies.report import Report, Sample


def through_json(report):
    return Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


def test_a_report_survives_json(report):
    assert through_json(report) == report


def test_every_field_is_stored_under_its_name(report):
    stored = report.to_dict()
    assert stored["schema_version"] == 1
    assert stored["regions"][2]["branches"] == ["3x3 conv + BN", "1x1 conv + BN", "identity + BN"]
    assert stored["regions"][1]["stride"] == [2, 2]
    assert stored["training"]["confusion"][8][1] == 1
    assert stored["evidence"][2]["reference_error"] is None
    assert stored["environment"]["torch"] == "2.11.0"


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_errors_survive_json(report, value):
    broken = replace(report.evidence[0], absolute_error=value)
    assert through_json(replace(report, evidence=(broken,))).evidence[0].absolute_error == value


def test_nan_survives_json(report):
    broken = replace(report.evidence[0], relative_error=math.nan)
    assert math.isnan(through_json(replace(report, evidence=(broken,))).evidence[0].relative_error)


def test_whole_numbers_are_read_as_floats_where_floats_belong(report):
    stored = report.to_dict()
    stored["training"]["accuracy"] = 1
    accuracy = Report.from_dict(stored).training.accuracy
    assert (accuracy, type(accuracy)) == (1.0, float)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda stored: stored.pop("seed"), "report lacks seed"),
        (lambda stored: stored.update(extra=1), "no report has: extra"),
        (lambda stored: stored["model"].update(params_plain="many"), r"report\.model\.params_plain .*int"),
        (lambda stored: stored["model"].update(params_plain=True), r"report\.model\.params_plain .*int"),
        (lambda stored: stored["timings"][1].update(role="fast"), r"report\.timings\[1\]\.role"),
        (lambda stored: stored["data"].update(classes="0123456789"), r"report\.data\.classes"),
        (lambda stored: stored.update(left=[1]), r"report\.left\[0\] .*Left"),
        (lambda stored: stored.update(schema_version=99), "version 99"),
        (lambda stored: stored["training"]["confusion"].pop(), "confusion matrix of 10 classes"),
        (lambda stored: stored["samples"][0].update(truth=10), "none of the 10"),
        (lambda stored: stored["regions"][0].update(branches=[]), r"blocks\.0\.conv needs a branch"),
    ],
)
def test_what_does_not_fit_is_named(report, spoil, text):
    stored = report.to_dict()
    spoil(stored)
    with pytest.raises(UsageError, match=text):
        Report.from_dict(stored)


@pytest.mark.parametrize("pixels", [(), ((),), ((0, 1), (2,)), ((256,),), ((-1,),)])
def test_pixels_are_a_rectangle_of_gray_values(pixels):
    with pytest.raises(UsageError, match="pixels of a sample"):
        Sample(pixels, 0, 0, 1.0)


def test_the_verdict_is_that_of_all_judgements(report):
    failed = replace(report.evidence[2], passed=False)
    assert report.passed
    assert not replace(report, evidence=(*report.evidence[:2], failed)).passed
    assert not replace(report, evidence=()).passed
