import dataclasses
import json
import math

import pytest

from repvgg.errors import EquivalenceError
from repvgg.verify import Agreement, Evidence, LayerEvidence

GOOD = Evidence(
    dtype="float32",
    batches=1,
    samples=4,
    absolute=2e-6,
    relative=1e-6,
    tolerance=4e-6,
    tolerance_origin="given by the caller",
    reference_run="a deep copy, run in float64 and in eval mode",
    reference_error=5e-7,
    fold_error=1e-8,
    agreement=Agreement(3, 4, 1e-7),
    layers=tuple(LayerEvidence(f"block{i}", None if i == 3 else i * 1e-7, i * 2e-7) for i in range(8)),
    notes=("something was skipped",),
)


def test_evidence_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.relative = 0.0


def test_passed_depends_on_tolerance_and_problems():
    assert GOOD.passed
    assert GOOD.reasons == ()
    assert GOOD.raise_if_failed() is GOOD
    assert dataclasses.replace(GOOD, relative=4e-6).passed
    assert not dataclasses.replace(GOOD, relative=4.1e-6).passed
    assert not dataclasses.replace(GOOD, relative=math.nan).passed
    assert not dataclasses.replace(GOOD, problems=("it is odd",)).passed


def test_failure_is_one_sentence_with_the_origin_of_the_error():
    rounding = dataclasses.replace(GOOD, relative=1e-3)
    with pytest.raises(EquivalenceError, match=r"^The candidate .* so this is rounding in float32\.$") as caught:
        rounding.raise_if_failed()
    assert "\n" not in str(caught.value)
    conversion = dataclasses.replace(GOOD, relative=1e-3, fold_error=1e-3)
    with pytest.raises(EquivalenceError, match=r"layer that adds the largest error is block7 \(7\.0e-07\)\.$"):
        conversion.raise_if_failed()
    with pytest.raises(EquivalenceError, match=r"^The candidate is not equal to the reference: it is odd\.$"):
        dataclasses.replace(GOOD, problems=("it is odd",)).raise_if_failed()


def test_worst_layers_are_sorted_by_error():
    assert [layer.name for layer in GOOD.worst_layers(3)] == ["block7", "block6", "block5"]
    assert len(GOOD.worst_layers(100)) == 7


def test_text_contains_every_number():
    text = repr(GOOD)
    assert text == str(GOOD)
    lines = text.splitlines()
    assert lines[0] == "passed"
    for expected in ("1.0e-06", "2.0e-06", "4.0e-06", "5.0e-07", "1.0e-08", "3/4", "block7", "something was skipped"):
        assert expected in text
    assert "4 samples in 1 batch" in text
    assert repr(dataclasses.replace(GOOD, relative=1.0)).startswith("FAILED: ")


def test_to_dict_is_json_even_if_numbers_are_not_finite():
    bad = dataclasses.replace(GOOD, absolute=math.inf, relative=math.inf, problems=("a NaN",))
    read = json.loads(json.dumps(bad.to_dict(), allow_nan=False))
    assert read["passed"] is False
    assert read["relative"] is None
    assert read["agreement"] == {"agreed": 3, "total": 4, "widest_margin": 1e-7}
    assert read["layers"][3] == {"name": "block3", "own_error": None, "accumulated_error": pytest.approx(6e-7)}
    assert GOOD.to_dict()["passed"] is True
    assert set(read) == {"passed", *(field.name for field in dataclasses.fields(Evidence))}
