"""``verify``: check that a candidate computes the same function as a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from repvgg._calls import Call, check_model
from repvgg._structure import describe
from repvgg.errors import RepvggError, UsageError, first_line, typed_line
from repvgg.verify.evidence import Agreement, Evidence, LayerEvidence, OutputEvidence
from repvgg.verify.execution import dtype_of, isolated_eval, name_of, structural_copy
from repvgg.verify.float64 import Float64Runner, copied, on_device_of
from repvgg.verify.inputs import Batches, call_for, calls_of, first_layer, make_up_inputs, rounded, samples_in
from repvgg.verify.layers import compare_layers
from repvgg.verify.outputs import LeafError, Leaves, errors_of, leaves_of, paired, problems_of

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

#: Roundings of each input and weight whose effect explains an error. The network rounds in each layer.
SENSITIVITY_ROUNDINGS = 64.0


def verify(
    reference: Model, candidate: Model, inputs: Batches | None = None, *, tolerance: float | None = None
) -> Evidence:
    """Run both models on the same inputs and compare the outputs, with the reference in float64.

    With y the candidate's output and y64 the reference's, over all batches::

        absolute = max|y - y64|        relative = max|y - y64| / max|y64|        passed = relative <= tolerance

    Outputs of any structure are compared tensor by tensor, each relative to its own largest value; integers, booleans
    and all other values must be the same. The evidence has the errors of the worst tensor, and of each.

    Both run in eval mode, without gradients, autocast or TF32, and their state is restored (see
    :func:`repvgg.verify.isolated_eval`). The dtype is that of the candidate's first floating-point parameter, else of
    the inputs. Inputs are rounded to it before either model sees them, so that their rounding is not an error.

    A reference that is an ``nn.Module`` is computed in float64 (see :class:`repvgg.verify.float64.Float64Mode`); one
    whose parameters are float64 runs as it is. Any
    other callable is run as given, on inputs of their original dtype, and the evidence says so: its own errors are
    then part of the result.

    Without a tolerance, float64 is allowed 1e-12, and other dtypes ``max(4 · reference_error, floor(dtype))`` with the
    floors of :data:`FLOORS`. NaN, infinity and different shapes fail.

    Args:
        reference: the function as it should be.
        candidate: the function to check, of the same signature, such as a converted module or a runtime session.
        inputs: a batch, or several, such as a loader. A batch is a tensor or a NumPy array; a tuple or a list of
            arguments in order, such as (images, labels), where what the forward does not take is left out; or a
            mapping of arguments by name. Axis 0 counts samples. Moved to each module's device. None makes images up,
            from the channels of the first convolution, and the evidence says so.
        tolerance: the largest relative error that passes, or None for the rule above.

    Raises:
        UsageError: something that is no model, no inputs, inputs that are not finite or on which a model does not
            run, outputs without a number, an invalid dtype or tolerance, or a reference that cannot run in float64.

    Limits: the result holds for these inputs and their sizes; see :func:`repvgg.verify.border_inputs`. Parameters to
    which a ``forward`` writes are not restored.
    """
    check_model(reference, "The reference")
    check_model(candidate, "The candidate")
    if tolerance is not None and not 0.0 <= tolerance < math.inf:
        raise UsageError(f"tolerance must be a finite number of at least 0, got {tolerance}.")
    calls, notes = _made_up(reference, candidate) if inputs is None else calls_of(reference, inputs)
    comparison = Comparison(reference, candidate, calls)
    with isolated_eval(*comparison.models):
        return comparison.evidence(tolerance, notes)


def _made_up(reference: Model, candidate: Model) -> tuple[list[Call], list[str]]:
    model = next((model for model in (reference, candidate) if isinstance(model, nn.Module)), None)
    if model is None:
        raise UsageError("There are no inputs to verify on, and two functions do not say what they take: pass inputs.")
    made_up = make_up_inputs(model)
    return list(made_up.calls), [f"the inputs were made up: {made_up.text}"]


class Comparison:
    """One verification: two models, and the inputs in the dtype of each run. Each run happens once, when it is needed.

    Use it inside :func:`repvgg.verify.isolated_eval` of its ``models``.

    Args:
        reference: see :func:`verify`.
        candidate: see :func:`verify`.
        calls: the calls of the reference, one per batch, with the inputs as given.
        dtype: of the candidate's run; None takes that of its parameters, else of the inputs.
        same_infinities: values that are not finite are equal where both outputs have the same ones.
    """

    def __init__(
        self,
        reference: Model,
        candidate: Model,
        calls: Sequence[Call],
        *,
        dtype: torch.dtype | None = None,
        same_infinities: bool = False,
    ) -> None:
        self.reference, self.candidate = reference, candidate
        tensors = [tensor for call in calls for tensor in call.tensors()]
        self.dtype = check_dtype(dtype or dtype_of(candidate, tensors))
        self.same_infinities = same_infinities
        self.calls = rounded(calls, self.dtype)
        self.calls_as_given = [_dtypes_like(call, given) for call, given in zip(self.calls, calls, strict=True)]
        self.runner = Float64Runner(reference, "the reference") if isinstance(reference, nn.Module) else None
        self.notes: list[str] = []

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that run themselves, and not as a copy, so that their state has to be restored."""
        return (
            (self.candidate,)
            if self.runner and self.runner.module is not self.reference
            else (self.reference, self.candidate)
        )

    @cached_property
    def calls64(self) -> list[Call]:
        """The inputs in float64, from the rounded ones: both models see exactly the same values."""
        return [call.map_tensors(lambda x: x.double() if x.is_floating_point() else x) for call in self.calls]

    @cached_property
    def exact(self) -> list[Leaves]:
        """The outputs of the reference, in float64 if it is a module."""
        runner = self.runner
        if runner is None:
            found = _outputs(self.reference, self.calls_as_given, "the reference")
        else:
            found = _outputs(self.reference, self.calls64, "the reference", runner)
        if not any(isinstance(leaf, torch.Tensor) for leaves in found for leaf in leaves.values()):
            returned = ", ".join(describe(leaf) for leaf in found[0].values())
            raise UsageError(f"The reference returned {returned or 'nothing'}: there are no numbers to compare.")
        return found

    @cached_property
    def actual(self) -> list[Leaves]:
        """The outputs of the candidate."""
        calls = [call_for(self.candidate, call, self.reference) for call in self.calls]
        try:
            found = _outputs(self.candidate, calls, "the candidate")
        except UsageError:
            if self.dtype is not torch.float64 or not isinstance(self.candidate, nn.Module):
                raise
            # Its forward may make constants in the default dtype, which then has to be float64.
            runner = Float64Runner(self.candidate, "the candidate")
            found = _outputs(self.candidate, calls, "the candidate", runner)
        both_modules = isinstance(self.reference, nn.Module) and isinstance(self.candidate, nn.Module)
        return paired(self.exact, found, by_order=not both_modules)

    @cached_property
    def own(self) -> list[Leaves] | None:
        """The outputs of the reference in the candidate's dtype; None where that says nothing or does not run."""
        if not isinstance(self.reference, nn.Module) or self.dtype is torch.float64:
            return None
        same = all(p.dtype is self.dtype for p in self.reference.parameters() if p.is_floating_point())
        try:
            model = structural_copy(self.reference) if same else copied(self.reference, self.dtype)
            return _outputs(model, self.calls, "the reference")
        except Exception as error:  # only an additional measurement: the result is valid without it
            self.notes.append(f"the reference cannot be run in {name_of(self.dtype)} ({first_line(error)})")
            return None

    def problems(self) -> list[str]:
        """Return why the outputs cannot be compared, or are not the same, one clause each."""
        return problems_of(self.exact, self.actual, same_infinities=self.same_infinities)

    def errors(self) -> dict[str, LeafError]:
        """Return the error of each tensor of the candidate's output."""
        return errors_of(self.exact, self.actual, same_infinities=self.same_infinities)

    def own_errors(self) -> dict[str, LeafError]:
        """Return the error of each tensor of the reference's output in the candidate's dtype; empty if unknown."""
        if self.own is None:
            return {}
        return errors_of(self.exact, self.own, same_infinities=self.same_infinities)

    def sensitivity(self) -> dict[str, LeafError]:
        """Return the change of each tensor of the first output when inputs and weights change by some roundings.

        Each number changes by at most :data:`SENSITIVITY_ROUNDINGS` roundings: there are as many inside a network.
        What changes as much as the error in question is explained by rounding.
        """
        assert self.runner is not None
        noise = SENSITIVITY_ROUNDINGS * UNIT_ROUNDOFF[self.dtype]
        moved = self.calls64[0].map_tensors(lambda x: x * (1.0 + noise) if x.is_floating_point() else x)
        return errors_of(self.exact[:1], [leaves_of(self.runner(moved, noise=noise))], same_infinities=True)

    def varies(self) -> bool:
        """Whether the reference returns something else when it is run again."""
        assert isinstance(self.reference, nn.Module)
        again = [leaves_of(Float64Runner(self.reference, "the reference")(self.calls64[0]))]
        errors = errors_of(self.exact[:1], again, same_infinities=self.same_infinities)
        return any(error.relative > FLOORS[torch.float64] for error in errors.values())

    def evidence(self, tolerance: float | None, notes: Sequence[str] = ()) -> Evidence:
        """Compare, and measure what explains the error."""
        # All runs of the reference come first: a candidate that writes to its buffers must not widen the tolerance.
        own = self.own_errors()
        problems = self.problems()
        outputs = self._outputs(tolerance, own)
        worst = max(outputs, key=lambda one: one.excess)
        reference_error = own[worst.name].relative if worst.name in own else None
        if worst.mismatches is not None:
            origin = "whole numbers must be the same"
        elif tolerance is not None:
            origin = "given by the caller"
        else:
            origin = tolerance_for(self.dtype, reference_error)[1]
        self._note_unexplained(own)
        reference_run = self._reference_run()
        fold_error = self._fold_error(worst.name)
        layers = self._layers()
        return Evidence(
            dtype=name_of(self.dtype),
            batches=len(self.calls),
            samples=sum(map(samples_in, self.calls)),
            absolute=worst.absolute,
            relative=worst.relative,
            tolerance=worst.tolerance,
            tolerance_origin=origin,
            reference_run=reference_run,
            reference_error=reference_error,
            fold_error=fold_error,
            agreement=None if problems else _agreement(self.exact, self.actual),
            outputs=tuple(outputs) if len(outputs) > 1 or worst.mismatches is not None else (),
            layers=layers,
            problems=tuple(problems),
            notes=(*notes, *self.notes),
        )

    def _outputs(self, tolerance: float | None, own: dict[str, LeafError]) -> list[OutputEvidence]:
        """Return the error of each tensor, with its own tolerance."""
        found = []
        for name, error in self.errors().items():
            theirs = own.get(name)
            if error.mismatches is not None:
                # Of class indices near a tie, rounding changes some: as many as it changes in the reference.
                allowed = REFERENCE_FACTOR * theirs.relative if theirs is not None and tolerance is None else 0.0
            elif tolerance is not None:
                allowed = tolerance
            else:
                allowed, _ = tolerance_for(self.dtype, None if theirs is None else theirs.relative)
            found.append(OutputEvidence(name, error.absolute, error.relative, allowed, error.mismatches, error.total))
        return found

    def _note_unexplained(self, own: dict[str, LeafError]) -> None:
        """Note that the reference in float64 differs from itself in its own dtype by more than rounding explains."""
        doubtful = {name: error for name, error in own.items() if FLOORS[self.dtype] < error.relative < math.inf}
        if not doubtful:
            return
        sensitive = self.sensitivity()
        for name, error in doubtful.items():
            if error.relative > sensitive[name].relative and error.mismatches is None:
                what = f"in {name_of(self.dtype)} the reference differs from itself in float64 by {error.relative:.1e}"
                self.notes.append(f"{what}, more than rounding explains: its forward rounds or branches on values")
                return

    def _reference_run(self) -> str:
        first = next(leaf for leaf in self.exact[0].values() if isinstance(leaf, torch.Tensor))
        returned = name_of(first.dtype)
        if self.runner is None:
            return f"run as given, a plain callable that returned {returned}"
        if first.is_floating_point() and first.dtype is not torch.float64:
            self.notes.append(f"the reference returned {returned} although it ran in float64")
        return "run in float64 and in eval mode"

    def _fold_error(self, name: str) -> float | None:
        """Return the relative error of the candidate in float64."""
        if not isinstance(self.candidate, nn.Module) or self.dtype is torch.float64:
            return None
        try:
            runner = Float64Runner(self.candidate, "the candidate")
            found = [leaves_of(runner(call_for(self.candidate, call, self.reference))) for call in self.calls64]
            return errors_of(self.exact, found)[name].relative
        except Exception as error:  # as above
            self.notes.append(f"the candidate cannot be run in float64 ({first_line(error.__cause__ or error)})")
            return None

    def _layers(self) -> tuple[LayerEvidence, ...]:
        """Return the errors of the units, empty where one side is not a module."""
        if self.runner is None or not isinstance(self.candidate, nn.Module):
            return ()
        try:
            call = call_for(self.candidate, self.calls[0], self.reference)
            layers, note = compare_layers(self.runner, self.candidate, self.calls64[0], call, self.dtype)
        except Exception as error:  # as above
            self.notes.append(f"no table of layers ({first_line(error)})")
            return ()
        if note:
            self.notes.append(note)
        return layers


