"""What a recording holds for beyond the call that was recorded.

The forward of a module may branch on sizes, on its optional arguments, or on its mode. Here the other branches are
recorded as well, as far as they can be: each decision is forced the other way, and each optional argument is replaced
by an unknown value. A region may be merged if it is the same, or does not run, in all of them.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg._calls import Call, signature_of
from repvgg.collapse.code import code_facts
from repvgg.collapse.record import record
from repvgg.collapse.recording import (
    Decision,
    Frame,
    Recording,
    leaves,
    map_values,
)
from repvgg.collapse.settings import Setting, settings_read
from repvgg.collapse.tracked import UNKNOWN, UnknownValueError

_MAX_RUNS = 32  # of one forward; each decision doubles them
_MAX_COMBINATIONS = 16  # of the values of optional arguments
_MAX_MEMBERS = 8  # of an enum
_REFUSALS = (AssertionError, ValueError, NotImplementedError, RuntimeError, TypeError)


@dataclass(frozen=True, eq=False)
class Variants:
    """Recordings of one module's forward for other calls.

    Attributes:
        recordings: those that ran to the end.
        unknown: why there may be others, a clause about the forward; None if all are known.
        settings: attributes and variables that the code reads, each with a recording with a boolean attribute negated;
            None for any other one that may select what is computed.
        read_values: whether a run computed with elements of tensors, and so may not show what another module does
            that only differs in these.
    """

    recordings: tuple[Recording, ...]
    unknown: str | None
    settings: tuple[tuple[Setting, Recording | None], ...]
    read_values: bool


def find_variants(recording: Recording, frame: Frame) -> Variants:
    """Record the other branches that the code of a frame may take."""
    return _Trials(recording, frame).variants()


class _Trials:
    """Recordings of other calls of the module that a frame is a call of."""

    def __init__(self, recording: Recording, frame: Frame) -> None:
        self.recording, self.frame = recording, frame
        self.module = recording.module.get_submodule(frame.path)
        self.read_values = False

    def variants(self) -> Variants:
        settings = tuple(self._settings())
        found, unknown = self._branches()
        return Variants(tuple(found), unknown, settings, self.read_values)

    def _record(self, call: Call, **options: Any) -> Recording:
        try:
            found = record(self.module, call, on_meta=self.recording.on_meta, **options)
        except Exception as error:
            self.read_values = self.read_values or getattr(error, "read_values", True)
            raise
        self.read_values = self.read_values or found.read_values
        return found

    def _branches(self) -> tuple[list[Recording], str | None]:
        """Return the recordings of other branches, and why there may be more."""
        frame, found = self.frame, list[Recording]()
        lost = next((decision for decision in frame.decisions if not decision.known), None)
        if lost is not None:
            return found, f"turns a tensor into a number ({lost.where})"
        facts = code_facts(self.module)
        if facts.reads_rest:
            return found, "takes any number of arguments"
        calls = list(_calls_of(frame, self.module))
        nested = _nested_calls(calls[0]) if "isinstance" in facts.names else []
        if not nested and not frame.decisions and len(calls) == 1:
            return found, None
        if facts.inspects_objects and any(map(_has_unknown, calls)):
            # The object that stands for unknown values is none of those that the code asks for.
            return found, "takes optional arguments and may ask which object they are"
        waiting = deque[tuple[Call, list[bool]]]((call, []) for call in (*nested, *calls))
        runs = 0
        while waiting:
            # The earliest decisions first: each that goes the other way adds all that follow it, and each is one run.
            if runs + len(waiting) > _MAX_RUNS:
                return found, "has too many branches to try them all"
            call, forced = waiting.popleft()
            runs += 1
            try:
                variant = self._record(call, forced=forced)
            except Exception as error:
                if call in nested:  # most forwards do not take such a structure
                    continue
                if not _is_refusal(error):
                    return found, _reason(frame, call, error)
                outcomes = getattr(error, "decisions", [])
            else:
                found.append(variant)
                outcomes = variant.decisions
            if any(not decision.known for decision in outcomes):
                return found, "turns a tensor into a number"
            for place in range(len(forced), len(outcomes)):
                before = [decision.outcome for decision in outcomes[:place]]
                waiting.append((call, [*before, not outcomes[place].outcome]))
        return found, None

    def _settings(self) -> Iterator[tuple[Setting, Recording | None]]:
        """Yield what the code reads and may branch on; see :class:`Variants`."""
        settings = settings_read(self.module)
        yield from ((setting, None) for setting in settings if not setting.is_attribute)
        attributes = [setting for setting in settings if setting.is_attribute]
        if not attributes:
            return
        call = recorded_call(self.frame)
        unknown = [setting for setting in attributes if not isinstance(setting.value, bool)]
        for flag in (setting for setting in attributes if setting not in unknown):
            try:
                yield flag, self._record(call, attributes={flag.name: not flag.value})
            except Exception:  # the module was not built for it
                continue
        if unknown and self._may_select(call, unknown):
            yield from ((setting, None) for setting in unknown)

    def _may_select(self, call: Call, settings: list[Setting]) -> bool:
        """Whether the code may branch on one of the module's attributes, which are tried together."""
        values = {setting.name: UNKNOWN for setting in settings}
        try:
            found = self._record(call, attributes=values, stop_at_unknown=True)
            decisions: Sequence[Decision] = found.decisions
        except Exception as error:
            # Numbers are computed with, as parameters are.
            are_numbers = all(isinstance(setting.value, (int, float)) for setting in settings)
            if isinstance(error, UnknownValueError) or not (are_numbers or _is_refusal(error)):
                return True
            decisions = getattr(error, "decisions", ())
        return any(decision.unknown for decision in decisions)


