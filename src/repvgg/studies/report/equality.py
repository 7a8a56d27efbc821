"""What was judged against the float64 reference, with which outcome."""

from __future__ import annotations

from collections.abc import Sequence

from repvgg.studies.report.formatting import integer, power, scientific
from repvgg.studies.report.layout import figures, legend, section, verdict
from repvgg.studies.report.markup import Child, Markup, element, join, percent
from repvgg.studies.report.schema import Judgement, Report
from repvgg.studies.report.svg import LogAxis, circle, line, rect, strip, text

_HEIGHT = 26
_COLUMNS = ("What was judged", "Relative error", "Largest absolute error", "Tolerance", "Predictions", "Verdict")


def equality(report: Report) -> Markup:
    """A strip chart of all errors on one axis, then the figures."""
    evidence = report.evidence
    title = "Is it the same function?"
    if not evidence:
        return section("equality", title, "Nothing was judged, so nothing is known.")
    numbers = figures("Errors against float64", _COLUMNS, map(_row, evidence), "evidence")
    return section("equality", title, _lead(evidence), _chart(evidence), numbers)


def _lead(evidence: Sequence[Judgement]) -> str:
    failed = sum(not judgement.passed for judgement in evidence)
    outcome = (
        "All errors are within their tolerance."
        if not failed
        else f"{failed} of {len(evidence)} judgements failed: do not use the plain form for what failed."
    )
    return f"Errors are relative to the train form run in float64. {outcome}"


def _chart(evidence: Sequence[Judgement]) -> Markup:
    axis = LogAxis.around(
        error for entry in evidence for error in (entry.relative_error, entry.tolerance, entry.reference_error)
    )
    rows = [part for entry in evidence for part in (_label(entry), _strip(entry, axis))]
    keys = legend(
        ("error-dot", "its error"),
        ("reference-dot", "the train form's own rounding error"),
        ("allowed", "allowed, up to the tolerance"),
    )
    return join(keys, element("div", *rows, element("span"), _scale(axis), class_="strips"))


def _label(judgement: Judgement) -> Markup:
    where = element("small", f" {judgement.inputs}")
    return element("span", join(judgement.subject, where), class_="strip-label")


def _strip(judgement: Judgement, axis: LogAxis) -> Markup:
    middle = _HEIGHT / 2
    bound, error = percent(axis.position(judgement.tolerance)), percent(axis.position(judgement.relative_error))
    grid = [_tick(axis, exponent) for exponent in range(axis.low, axis.high + 1)]
    own = judgement.reference_error
    reference = None if own is None else circle(percent(axis.position(own)), middle, 6.5, "reference-dot", _own(own))
    return strip(
        _HEIGHT,
        f"{judgement.subject} on {judgement.inputs}: error {scientific(judgement.relative_error)}, "
        f"tolerance {scientific(judgement.tolerance)}",
        rect(0, 5, bound, _HEIGHT - 10, "allowed"),
        *grid,
        line(bound, 3, bound, _HEIGHT - 3, "bound"),
        reference,
        circle(error, middle, 4, f"error-dot {'good' if judgement.passed else 'bad'}", "its error"),
    )


def _own(error: float) -> str:
    return f"the train form's own error: {scientific(error)}"


def _tick(axis: LogAxis, exponent: int) -> Markup:
    at = percent(axis.position(10.0**exponent))
    return line(at, 0, at, _HEIGHT, "grid")


def _scale(axis: LogAxis) -> Markup:
    labels = [text(percent(axis.position(10.0**step)), 13, power(step), "tick middle") for step in axis.ticks(8)]
    return strip(18, "relative error, logarithmic scale", *labels)


def _row(judgement: Judgement) -> tuple[Markup, tuple[Child, ...]]:
    subject = join(judgement.subject, element("small", f"{judgement.inputs}, {judgement.dtype}"))
    relative = join(scientific(judgement.relative_error), _own_note(judgement.reference_error))
    tolerance = join(scientific(judgement.tolerance), element("small", judgement.tolerance_origin))
    outcome = join(verdict(judgement.passed, "passed", "failed"), element("small", judgement.reason))
    absolute = scientific(judgement.absolute_error)
    return subject, (relative, absolute, tolerance, _predictions(judgement), outcome)


def _own_note(error: float | None) -> Markup | None:
    return None if error is None else element("small", f"train form's own: {scientific(error)}")


def _predictions(judgement: Judgement) -> str:
    if judgement.agree is None or judgement.total is None:
        return "–"
    return f"{integer(judgement.agree)}/{integer(judgement.total)}"
