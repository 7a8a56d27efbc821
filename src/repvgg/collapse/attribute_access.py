"""What a module's code may reach that no graph shows: parts it names, and modules that it holds without owning them."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Hashable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from repvgg.collapse.alias import Effects, Memory
from repvgg.collapse.capture import Capture, capture, has_hooks
from repvgg.collapse.cost import Cost
from repvgg.collapse.symbolic_eval import LinearModule
from repvgg.errors import ReparamError
from repvgg.symbolic import Source, SymbolicTensor, run, things_in

_ATTR_TELLS_CALLS = sys.version_info >= (3, 12)
_ANYTHING = frozenset(
    (
        *("getattr", "vars", "apply", "state_dict", "__dict__", "_modules"),
        *("children", "modules", "named_children", "named_modules", "get_submodule"),
        *("parameters", "named_parameters", "get_parameter"),
    )
)


def borrowed(model: nn.Module) -> set[int]:
    """Modules that another module holds in a plain attribute, beside the tree: it may call them as they are."""
    found: set[int] = set()
    for holder in model.modules():
        own = {id(part) for part in holder.modules()}
        held = (value for value in things_in(vars(holder).values()) if isinstance(value, nn.Module))
        for module in held:
            if id(module) not in own and not any(part is holder for part in module.modules()):
                found |= {id(part) for part in module.modules()}
    return found


def parts_named_by(module: nn.Module) -> set[int]:
    """Parts of the children of ``module`` that the code of its forward may reach for, past their owners.

    Every attribute is taken that the code reads from anything but ``self``, and whatever has such an attribute is kept.
    """
    names = _names_read(module)
    inner = [part for part in module.modules() if part is not module]
    if names & _ANYTHING:
        return {id(part) for part in inner}
    found: set[int] = set()
    for part in inner:
        if names & (vars(part).keys() | part._parameters.keys() | part._buffers.keys() | part._modules.keys()):
            found.add(id(part))
        for name in names & part._modules.keys():
            found |= {id(deep) for deep in (part._modules[name] or nn.Identity()).modules()}
    return found


def only_called(module: nn.Module) -> frozenset[str]:
    """Names of attributes that the forward uses by calling them, ``self.name(x)``, and in no other way."""
    called: set[str] = set()
    used: set[str] = set()
    for code, own in _codes_of_forward(module):
        for name, how in _uses(code, own):
            (called if how == "called" else used).add(name)
    return frozenset() if used & _ANYTHING else frozenset(called - used)


def only_calls(module: nn.Module) -> bool:
    """Whether all that the forward does with the parts of its module is to call them: it cannot see what they are."""
    own = vars(module).get("forward") is None and not any(name in vars(module) for name in module._modules)
    kind: Any = type(module)
    return own and not (_names_not_called(kind) & ({"", *module._modules} | _ANYTHING))


@lru_cache(maxsize=256)
def _names_not_called(kind: type[nn.Module]) -> frozenset[str]:
    """Attributes that forwards of a class use otherwise than by ``self.name(x)``; "" if ``self`` itself is used."""
    names: set[str] = set()
    for code, own in _codes_from([kind.forward], kind):
        names |= {name for name, how in _uses(code, own) if how != "called"}
        names |= {""} if _lets_out(code, own) else set()
    return frozenset(names)


def _lets_out(code: CodeType, own: tuple[str, ...]) -> bool:
    """Whether code does something else with its first argument than to take an attribute of it."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PUSH_NULL", "RESUME")]
    loads = [step.argval if isinstance(step.argval, tuple) else (step.argval,) for step in steps]
    for place, step in enumerate(steps[:-1]):
        held = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")) and set(own) & set(loads[place])
        if held and (loads[place][-1] not in own or steps[place + 1].opname not in ("LOAD_ATTR", "LOAD_METHOD")):
            return True
    return False


def _names_read(module: nn.Module) -> frozenset[str]:
    """Names of attributes that the forward, and the functions that it calls, read from other things than ``self``."""
    uses = (use for code, own in _codes_of_forward(module) for use in _uses(code, own))
    return frozenset(name for name, how in uses if how == "deep")


def _codes_of_forward(module: nn.Module) -> Iterator[tuple[CodeType, tuple[str, ...]]]:
    """The code of the forward and of the functions near it that it calls, with the name of its first argument."""
    return _codes_from([vars(module).get("forward"), type(module).forward], type(module))


