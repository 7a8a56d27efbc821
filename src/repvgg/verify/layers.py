"""Where the error arises: the errors of each unit that both models have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._calls import Call
from repvgg._structure import map_tensors
from repvgg.verify.evidence import LayerEvidence
from repvgg.verify.float64 import Float64Runner, on_device_of
from repvgg.verify.inputs import first_samples
from repvgg.verify.outputs import errors_of, leaves_of

#: Number of images that are used, which bounds the memory for the captured inputs and outputs.
IMAGES = 4

_NAMES_SHOWN = 3


def matching_units(reference: nn.Module, candidate: nn.Module) -> list[str]:
    """Return the qualified names of the units, the smallest pairs of modules that can be compared.

    From the root down, as long as both sides have children of the same names. A unit is

    - a pair whose children have different names (three branches against one convolution),
    - a pair with two leaf children of one name and different types: something was folded between its children (a batch
      norm against an identity), so only the parent is comparable,
    - a pair of leaves with parameters on both sides.

    The root is never a unit, as its error is the error of the model. Where its own children differ (auxiliary heads on
    one side), the containers that both sides have are still walked.
    """
    if not _differ(reference, candidate):
        return list(_units_below(reference, candidate, ""))
    theirs = _children(candidate)
    both = [
        key for key, child in _children(reference).items() if _is_container(child) and _is_container(theirs.get(key))
    ]
    return [name for key in both for name in _units(_children(reference)[key], theirs[key], key)]


def _units(reference: nn.Module, candidate: nn.Module, name: str) -> Iterator[str]:
    if _differ(reference, candidate):
        yield name
    elif _is_container(reference):
        yield from _units_below(reference, candidate, f"{name}.")
    elif _has_parameters(reference) and _has_parameters(candidate):
        yield name


def _units_below(reference: nn.Module, candidate: nn.Module, prefix: str) -> Iterator[str]:
    theirs = _children(candidate)
    for key, child in _children(reference).items():
        yield from _units(child, theirs[key], prefix + key)


def _differ(reference: nn.Module, candidate: nn.Module) -> bool:
    """Return whether the children have different names, or two leaves of one name have different types."""
    ours, theirs = _children(reference), _children(candidate)
    if ours.keys() != theirs.keys():
        return True
    pairs = [(child, theirs[key]) for key, child in ours.items()]
    return any(type(a) is not type(b) for a, b in pairs if not _is_container(a) and not _is_container(b))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    # Not named_children(), which lists a module under the first of its names only.
    return {name: child for name, child in module._modules.items() if child is not None}


def _is_container(module: nn.Module | None) -> bool:
    return module is not None and bool(_children(module))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@dataclass
class _Calls:
    """Inputs and output of a unit's first call, and the number of its calls."""

    count: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: object = None

    # Both hooks clone: the unit, or an in-place ReLU after it, may overwrite the tensors.

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        self.count += 1
        if self.count == 1:
            self.args, self.kwargs = map_tensors(torch.clone, (args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Forward hook."""
        if self.count == 1:
            self.output = output.detach().clone() if isinstance(output, Tensor) else output


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Calls]]:
    """Record the calls of some modules of ``model``; remove the hooks afterwards."""
    calls = {name: _Calls() for name in names}
    with ExitStack() as stack:
        for name, record in calls.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(record.before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(record.after).remove)
        yield calls


def compare_layers(
    reference: Float64Runner, candidate: nn.Module, call64: Call, call: Call, dtype: torch.dtype
) -> tuple[tuple[LayerEvidence, ...], str | None]:
    """Return the errors of each unit, and a clause that names the units left out, or None.

    Both models are in eval mode. The first :data:`IMAGES` samples of the inputs are used, in float64 (``call64``) and
    in the candidate's ``dtype`` (``call``). Units that are not called exactly once on either side, or that do not
    return one tensor, are left out.
    """
    names = matching_units(reference.module, candidate)
    if not names:
        return (), "no table of layers, as the two have no module with parameters of the same name"
    with _recorded(reference.module, names) as ours:
        reference(first_samples(call64, IMAGES))
    with _recorded(candidate, names) as theirs:
        on_device_of(candidate, first_samples(call, IMAGES))(candidate)
    usable = [name for name in names if _usable(ours[name]) and _usable(theirs[name])]
    layers = tuple(
        LayerEvidence(
            name,
            _error_alone(ours[name], theirs[name], candidate.get_submodule(name), dtype),
            _error(ours[name].output, theirs[name].output),
        )
        for name in usable
    )
    left_out = [name for name in names if name not in usable]
    if not left_out:
        return layers, None
    hidden = len(left_out) - _NAMES_SHOWN
    shown = ", ".join(left_out[:_NAMES_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")
    return layers, f"no errors of {shown}: not called exactly once, or not returning one tensor"


def _usable(calls: _Calls) -> bool:
    # Of a module that is called twice (shared weights), the calls of both models cannot be paired reliably.
    return calls.count == 1 and isinstance(calls.output, Tensor) and calls.output.is_floating_point()


def _error_alone(ours: _Calls, theirs: _Calls, unit: nn.Module, dtype: torch.dtype) -> float | None:
    """Return the error of the candidate's unit on the reference's input, None where it cannot be run on it."""
    assert isinstance(theirs.output, Tensor)  # _usable
    device = theirs.output.device

    def rounded(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    try:
        args, kwargs = map_tensors(rounded, (ours.args, ours.kwargs))
        output = unit(*args, **kwargs)
    except Exception:  # a unit may depend on state that its parent sets; the end-to-end error stands without it
        return None
    return _error(ours.output, output)


def _error(exact: object, other: object) -> float:
    """Return the relative error; infinite if either is not a tensor."""
    error = errors_of([leaves_of(exact)], [leaves_of(other)]).get("output")
    return float("inf") if error is None else error.relative
