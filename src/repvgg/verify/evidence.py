"""What a verification found, as frozen values that can be read, printed, stored and raised."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from repvgg.errors import EquivalenceError

_ROWS_SHOWN = 5


@dataclass(frozen=True)
class LayerEvidence:
    """The error of one unit, a pair of modules that have the same qualified name on both sides.

    Both errors are relative, ``max|y - y64| / max|y64|`` over the unit's own output, on the first few images only.

    Attributes:
        name: qualified name of the unit, the same in both models.
        made_here: error of the candidate's unit on the input that the reference's unit got in float64, rounded to the
            candidate's dtype. None where the candidate's unit cannot be run alone on that input.
        arriving: error of the unit's output when each model runs from end to end. It holds what was made before, too.
    """

    name: str
    made_here: float | None
    arriving: float


@dataclass(frozen=True)
class Agreement:
    """How often the largest output of a sample is the same class on both sides.

    A disagreement alone never fails a verification, because it says nothing that the error does not: if every output
    is off by at most e, a candidate that prefers class b to the reference's class a proves that
    ``y64[a] - y64[b] <= 2e``, a tie as far as an error of e can tell. ``widest_margin`` shows how near a tie it was.

    Attributes:
        agreed: samples with the same class.
        total: all samples.
        widest_margin: the largest ``y64[a] - y64[b]`` over the samples that disagree, 0 if there is none.
    """

    agreed: int
    total: int
    widest_margin: float


@dataclass(frozen=True, repr=False)
class Evidence:
    """What :func:`repvgg.verify.verify` found. Errors are relative unless their name says otherwise.

    Attributes:
        dtype: the dtype that the candidate was run in, as "float32".
        batches: number of batches.
        samples: number of samples in all batches.
        absolute: ``max|y - y64|`` over all outputs of all batches; infinite where it has no finite value.
        relative: ``absolute / max|y64|``, the largest reference output of all batches below the line. 0 where both
            are 0, infinite where only the reference is all zeros or where a value is not finite.
        tolerance: the largest relative error that passes.
        tolerance_origin: where the tolerance comes from, in words.
        reference_run: how the reference was run, in words.
        reference_error: relative error that the reference makes when it runs in ``dtype`` itself, or None.
        fold_error: relative error of the candidate's weights in float64 arithmetic, so of the conversion and of the
            rounding of the stored weights, without the rounding of the arithmetic; or None.
        agreement: top-1 agreement where outputs are (N, classes) with two classes or more, else None.
        layers: one row a unit, in the order of the reference's modules; empty where there is nothing to match.
        problems: what makes the two incomparable (a NaN, other shapes), one clause each. Any problem fails.
        notes: what could not be done or deserves a word, one clause each. Notes never fail.
    """

    dtype: str
    batches: int
    samples: int
    absolute: float
    relative: float
    tolerance: float
    tolerance_origin: str
    reference_run: str
    reference_error: float | None = None
    fold_error: float | None = None
    agreement: Agreement | None = None
    layers: tuple[LayerEvidence, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True iff there is no problem and ``relative <= tolerance``."""
        return not self.problems and self.relative <= self.tolerance

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one clause each; empty iff it passed."""
        if self.problems or self.passed:
            return self.problems
        over = f"the relative error {self.relative:.1e} is over the tolerance {self.tolerance:.1e}"
        return (f"{over} ({self.tolerance_origin})", *self._where())

    def _where(self) -> tuple[str, ...]:
        """Where the error comes from, as far as it is known."""
        if self.fold_error is not None and self.fold_error <= self.tolerance:
            return (f"in float64 arithmetic it is {self.fold_error:.1e}, so this is rounding in {self.dtype}",)
        worst = self.worst_layers(1)
        return (f"most of it is made in {worst[0].name} ({worst[0].made_here:.1e})",) if worst else ()

    def worst_layers(self, count: int = _ROWS_SHOWN) -> tuple[LayerEvidence, ...]:
        """The ``count`` units that make the largest errors, worst first, without those that could not be run alone."""
        known = [layer for layer in self.layers if layer.made_here is not None]
        return tuple(sorted(known, key=lambda layer: layer.made_here or 0.0, reverse=True)[:count])

    def raise_if_failed(self) -> Evidence:
        """Return the evidence itself if it passed.

        Raises:
            EquivalenceError: it failed; the text is one sentence with the reasons.
        """
        if self.passed:
            return self
        raise EquivalenceError(f"The candidate is not equal to the reference: {'; '.join(self.reasons)}.")

    def to_dict(self) -> dict[str, Any]:
        """All fields, and ``passed``, as JSON knows them; a value that is not finite becomes None."""
        return {"passed": self.passed, **_plain(self)}

    def __repr__(self) -> str:
        verdict = "passed" if self.passed else "FAILED: " + "; ".join(self.reasons)
        rows = [f"  {name:<16} {value:<9} {words}".rstrip() for name, value, words in self._rows()]
        return "\n".join([verdict, *rows, *_layer_rows(self)])

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, value and meaning of each line of the text."""
        run = f"max|y - y64| / max|y64| in {self.dtype}, {_number(self.samples, 'sample')} "
        rows = [
            ("relative error", f"{self.relative:.1e}", run + f"in {_number(self.batches, 'batch', 'batches')}"),
            ("absolute error", f"{self.absolute:.1e}", "max|y - y64|"),
            ("tolerance", f"{self.tolerance:.1e}", self.tolerance_origin),
        ]
        if self.reference_error is not None:
            rows.append(("reference error", f"{self.reference_error:.1e}", f"the reference itself in {self.dtype}"))
        if self.fold_error is not None:
            rows.append(("fold error", f"{self.fold_error:.1e}", "the candidate's weights in float64 arithmetic"))
        if self.agreement is not None:
            rows.append(("top-1 agreement", f"{self.agreement.agreed}/{self.agreement.total}", ""))
        rows.append(("reference", self.reference_run, ""))
        return rows + [("note", note, "") for note in self.notes]


def _layer_rows(evidence: Evidence) -> list[str]:
    """The units that make the largest errors, as lines of text."""
    worst = evidence.worst_layers()
    if not worst:
        return []
    width = max(len(layer.name) for layer in worst)
    title = f"  {_number(len(evidence.layers), 'layer')}, those that err most:"
    rows = [f"    {row.name:<{width}}  made here {row.made_here:.1e}  arriving {row.arriving:.1e}" for row in worst]
    return [title, *rows]


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, non-finite floats to None."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
