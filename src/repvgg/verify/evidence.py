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
        own_error: error of the candidate's unit alone, on the float64 input of the reference's unit rounded to the
            candidate's dtype. None where the candidate's unit cannot be run on that input.
        accumulated_error: error of the unit's output when both models run end to end; it includes the errors of
            earlier units.
    """

    name: str
    own_error: float | None
    accumulated_error: float


@dataclass(frozen=True)
class OutputEvidence:
    """The error of one tensor of an output that holds several.

    Attributes:
        name: the expression that reads it, such as ``output['boxes'][0]``.
        absolute: ``max|y - y64|``; of integers and booleans, 1 where any differs.
        relative: ``absolute / max|y64|``, of this tensor alone; of integers and booleans, the fraction that differs.
        tolerance: the largest relative error that passes.
        mismatches: number of integers or booleans that differ; None for floating-point numbers.
        total: number of values in all batches.
    """

    name: str
    absolute: float
    relative: float
    tolerance: float
    mismatches: int | None
    total: int

    @property
    def passed(self) -> bool:
        """Whether ``relative <= tolerance``."""
        return self.relative <= self.tolerance

    @property
    def excess(self) -> float:
        """``relative / tolerance``: above 1 it fails."""
        if self.tolerance:
            return self.relative / self.tolerance
        return math.inf if self.relative else 0.0

    def __str__(self) -> str:
        if self.mismatches is not None:
            return f"{self.name}: {self.mismatches:,} of {self.total:,} values differ"
        return f"{self.name}: relative error {self.relative:.1e}, {self.tolerance:.1e} allowed"


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

    Where an output holds several tensors, ``outputs`` has one entry for each, and the errors and the tolerance are
    those of the worst: the one with the largest ``relative / tolerance``.

    Attributes:
        dtype: the dtype in which the candidate ran, as "float32".
        batches: number of batches.
        samples: number of samples in all batches.
        absolute: ``max|y - y64|`` over all batches; infinite where it is not finite.
        relative: ``absolute / max|y64|``, with the largest reference output of all batches. 0 where both are 0,
            infinite where only the reference is all zeros or where a value is not finite.
        tolerance: the largest relative error that passes.
        tolerance_origin: how the tolerance was chosen, as text.
        reference_run: how the reference was run, as text.
        reference_error: relative error of the reference itself when it runs in ``dtype``, or None.
        fold_error: relative error of the candidate's weights in float64 arithmetic, or None: the error of the
            conversion and of rounding the stored weights, without the rounding of the arithmetic.
        agreement: top-1 agreement where outputs are (N, classes) with at least two classes, else None.
        outputs: one entry per tensor, where the output holds several or one that is not of floating-point numbers.
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
    outputs: tuple[OutputEvidence, ...] = ()
    layers: tuple[LayerEvidence, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there is no problem and ``relative <= tolerance``, for each output."""
        return not self.problems and self.relative <= self.tolerance and all(one.passed for one in self.outputs)

    @property
    def worst_output(self) -> OutputEvidence | None:
        """The output with the largest error for its tolerance, None where there is only one."""
        return max(self.outputs, key=lambda one: one.excess, default=None)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one clause each; empty if it passed."""
        if self.problems or self.passed:
            return self.problems
        worst = self.worst_output
        if worst is not None and worst.mismatches is not None:
            return (str(worst),)
        where = f" of {worst.name}" if worst is not None and len(self.outputs) > 1 else ""
        allowed = f"the {self.tolerance:.1e} allowed ({self.tolerance_origin})"
        excess = f"the relative error {self.relative:.1e}{where} is more than {allowed}"
        if self.fold_error is not None and self.fold_error <= self.tolerance:
            # The weights are right, so the layer with the largest error would be a red herring.
            return (excess, f"in float64 arithmetic it is {self.fold_error:.1e}, so this is rounding in {self.dtype}")
        layer = next(iter(self.worst_layers(1)), None)
        if layer is None:
            return (excess,)
        return (excess, f"the layer that adds the largest error is {layer.name} ({layer.own_error:.1e})")

    def worst_layers(self, count: int = _SHOWN_LAYERS) -> tuple[LayerEvidence, ...]:
        """Return the ``count`` units with the largest ``own_error``, largest first."""
        known = [layer for layer in self.layers if layer.own_error is not None]
        return tuple(sorted(known, key=lambda layer: layer.own_error or 0.0, reverse=True)[:count])

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
        inputs = f"{_count(self.samples, 'sample')} in {_count(self.batches, 'batch', 'batches')}"
        worst_output = self.worst_output
        rows = []
        if worst_output is not None and len(self.outputs) > 1:
            rows.append(("outputs", str(len(self.outputs)), f"the worst is {worst_output.name}, with these errors:"))
        if worst_output is None or worst_output.mismatches is None:
            rows += [
                ("relative error", f"{self.relative:.1e}", f"max|y - y64| / max|y64| in {self.dtype}, {inputs}"),
                ("absolute error", f"{self.absolute:.1e}", "max|y - y64|"),
                ("allowed", f"{self.tolerance:.1e}", self.tolerance_origin),
            ]
        else:
            rows.append(("differing", f"{worst_output.mismatches:,}", f"of {worst_output.total:,} values, {inputs}"))
        rows += [("whole numbers", str(one), "") for one in self.outputs if one.mismatches and one is not worst_output]
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
                f"    {layer.name:<{width}}  own error {layer.own_error:.1e}  accumulated {layer.accumulated_error:.1e}"
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