def _dtypes_like(call: Call, given: Call) -> Call:
    """Return the rounded call in the dtypes of the given one."""
    dtypes = iter([tensor.dtype for tensor in given.tensors()])
    return call.map_tensors(lambda x: x.to(next(dtypes)))


def _outputs(model: Model, calls: Sequence[Call], who: str, runner: Float64Runner | None = None) -> list[Leaves]:
    """Run a model on each call, by its runner if it has one.

    Raises UsageError if it does not run, for the reasons for which PyTorch refuses a shape or a dtype.
    """
    found: list[Leaves] = []
    for call in calls:
        try:
            found.append(leaves_of(runner(call) if runner else on_device_of(model, call)(model)))
        except RepvggError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            raise UsageError(does_not_run(model, call, who, error)) from error
    return found


def does_not_run(model: Any, call: Call, who: str, error: Exception) -> str:
    """Return the sentence that a model does not run on these inputs, with the shape that its first layer takes."""
    layer = first_layer(model) if isinstance(model, nn.Module) else None
    expected = f": its first layer, {layer[0] or type(model).__name__!r}, takes {layer[1]}" if layer else ""
    return f"{who[0].upper()}{who[1:]} does not run on {call!r} ({typed_line(error).rstrip('.')}){expected}."


def _agreement(exact: Sequence[Leaves], actual: Sequence[Leaves]) -> Agreement | None:
    """Return the top-1 agreement where one tensor of the output is (N, classes); None for any others."""
    names = {name for leaves in exact for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    scores = {name for name in names if all(_is_scores(leaves.get(name)) for leaves in exact)}
    if len(scores) != 1:
        return None
    (name,) = scores
    agreed, margin = 0, 0.0
    for a, b in ((ours[name], theirs[name]) for ours, theirs in zip(exact, actual, strict=True)):
        expected, chosen = a.argmax(1, keepdim=True), b.argmax(1, keepdim=True)
        agreed += int((expected == chosen).sum())
        margin = max(margin, float((a.gather(1, expected) - a.gather(1, chosen)).max()))
    return Agreement(agreed, sum(len(leaves[name]) for leaves in exact), margin)


def _is_scores(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() == 2 and leaf.shape[1] >= 2


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
    origin = f"{ROUNDINGS[dtype]:.0f} {name} roundings"
    if dtype is torch.float64:
        return floor, origin
    if reference_error is None or reference_error == float("inf"):
        return floor, f"{origin}; the reference's own error is unknown"
    if REFERENCE_FACTOR * reference_error > floor:
        own = f"{REFERENCE_FACTOR:.0f} x the reference's own error, {reference_error:.1e}"
        return REFERENCE_FACTOR * reference_error, own
    return floor, f"{origin}; the reference's own error is {reference_error:.1e}"
