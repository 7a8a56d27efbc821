"""The result of a verification, as frozen values that can be printed, stored and raised."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from repvgg.errors import EquivalenceError

_SHOWN_LAYERS = 5


@dataclass(frozen=True)
class LayerEvidence:
    """The error of one unit, a pair of modules with the same qualified name in both models.

    Both errors are relative, ``max|y - y64| / max|y64|`` over the unit's output, on the first few images only.

    Attributes:
        name: qualified name of the unit.
        made_here: error of the candidate's unit alone, on the float64 input of the reference's unit rounded to the
            candidate's dtype. None where the candidate's unit cannot be run on that input.
        arriving: error of the unit's output when both models run end to end; it includes the errors of earlier units.
    """

    name: str
    made_here: float | None
    arriving: float


@dataclass(frozen=True)
class Agreement:
    """Top-1 agreement: how often both models predict the same class.

    A disagreement alone never fails a verification, because it adds nothing to the error: if every output is off by at
    most e, a candidate that prefers class b to the reference's class a implies ``y64[a] - y64[b] <= 2e``, a tie within
    the error. ``widest_margin`` shows how close to a tie it was.

    Attributes:
        agreed: samples with the same class.
        total: all samples.
        widest_margin: the largest ``y64[a] - y64[b]`` over the samples that disagree, 0 if there are none.
    """

    agreed: int
    total: int
    widest_margin: float


@dataclass(frozen=True, repr=False)
class Evidence:
    """The result of :func:`repvgg.verify.verify`. Errors are relative unless their name says otherwise.

    Attributes:
        dtype: the dtype in which the candidate ran, as "float32".
        batches: number of batches.
        samples: number of samples in all batches.
        absolute: ``max|y - y64|`` over all outputs of all batches; infinite where it is not finite.
        relative: ``absolute / max|y64|``, with the largest reference output of all batches. 0 where both are 0,
            infinite where only the reference is all zeros or where a value is not finite.
        tolerance: the largest relative error that passes.
        tolerance_origin: how the tolerance was chosen, as text.
        reference_run: how the reference was run, as text.
        reference_error: relative error of the reference itself when it runs in ``dtype``, or None.
        fold_error: relative error of the candidate's weights in float64 arithmetic, or None: the error of the
            conversion and of rounding the stored weights, without the rounding of the arithmetic.
        agreement: top-1 agreement where outputs are (N, classes) with at least two classes, else None.
        layers: one entry per unit, in the order of the reference's modules; empty where no modules match.
        problems: why the two cannot be compared (a NaN, different shapes), one clause each. Any problem fails.
        notes: remarks, such as a measurement that was not possible, one clause each. Notes never fail.
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
        """Whether there is no problem and ``relative <= tolerance``."""
        return not self.problems and self.relative <= self.tolerance

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one clause each; empty if it passed."""
        if self.problems or self.passed:
            return self.problems
        excess = (
            f"the relative error {self.relative:.1e} is over the tolerance {self.tolerance:.1e} "
            f"({self.tolerance_origin})"
        )
        if self.fold_error is not None and self.fold_error <= self.tolerance:
            # The weights are right, so the layer with the largest error would be a red herring.
            return (excess, f"in float64 arithmetic it is {self.fold_error:.1e}, so this is rounding in {self.dtype}")
        worst = self.worst_layers(1)
        if not worst:
            return (excess,)
        return (excess, f"the layer that adds the largest error is {worst[0].name} ({worst[0].made_here:.1e})")

    def worst_layers(self, count: int = _SHOWN_LAYERS) -> tuple[LayerEvidence, ...]:
        """Return the ``count`` units with the largest ``made_here``, largest first."""
        known = [layer for layer in self.layers if layer.made_here is not None]
        return tuple(sorted(known, key=lambda layer: layer.made_here or 0.0, reverse=True)[:count])

    def raise_if_failed(self) -> Evidence:
        """Return the evidence itself; raise EquivalenceError with the reasons if it failed."""
        if self.passed:
            return self
        raise EquivalenceError(f"The candidate is not equal to the reference: {'; '.join(self.reasons)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and ``passed``, as plain values; a number that is not finite becomes None."""
        return {"passed": self.passed, **_plain(self)}

    def __repr__(self) -> str:
        result = "passed" if self.passed else "FAILED: " + "; ".join(self.reasons)
        formula = f"max|y - y64| / max|y64| in {self.dtype}, {_count(self.samples, 'sample')} "
        rows = [
            ("relative error", f"{self.relative:.1e}", formula + f"in {_count(self.batches, 'batch', 'batches')}"),
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
        rows += [("note", note, "") for note in self.notes]
        lines = [f"  {name:<16} {value:<9} {meaning}".rstrip() for name, value, meaning in rows]
        worst = self.worst_layers()
        if worst:
            width = max(len(layer.name) for layer in worst)
            lines.append(f"  {_count(len(self.layers), 'layer')}, largest errors first:")
            lines += [
                f"    {layer.name:<{width}}  its own {layer.made_here:.1e}  end to end {layer.arriving:.1e}"
                for layer in worst
            ]
        return "\n".join([result, *lines])


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _plain(value: Any) -> Any:
    """Convert dataclasses to dicts, tuples to lists, and numbers that JSON has no text for to None."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