def appearance(recording: Recording, frame: Frame) -> Hashable:
    """Return what code can see of the module and the arguments of a frame, apart from the elements of tensors.

    Where it is equal, the code of two modules does the same, unless that depends on elements.
    """
    parts = list(recording.module.get_submodule(frame.path).modules())
    places = {id(part): place for place, part in enumerate(parts)}
    own = [(type(part), _appearance_of(vars(part), places)) for part in parts]
    return (*own, _appearance_of((frame.args, frame.kwargs, frame.decisions), places))


def _appearance_of(value: Any, places: dict[int, int]) -> Hashable:
    """Return the appearance of a value; ``places`` numbers the modules inside, and all tensors in order."""
    kind = type(value)
    if isinstance(value, (Tensor, fx.Node)):
        like = _value_of(value)
        if not isinstance(like, Tensor):
            return kind, like
        stride = like.stride() if like.layout is torch.strided else None
        facts = (like.shape, like.dtype, like.device, like.requires_grad, like.layout, stride)
        return kind, places.setdefault(id(value), len(places)), facts
    if isinstance(value, nn.Module):
        return kind, places.get(id(value), -id(value))
    if isinstance(value, MethodType):
        return kind, value.__func__, _appearance_of(value.__self__, places)
    if isinstance(value, dict):
        return kind, tuple(value), tuple([_appearance_of(item, places) for item in value.values()])
    if isinstance(value, (list, tuple)):
        return kind, tuple([_appearance_of(item, places) for item in value])
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(value)
    is_data = isinstance(value, (int, float, str, type(None), torch.device, Enum, Decision))
    return kind, value if is_data else id(value)


def _reason(frame: Frame, call: Call, error: Exception) -> str:
    if _has_unknown(call):
        return "takes optional arguments that select what it computes"
    where = frame.decisions[0].where if frame.decisions else ""
    return f"branches on the size of its input ({where})"


def _is_refusal(error: Exception) -> bool:
    """Whether code of the user's raised an error of its own: such a call computes nothing."""
    if not isinstance(error, _REFUSALS):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, AssertionError) or (last.line or "").lstrip().startswith("raise ")


def recorded_call(frame: Frame) -> Call:
    """Return a call like the recorded one of a frame: with tensors without values, and the recorded numbers."""
    return Call(*map_values(_value_of, (frame.args, frame.kwargs)))


def _calls_of(frame: Frame, module: nn.Module) -> Iterator[Call]:
    """Yield the recorded call of a frame, and calls with other values of its optional arguments."""
    call = recorded_call(frame)
    args, kwargs = call.args, call.kwargs
    yield call
    signature = signature_of(module)
    if signature is None:
        return
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return
    given: dict[str, Any] = {}
    states: dict[str, list[Any]] = {}
    for name, parameter in signature.parameters.items():
        value = bound.arguments.get(name, parameter.default)
        if parameter.default is inspect.Parameter.empty or any(isinstance(leaf, Tensor) for leaf in leaves(value)):
            continue
        given[name] = value
        others = _other_values(value)
        for other in others:
            yield _with_arguments(signature, args, kwargs, {name: other})
        # An unknown value stands for the recorded one as well, unless code treats that apart from all others.
        states[name] = [*others, value] if value is None or UNKNOWN not in others else others
    # Two arguments together may select what neither does alone.
    if math.prod(map(len, states.values())) > _MAX_COMBINATIONS:
        states = {name: [UNKNOWN] for name in states}
    for values in product(*states.values()) if len(states) > 1 else ():
        chosen = dict(zip(states, values, strict=True))
        if sum(value is not given[name] for name, value in chosen.items()) > 1:
            yield _with_arguments(signature, args, kwargs, chosen)


def _other_values(given: Any) -> list[Any]:
    """Return values that stand for all others of an optional argument."""
    if isinstance(given, bool):
        return [not given]
    if isinstance(given, Enum) and len(type(given)) <= _MAX_MEMBERS:
        # Of an enum that is compared like a number or a string, or combined, there are values beside its members.
        beside = [] if type(given).__mro__[1] is Enum else [UNKNOWN]
        return [*(member for member in type(given) if member is not given), *beside]
    return [UNKNOWN]


def _has_unknown(call: Call) -> bool:
    return any(value is UNKNOWN for value in (*call.args, *call.kwargs.values()))


def _nested_calls(call: Call) -> list[Call]:
    """Return calls with structures in place of the tensors among the positional arguments."""
    return [
        Call((*call.args[:place], nested, *call.args[place + 1 :]), call.kwargs)
        for place, value in enumerate(call.args)
        if isinstance(value, Tensor)
        for nested in ([value, value], (value, value), _Any(value))
    ]


class _Any(dict[str, Any]):
    """A dictionary that has a value for every key."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, key: str) -> Any:
        return self.value


def _with_arguments(signature: inspect.Signature, args: Any, kwargs: Any, values: Mapping[str, Any]) -> Call:
    bound = signature.bind(*args, **kwargs)
    bound.arguments.update(values)
    return Call(bound.args, bound.kwargs)


def _value_of(node: Any) -> Any:
    """Return a value like that of a node: a tensor without values, or the recorded number."""
    if not isinstance(node, fx.Node):
        return node
    if "shape" in node.meta:
        shape, stride, dtype = node.meta["shape"], node.meta.get("stride"), node.meta["dtype"]
        if stride is None or 0 in stride:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return node.meta.get("value")
