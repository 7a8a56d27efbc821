"""``verify``: check that a candidate computes the same function as a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from repvgg.errors import UsageError, first_line
from repvgg.verify.evidence import Agreement, Evidence, LayerEvidence
from repvgg.verify.execution import as_batches, copied, deviation, dtype_of, isolated_eval, name_of, outputs_of, rounded
from repvgg.verify.layers import compare_layers

Model = Callable[..., object]

#: Unit roundoff of each dtype: the largest relative error of rounding a number once.
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

#: Roundings, all in the same direction, that any candidate is allowed. Two correct programs that add the same products
#: in another order differ by a few roundings per layer and by tens over a network. float64 is allowed 9007, which is
#: 1e-12: no mistake in a network is that small. The coarse types are allowed few, as 64 roundings of bfloat16 would
#: accept an error of a quarter.
ROUNDINGS = {torch.float64: 1e-12 / 2.0**-53, torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 8.0}

#: The smallest tolerance of each dtype: 1e-12, 3.8e-06, 7.8e-03, 3.1e-02.
FLOORS = {dtype: ROUNDINGS[dtype] * unit for dtype, unit in UNIT_ROUNDOFF.items()}

#: The candidate's error may be this many times the reference's error in the same dtype.
REFERENCE_FACTOR = 4.0


def verify(
    reference: Model, candidate: Model, inputs: Tensor | Iterable[Tensor], *, tolerance: float | None = None
) -> Evidence:
    """Run both models on the same inputs and compare the outputs, with the reference in float64.

    With y the candidate's output and y64 the reference's, over all batches::

        absolute = max|y - y64|        relative = max|y - y64| / max|y64|        passed = relative <= tolerance

    Both run in eval mode, without gradients, autocast or TF32, and their state is restored (see
    :func:`repvgg.verify.isolated_eval`). The dtype is that of the candidate's first floating-point parameter, else of
    the inputs. Inputs are rounded to it before either model sees them, so that their rounding is not an error.

    A reference that is an ``nn.Module`` is deep-copied to float64. Any other callable is run as given, on inputs of
    their original dtype, and the evidence says so: its own errors are then part of the result.

    Without a tolerance, float64 is allowed 1e-12, and other dtypes ``max(4 · reference_error, floor(dtype))`` with the
    floors of :data:`FLOORS`. NaN, infinity and different shapes fail.

    Args:
        reference: the function as it should be; takes one tensor and returns one.
        candidate: the function to check, of the same signature, such as a converted module or a runtime session.
        inputs: a batch, or several; axis 0 counts samples. Moved to each module's device.
        tolerance: the largest relative error that passes, or None for the rule above.

    Raises:
        UsageError: no inputs, inputs that are not finite, an output that is not one floating-point tensor, an invalid
            dtype or tolerance, or a reference module that cannot run in float64.

    Limits: the result holds for these inputs and their sizes; see :func:`repvgg.verify.border_inputs`. Parameters to
    which a candidate's ``forward`` writes are not restored.
    """
    batches = as_batches(inputs)
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise UsageError(f"tolerance must be a finite number of at least 0, got {tolerance}.")
    dtype = check_dtype(dtype_of(candidate, batches))
    with isolated_eval(reference, candidate):
        return _Comparison(reference, candidate, batches, dtype).run(tolerance)


class _Comparison:
    """One verification: both models, and the inputs in the dtype of each run."""

    def __init__(self, reference: Model, candidate: Model, batches: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.reference, self.candidate, self.dtype = reference, candidate, dtype
        self.inputs = rounded(batches, dtype)
        # From the rounded inputs: both models see exactly the same values.
        self.inputs64 = [x.double() if x.is_floating_point() else x for x in self.inputs]
        self.inputs_as_given = [x.to(given.dtype) for x, given in zip(self.inputs, batches, strict=True)]
        self.reference64 = _float64(reference) if isinstance(reference, nn.Module) else None
        self.notes: list[str] = []

    def run(self, tolerance: float | None) -> Evidence:
        y64 = self.run_reference()
        y = outputs_of(self.candidate, self.inputs, "the candidate")
        problems = _problems(y64, y)
        error = deviation(y64, y)
        reference_error = self.reference_error(y64)
        origin = "given by the caller"
        if tolerance is None:
            tolerance, origin = tolerance_for(self.dtype, reference_error)
        return Evidence(
            dtype=name_of(self.dtype),
            batches=len(self.inputs),
            samples=sum(len(x) for x in self.inputs),
            absolute=error.absolute,
            relative=error.relative,
            tolerance=tolerance,
            tolerance_origin=origin,
            reference_run=self.reference_run(y64),
            reference_error=reference_error,
            fold_error=self.fold_error(y64),
            agreement=None if problems else _agreement(y64, y),
            layers=self.layers(),
            problems=tuple(problems),
            notes=tuple(self.notes),
        )

    def run_reference(self) -> list[Tensor]:
        """Return the outputs of the reference, in float64 if it is a module."""
        if self.reference64 is None:
            return outputs_of(self.reference, self.inputs_as_given, "the reference")
        try:
            return outputs_of(self.reference64, self.inputs64, "the reference")
        except (RuntimeError, NotImplementedError) as error:  # how PyTorch reports dtypes that do not match
            raise UsageError(
                f"The reference cannot run in float64 on these inputs ({first_line(error)}): wrap it in a function "
                "to run it as given."
            ) from error

    def reference_run(self, y64: Sequence[Tensor]) -> str:
        """Describe how the reference was run."""
        returned = name_of(y64[0].dtype)
        if self.reference64 is None:
            return f"run as given, a plain callable that returned {returned}"
        if y64[0].dtype is not torch.float64:
            self.notes.append(f"the reference returned {returned} although it ran in float64")
        return "a deep copy, run in float64 and in eval mode"

    def reference_error(self, y64: Sequence[Tensor]) -> float | None:
        """Return the relative error of the reference in the candidate's dtype."""
        if not isinstance(self.reference, nn.Module) or self.dtype is torch.float64:
            return None
        return self._error_of_copy(self.reference, self.dtype, self.inputs, y64, "the reference")

    def fold_error(self, y64: Sequence[Tensor]) -> float | None:
        """Return the relative error of the candidate in float64."""
        if not isinstance(self.candidate, nn.Module) or self.dtype is torch.float64:
            return None
        return self._error_of_copy(self.candidate, torch.float64, self.inputs64, y64, "the candidate")

    def _error_of_copy(
        self, model: nn.Module, dtype: torch.dtype, batches: Sequence[Tensor], y64: Sequence[Tensor], who: str
    ) -> float | None:
        try:
            return deviation(y64, outputs_of(copied(model, dtype), batches, who)).relative
        except Exception as error:  # only an additional measurement: the result is valid without it
            self.notes.append(f"{who} cannot be run in {name_of(dtype)} ({first_line(error)})")
            return None

    def layers(self) -> tuple[LayerEvidence, ...]:
        """Return the errors of the units, empty where one side is not a module."""
        if self.reference64 is None or not isinstance(self.candidate, nn.Module):
            return ()
        try:
            layers, note = compare_layers(self.reference64, self.candidate, self.inputs[0], self.dtype)
        except Exception as error:  # as above
            self.notes.append(f"no table of layers ({first_line(error)})")
            return ()
        if note:
            self.notes.append(note)
        return layers


