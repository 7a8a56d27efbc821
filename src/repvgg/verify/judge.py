"""The only judge of the library: is the candidate the same function as the reference?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from repvgg.errors import UsageError, first_line
from repvgg.verify.evidence import Agreement, Evidence, LayerEvidence
from repvgg.verify.inputs import as_batches, rounded
from repvgg.verify.layers import layer_table
from repvgg.verify.precision import check_dtype, name_of, tolerance_for
from repvgg.verify.runs import copied, dtype_of, errors, outputs_of
from repvgg.verify.state import judging

Model = Callable[..., object]


def verify(
    reference: Model, candidate: Model, inputs: Tensor | Iterable[Tensor], *, tolerance: float | None = None
) -> Evidence:
    """Run both on the same inputs and compare what comes out, against the reference in float64.

    With y the candidate's output and y64 the reference's, over all batches::

        absolute = max|y - y64|        relative = max|y - y64| / max|y64|        passed = relative <= tolerance

    Both sides run in eval mode, without gradients, without autocast and without TF32, and are put back as they were
    (see :func:`repvgg.verify.judging`). The dtype is that of the candidate's first floating-point parameter, else of
    the inputs; inputs are rounded to it before either side sees them, so their rounding is no error.

    A reference that is an ``nn.Module`` is deep-copied to float64. Any other callable is run as given, on inputs of
    the dtype they came in, and the evidence says so: its own errors are then part of the figures.

    Without a tolerance, 1e-12 holds in float64 and ``max(4 · reference_error, floor(dtype))`` elsewhere, with the
    floors of :data:`repvgg.verify.precision.FLOORS`. NaN, infinity and other shapes on one side fail.

    Args:
        reference: the function as it should be; takes one tensor and returns one.
        candidate: the function to judge, likewise, such as a converted module or a runtime's session in a function.
        inputs: a batch, or several; axis 0 counts samples. Moved to each module's device.
        tolerance: the largest relative error that passes, or None for the rule above.

    Raises:
        UsageError: no inputs, inputs that are not finite, an output that is not one floating-point tensor, a dtype
            or tolerance that makes no sense, or a reference module that cannot run in float64.

    Limits: only on these inputs, and only for these sizes; see :func:`repvgg.verify.border_inputs`. The parameters
    of a candidate whose ``forward`` writes to them stay as that leaves them.
    """
    batches = as_batches(inputs)
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise UsageError(f"A tolerance is a finite number of at least 0, not {tolerance}.")
    dtype = check_dtype(dtype_of(candidate, batches))
    with judging(reference, candidate):
        return _Case(reference, candidate, batches, dtype).evidence(tolerance)


class _Case:
    """One verification: the two sides, and the inputs as each of them sees them."""

    def __init__(self, reference: Model, candidate: Model, batches: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.reference, self.candidate, self.dtype = reference, candidate, dtype
        self.seen = rounded(batches, dtype)
        self.exact = [x.double() if x.is_floating_point() else x for x in self.seen]
        self.as_given = [x.to(given.dtype) for x, given in zip(self.seen, batches, strict=True)]
        self.reference64 = _float64(reference) if isinstance(reference, nn.Module) else None
        self.notes: list[str] = []

    def evidence(self, tolerance: float | None) -> Evidence:
        """Run everything."""
        y64 = self.reference_outputs()
        y = outputs_of(self.candidate, self.seen, "the candidate")
        problems = _problems(y64, y)
        absolute, relative = errors(y64, y)
        reference_error = self.reference_error(y64)
        origin = "given by the caller"
        if tolerance is None:
            tolerance, origin = tolerance_for(self.dtype, reference_error)
        return Evidence(
            dtype=name_of(self.dtype),
            batches=len(self.seen),
            samples=sum(len(x) for x in self.seen),
            absolute=absolute,
            relative=relative,
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

    def reference_outputs(self) -> list[Tensor]:
        """Outputs of the reference, in float64 if it is a module."""
        if self.reference64 is None:
            return outputs_of(self.reference, self.as_given, "the reference")
        try:
            return outputs_of(self.reference64, self.exact, "the reference")
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"The reference cannot run in float64 on these inputs ({first_line(error)}); wrap it in a function "
                "to have it run as given."
            ) from error

    def reference_run(self, y64: Sequence[Tensor]) -> str:
        """How the reference was run, in words."""
        came_out = name_of(y64[0].dtype)
        if self.reference64 is None:
            return f"run as given, a plain callable that returned {came_out}"
        if y64[0].dtype is not torch.float64:
            self.notes.append(f"the reference returned {came_out} although it ran in float64")
        return "a deep copy, run in float64 and in eval mode"

    def reference_error(self, y64: Sequence[Tensor]) -> float | None:
        """The relative error that the reference makes in the candidate's dtype."""
        if not isinstance(self.reference, nn.Module) or self.dtype is torch.float64:
            return None
        return self._error_of_copy(self.reference, self.dtype, self.seen, y64, "the reference")

    def fold_error(self, y64: Sequence[Tensor]) -> float | None:
        """The relative error that the candidate makes in float64."""
        if not isinstance(self.candidate, nn.Module) or self.dtype is torch.float64:
            return None
        return self._error_of_copy(self.candidate, torch.float64, self.exact, y64, "the candidate")

    def _error_of_copy(
        self, model: nn.Module, dtype: torch.dtype, batches: Sequence[Tensor], y64: Sequence[Tensor], who: str
    ) -> float | None:
        try:
            return errors(y64, outputs_of(copied(model, dtype), batches, who))[1]
        except Exception as error:  # a figure beside the verdict: what stops it is noted, and the verdict stands
            self.notes.append(f"{who} cannot be run in {name_of(dtype)} ({first_line(error)})")
            return None

    def layers(self) -> tuple[LayerEvidence, ...]:
        """The table of units, empty where one side is no module."""
        if self.reference64 is None or not isinstance(self.candidate, nn.Module):
            return ()
        try:
            rows, left_out = layer_table(self.reference64, self.candidate, self.seen[0], self.dtype)
        except Exception as error:  # as above
            self.notes.append(f"no table of layers ({first_line(error)})")
            return ()
        if left_out:
            self.notes.append(left_out)
        return rows


def _float64(reference: nn.Module) -> nn.Module:
    try:
        return copied(reference, torch.float64)
    except Exception as error:
        raise UsageError(
            f"The reference cannot be copied to float64 ({first_line(error)}); wrap it in a function to have it run "
            "as given."
        ) from error


def _problems(y64: Sequence[Tensor], y: Sequence[Tensor]) -> list[str]:
    """What makes the two sides incomparable, one clause each."""
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
    """Top-1 agreement of (N, classes) outputs; None for all others."""
    if any(a.dim() != 2 or a.shape[1] < 2 for a in y64):
        return None
    agreed, margin = 0, 0.0
    for a, b in zip(y64, y, strict=True):
        ours, theirs = a.argmax(1, keepdim=True), b.argmax(1, keepdim=True)
        agreed += int((ours == theirs).sum())
        margin = max(margin, float((a.gather(1, ours) - a.gather(1, theirs)).max()))
    return Agreement(agreed, sum(len(a) for a in y64), margin)
