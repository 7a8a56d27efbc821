"""Where the error is made: one row for each unit that both models have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.verify.evidence import LayerEvidence
from repvgg.verify.runs import errors, outputs_of

#: How many images the table is made on, which bounds the memory for what is captured.
IMAGES = 4

_NAMED = 3


def matching_units(reference: nn.Module, candidate: nn.Module) -> list[str]:
    """Qualified names of the units, the smallest pairs of modules that can be compared.

    From the root down, as long as both sides have children of the same names. A unit is

    - a pair whose children have other names (three branches against one convolution),
    - a pair that has two leaf children of one name and of different types: something was folded between its children
      (a batch norm against an identity), so only their parent is comparable as a whole,
    - a pair of leaves with parameters on both sides.

    The root itself is none, as its error is the error of the model. Where its own children differ (auxiliary heads on
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
    """Whether the children have other names, or two leaves of one name have different types."""
    ours, theirs = _children(reference), _children(candidate)
    if ours.keys() != theirs.keys():
        return True
    pairs = [(child, theirs[key]) for key, child in ours.items()]
    return any(type(a) is not type(b) for a, b in pairs if not _is_container(a) and not _is_container(b))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """All children by name; ``named_children`` would leave out a module that it has met before."""
    return {name: child for name, child in module._modules.items() if child is not None}


def _is_container(module: nn.Module | None) -> bool:
    return module is not None and bool(_children(module))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


@dataclass
class _Calls:
    """What one unit got and gave in its first call, and how often it was called."""

    count: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: object = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook. What is kept is cloned: the unit, or an in-place ReLU after it, may write over it."""
        self.count += 1
        if self.count == 1:
            self.args, self.kwargs = _mapped(args, torch.clone), _mapped(kwargs, torch.clone)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Hook."""
        if self.count == 1:
            self.output = output.detach().clone() if isinstance(output, Tensor) else output


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Calls]]:
    """Record the calls of some modules of ``model``; the hooks are gone afterwards."""
    calls = {name: _Calls() for name in names}
    with ExitStack() as stack:
        for name, record in calls.items():
            module = model.get_submodule(name)
            before = module.register_forward_pre_hook(record.before, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(record.after).remove)
        yield calls


def _mapped(value: Any, change: Any) -> Any:
    """``change`` on every tensor in nested tuples, lists and dicts; the rest as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def layer_table(
    reference64: nn.Module, candidate: nn.Module, batch: Tensor, dtype: torch.dtype
) -> tuple[tuple[LayerEvidence, ...], str | None]:
    """One row a unit, and a clause that names the units left out, or None.

    Left out are units that are not called exactly once on either side, or that do not return one tensor.

    Args:
        reference64: the reference in float64 and in eval mode.
        candidate: the candidate, in eval mode.
        batch: inputs as the candidate sees them; the first :data:`IMAGES` are used.
        dtype: what the reference's inputs are rounded to for the candidate's units.
    """
    names = matching_units(reference64, candidate)
    if not names:
        return (), "no table of layers, as the two have no module with parameters and of one name in common"
    few = batch[:IMAGES]
    exact = few.double() if few.is_floating_point() else few
    with _recorded(reference64, names) as ours:
        outputs_of(reference64, [exact], "the reference")
    with _recorded(candidate, names) as theirs:
        outputs_of(candidate, [few], "the candidate")
    usable = [name for name in names if _usable(ours[name]) and _usable(theirs[name])]
    rows = tuple(_row(name, ours[name], theirs[name], candidate.get_submodule(name), dtype) for name in usable)
    left_out = [name for name in names if name not in usable]
    return rows, _clause(left_out) if left_out else None


def _clause(left_out: Sequence[str]) -> str:
    shown = ", ".join(left_out[:_NAMED]) + (f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else "")
    return f"no row for {shown}: not called just once, or not returning one tensor"


def _usable(calls: _Calls) -> bool:
    return calls.count == 1 and isinstance(calls.output, Tensor) and calls.output.is_floating_point()


def _row(name: str, ours: _Calls, theirs: _Calls, unit: nn.Module, dtype: torch.dtype) -> LayerEvidence:
    return LayerEvidence(name, _made_here(ours, theirs, unit, dtype), _error(ours.output, theirs.output))


def _made_here(ours: _Calls, theirs: _Calls, unit: nn.Module, dtype: torch.dtype) -> float | None:
    """The error of the candidate's unit alone, None where it cannot be run on the reference's input."""
    assert isinstance(theirs.output, Tensor)  # _usable
    device = theirs.output.device

    def seen(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    try:
        output = unit(*_mapped(ours.args, seen), **_mapped(ours.kwargs, seen))
    except Exception:  # a unit may need anything that its parent prepared; the end-to-end figures stand without it
        return None
    return _error(ours.output, output)


def _error(exact: object, other: object) -> float:
    """Relative error, infinite where it is no tensor."""
    if not isinstance(exact, Tensor) or not isinstance(other, Tensor):
        return float("inf")
    return errors([exact.cpu()], [other.cpu()])[1]