def _float64(reference: nn.Module) -> nn.Module:
    try:
        return copied(reference, torch.float64)
    except Exception as error:
        raise UsageError(
            f"The reference cannot be copied to float64 ({first_line(error)}): wrap it in a function to run it as "
            "given."
        ) from error


def _problems(y64: Sequence[Tensor], y: Sequence[Tensor]) -> list[str]:
    """Return why the outputs cannot be compared, one clause each."""
    problems = []
    for a, b in zip(y64, y, strict=True):
        if a.shape != b.shape:
            problems.append(f"the reference returned the shape {tuple(a.shape)} and the candidate {tuple(b.shape)}")
            break
    if not any(a.numel() for a in y64):
        problems.append("the reference returned no values")
    for who, outputs in (("reference", y64), ("candidate", y)):
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            problems.append(f"the {who} returned a NaN or an infinity")
    return problems


def _agreement(y64: Sequence[Tensor], y: Sequence[Tensor]) -> Agreement | None:
    """Return the top-1 agreement of (N, classes) outputs; None for any others."""
    if any(a.dim() != 2 or a.shape[1] < 2 for a in y64):
        return None
    agreed, margin = 0, 0.0
    for a, b in zip(y64, y, strict=True):
        expected, actual = a.argmax(1, keepdim=True), b.argmax(1, keepdim=True)
        agreed += int((expected == actual).sum())
        margin = max(margin, float((a.gather(1, expected) - a.gather(1, actual)).max()))
    return Agreement(agreed, sum(len(a) for a in y64), margin)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``; raise UsageError if it has no tolerance."""
    if dtype not in FLOORS:
        known = ", ".join(map(name_of, FLOORS))
        raise UsageError(f"The candidate's dtype must be one of {known}, got {name_of(dtype)}.")
    return dtype


def tolerance_for(dtype: torch.dtype, reference_error: float | None) -> tuple[float, str]:
    """Return the default tolerance and its origin as text.

    ``max(4 · reference_error, floor(dtype))``, and the floor alone for float64 or where ``reference_error`` is None
    or infinite (an overflow is no measure of what is tolerable).
    """
    name, floor = name_of(dtype), FLOORS[dtype]
    origin = f"the floor of {name}, {ROUNDINGS[dtype]:.0f} roundings"
    if dtype is torch.float64:
        return floor, origin
    if reference_error is None or reference_error == float("inf"):
        return floor, f"{origin}, as the error of the reference itself in {name} is unknown"
    scaled = f"{REFERENCE_FACTOR:.0f} x the error of the reference itself in {name}, {reference_error:.1e}"
    if REFERENCE_FACTOR * reference_error > floor:
        return REFERENCE_FACTOR * reference_error, scaled
    return floor, f"{origin}, which is more than {scaled}"