def _codes_from(functions: list[Any], kind: type[nn.Module]) -> Iterator[tuple[CodeType, tuple[str, ...]]]:
    todo = list(functions)
    seen: set[CodeType] = set()
    while todo:
        function = todo.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        own = function.__code__.co_varnames[:1]
        for code in _codes(function.__code__):
            seen.add(code)
            yield code, own
            methods = (name for name in code.co_names if name not in vars(nn.Module))
            todo += [_defined(getattr(kind, name, None)) for name in methods]
            near = (function.__globals__.get(name) for name in code.co_names)
            todo += [f for f in near if isinstance(f, FunctionType) and f.__module__ == function.__module__]


def _defined(value: Any) -> Any:
    return value.fget if isinstance(value, property) else value if isinstance(value, FunctionType) else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _uses(code: CodeType, own: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Attributes that code uses, and how: "called" or "read" from the first argument, or "deep", from another thing."""
    before: Any = None
    for instruction in dis.get_instructions(code):
        name = str(instruction.argval)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            # before 3.12 a call has an instruction of its own, since then the lowest bit of the argument tells it
            calls = instruction.opname == "LOAD_METHOD" or (_ATTR_TELLS_CALLS and bool((instruction.arg or 0) & 1))
            yield name, "deep" if before not in own else "called" if calls else "read"
        elif instruction.opname == "LOAD_GLOBAL" and name in _ANYTHING:
            yield name, "deep"
        if instruction.opname.startswith("LOAD_FAST"):  # some load two at once
            before = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
        elif instruction.opname not in ("CACHE", "PUSH_NULL"):
            before = None


_ACTIVATIONS = nn.ReLU.__module__
_COMPUTE = ("conv", "batch_norm", "avg_pool", "scale", "shift", "add", "cat")


class Captures:
    """Remembers what was captured of each module, and what that says about memory."""

    def __init__(self, merge_branches: bool = True) -> None:
        self._merge_branches = merge_branches
        self._linear: dict[int, LinearModule | None] = {}
        self._captures: dict[int, Capture | Exception] = {}
        self._memories: dict[int, Memory] = {}
        self._effects: dict[Hashable, Effects] = {}

    def of(self, module: nn.Module) -> Capture:
        """The capture of ``module``.

        Raises:
            Exception: see :func:`repvgg.collapse.capture.capture`; the same one every time.
        """
        if id(module) not in self._captures:
            try:
                self._captures[id(module)] = capture(module)
            except Exception as error:
                self._captures[id(module)] = error
        found = self._captures[id(module)]
        if isinstance(found, Exception):
            raise found
        return found

    def linear(self, module: nn.Module) -> LinearModule | None:
        """The convolution that ``module`` is as a whole, if it is one, or None; with hooks it is more than that."""
        if id(module) not in self._linear and (_activates(module) or has_hooks(module)):
            self._linear[id(module)] = None
        if id(module) not in self._linear:
            source = Source(self._merge_branches)
            try:
                outcome = run(module, source, device="meta", strict=True)
            except ReparamError:
                outcome = None
            found = isinstance(outcome, SymbolicTensor)
            cost, done = Cost.of_ledger(source), tuple(source.operations)
            self._linear[id(module)] = LinearModule(outcome.map, done, cost, source.layout) if found else None
        return self._linear[id(module)]

    def known_linear(self, module: nn.Module) -> LinearModule | None:
        """The same, if it was asked for before, else None."""
        return self._linear.get(id(module))

    def memory(self, module: nn.Module) -> Memory:
        """Which nodes of its graph share memory."""
        if id(module) not in self._memories:
            captured = self.of(module)
            self._memories[id(module)] = Memory(
                captured.graph, lambda path: self.effects(module.get_submodule(path)), captured.escaped
            )
        return self._memories[id(module)]

    def effects(self, module: nn.Module) -> Effects:
        """What calling ``module`` may do to its inputs; anything, where its forward cannot be traced."""
        key: Hashable = (type(module), getattr(module, "inplace", None)) if _is_standard(module) else id(module)
        if key not in self._effects:
            self._effects[key] = Effects()  # of a module that calls itself
            self._effects[key] = self._find_effects(module)
        return self._effects[key]

    def _find_effects(self, module: nn.Module) -> Effects:
        linear = self.linear(module)
        if linear is not None:  # the symbolic forward refuses to change its input
            return Effects(writes=False, shares=not any(operation in _COMPUTE for operation in linear.operations))
        try:
            return self.memory(module).of_inputs()
        except Exception:  # a check of the input's size is enough to stop a trace
            # torch's own modules write to their input only where they are asked to
            return Effects(writes=not _is_standard(module) or bool(getattr(module, "inplace", False)))


def _activates(module: nn.Module) -> bool:
    """Whether there is one of torch's own activations in it. If nothing calls that it may be linear yet, in parts."""
    return any(type(part).__module__ == _ACTIVATIONS for part in module.modules())


def _is_standard(module: nn.Module) -> bool:
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.modules.")
