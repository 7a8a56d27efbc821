"""What a model's code may access that no graph shows, and a cache of what is known about each of its modules.

A graph lists calls and tensors. Code can also read an attribute of a submodule, hold a module without registering it,
or iterate over its children; modules that it may reach in such ways must stay unchanged. They are found by reading
the bytecode of the forward.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Hashable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from repvgg.collapse.capture import Capture, capture, has_hooks
from repvgg.collapse.cost import Cost
from repvgg.collapse.inline import AliasAnalysis, Effects
from repvgg.collapse.symbolic_eval import ModuleMap
from repvgg.errors import ReparamError
from repvgg.symbolic import Source, SymbolicTensor, run, things_in

# Since Python 3.12 the lowest bit of LOAD_ATTR's argument marks a method call; before, LOAD_METHOD is its own opcode.
_LOAD_ATTR_MARKS_CALLS = sys.version_info >= (3, 12)
# Code that uses one of these names can reach any part of a module.
_DYNAMIC_ACCESS = frozenset(
    (
        *("getattr", "vars", "apply", "state_dict", "__dict__", "_modules"),
        *("children", "modules", "named_children", "named_modules", "get_submodule"),
        *("parameters", "named_parameters", "get_parameter"),
    )
)
_ACTIVATIONS = nn.ReLU.__module__
# Operations whose output is always a new tensor.
_COMPUTING = ("conv", "batch_norm", "avg_pool", "scale", "shift", "add", "cat")


def unregistered_modules(model: nn.Module) -> set[nn.Module]:
    """Find modules that another module holds in a plain attribute, outside of its own tree: it may call them."""
    found: set[nn.Module] = set()
    for holder in model.modules():
        own = set(holder.modules())
        held = (value for value in things_in(vars(holder).values()) if isinstance(value, nn.Module))
        for module in held:
            # A reference to a parent is common, and does not mean that the parent is called.
            if module not in own and not any(part is holder for part in module.modules()):
                found |= set(module.modules())
    return found


def parts_read_by_forward(module: nn.Module) -> set[nn.Module]:
    """Find submodules that the code of the forward may reach past their owners.

    These are all that have an attribute of a name that the code reads from anything but ``self``.
    """
    names = _attributes_read(module)
    inner = [part for part in module.modules() if part is not module]
    if names & _DYNAMIC_ACCESS:
        return set(inner)
    found: set[nn.Module] = set()
    for part in inner:
        if names & (vars(part).keys() | part._parameters.keys() | part._buffers.keys() | part._modules.keys()):
            found.add(part)
        for name in names & part._modules.keys():
            found |= set((part._modules[name] or nn.Identity()).modules())
    return found


def names_only_called(module: nn.Module) -> frozenset[str]:
    """Return names of attributes that the forward only calls, ``self.name(x)``, and uses in no other way."""
    called: set[str] = set()
    used: set[str] = set()
    for code, own in _code_of_forward(module):
        for name, how in _attribute_uses(code, own):
            (called if how == "called" else used).add(name)
    return frozenset() if used & _DYNAMIC_ACCESS else frozenset(called - used)


def only_calls_children(module: nn.Module) -> bool:
    """Whether the forward only calls the children of its module, and so cannot depend on what they are."""
    own = vars(module).get("forward") is None and not any(name in vars(module) for name in module._modules)
    kind: Any = type(module)
    return own and not (_names_not_called(kind) & ({"", *module._modules} | _DYNAMIC_ACCESS))


@lru_cache(maxsize=256)
def _names_not_called(kind: type[nn.Module]) -> frozenset[str]:
    """Attributes that a class's forward uses otherwise than by ``self.name(x)``; "" if it passes ``self`` on."""
    names: set[str] = set()
    for code, own in _code_from([kind.forward], kind):
        names |= {name for name, how in _attribute_uses(code, own) if how != "called"}
        names |= {""} if _passes_self_on(code, own) else set()
    return frozenset(names)


def _passes_self_on(code: CodeType, own: tuple[str, ...]) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PUSH_NULL", "RESUME")]
    loads = [step.argval if isinstance(step.argval, tuple) else (step.argval,) for step in steps]
    for place, step in enumerate(steps[:-1]):
        held = step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")) and set(own) & set(loads[place])
        if held and (loads[place][-1] not in own or steps[place + 1].opname not in ("LOAD_ATTR", "LOAD_METHOD")):
            return True
    return False


def _attributes_read(module: nn.Module) -> frozenset[str]:
    """Attributes that the forward, and the functions that it calls, read from anything but ``self``."""
    uses = (use for code, own in _code_of_forward(module) for use in _attribute_uses(code, own))
    return frozenset(name for name, how in uses if how == "deep")


def _code_of_forward(module: nn.Module) -> Iterator[tuple[CodeType, tuple[str, ...]]]:
    return _code_from([vars(module).get("forward"), type(module).forward], type(module))


def _code_from(functions: list[Any], kind: type[nn.Module]) -> Iterator[tuple[CodeType, tuple[str, ...]]]:
    """Yield the code of functions, and of what they call in their class and module, with their first argument."""
    todo = list(functions)
    seen: set[CodeType] = set()
    while todo:
        function = todo.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        own = function.__code__.co_varnames[:1]
        for code in _nested_code(function.__code__):
            seen.add(code)
            yield code, own
            methods = (name for name in code.co_names if name not in vars(nn.Module))
            todo += [_function_of(getattr(kind, name, None)) for name in methods]
            same_file = (function.__globals__.get(name) for name in code.co_names)
            todo += [f for f in same_file if isinstance(f, FunctionType) and f.__module__ == function.__module__]


def _function_of(value: Any) -> Any:
    return value.fget if isinstance(value, property) else value if isinstance(value, FunctionType) else None


def _nested_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:  # lambdas and comprehensions
        if isinstance(constant, CodeType):
            yield from _nested_code(constant)


def _attribute_uses(code: CodeType, own: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield attribute names with how they are used: "called" or "read" on the first argument, else "deep"."""
    before: Any = None
    for instruction in dis.get_instructions(code):
        name = str(instruction.argval)
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            marked = _LOAD_ATTR_MARKS_CALLS and bool((instruction.arg or 0) & 1)
            calls = instruction.opname == "LOAD_METHOD" or marked
            yield name, "deep" if before not in own else "called" if calls else "read"
        elif instruction.opname == "LOAD_GLOBAL" and name in _DYNAMIC_ACCESS:
            yield name, "deep"
        if instruction.opname.startswith("LOAD_FAST"):  # LOAD_FAST_LOAD_FAST pushes two; the last one is on top
            before = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
        elif instruction.opname not in ("CACHE", "PUSH_NULL"):
            before = None


class ModuleAnalysis:
    """Cache of captures, linear maps and effects on memory of the modules of one model, which must not change."""

    def __init__(self, merge_branches: bool = True) -> None:
        self._merge_branches = merge_branches
        self._maps: dict[nn.Module, ModuleMap | None] = {}
        self._captures: dict[nn.Module, Capture | Exception] = {}
        self._aliasing: dict[nn.Module, AliasAnalysis] = {}
        self._effects: dict[Hashable, Effects] = {}

    def capture(self, module: nn.Module) -> Capture:
        """Return the capture of ``module``.

        Raises:
            Exception: see :func:`repvgg.collapse.capture.capture`; the same one every time.
        """
        if module not in self._captures:
            try:
                self._captures[module] = capture(module)
            except Exception as error:
                self._captures[module] = error
        found = self._captures[module]
        if isinstance(found, Exception):
            raise found
        return found

    def linear_map(self, module: nn.Module) -> ModuleMap | None:
        """Return the convolution that ``module`` as a whole is equal to, or None; None also if it has hooks."""
        if module not in self._maps:
            skip = _has_activations(module) or has_hooks(module)
            self._maps[module] = None if skip else self._find_linear_map(module)
        return self._maps[module]

    def _find_linear_map(self, module: nn.Module) -> ModuleMap | None:
        source = Source(self._merge_branches)
        try:
            result = run(module, source, device="meta", strict=True)
        except ReparamError:
            return None
        if not isinstance(result, SymbolicTensor):
            return None
        return ModuleMap(result.map, tuple(source.operations), Cost.of_ledger(source), source.layout)

    def known_linear_map(self, module: nn.Module) -> ModuleMap | None:
        """Return the same if it was computed before, else None."""
        return self._maps.get(module)

    def aliasing(self, module: nn.Module) -> AliasAnalysis:
        """Return which nodes of the module's graph may share memory."""
        if module not in self._aliasing:
            captured = self.capture(module)
            self._aliasing[module] = AliasAnalysis(
                captured.graph, lambda path: self.effects(module.get_submodule(path)), captured.escaped
            )
        return self._aliasing[module]

    def effects(self, module: nn.Module) -> Effects:
        """Return what calling ``module`` may do to its inputs; the worst case if it cannot be traced."""
        # All instances of torch's own leaf modules behave the same, so one analysis serves all of them.
        key: Hashable = (type(module), getattr(module, "inplace", None)) if _is_torch_leaf(module) else module
        if key not in self._effects:
            self._effects[key] = Effects()  # ends the recursion of a module that calls itself
            self._effects[key] = self._find_effects(module)
        return self._effects[key]

    def _find_effects(self, module: nn.Module) -> Effects:
        linear = self.linear_map(module)
        if linear is not None:  # symbolic execution raises on a write to the input
            return Effects(writes=False, shares=not any(operation in _COMPUTING for operation in linear.operations))
        try:
            return self.aliasing(module).effects_on_inputs()
        except Exception:  # a check of the input's size is enough to stop a trace
            # torch's own modules write to their input only if ``inplace`` is set.
            return Effects(writes=not _is_torch_leaf(module) or bool(getattr(module, "inplace", False)))


def _has_activations(module: nn.Module) -> bool:
    # A shortcut. A module with an unused activation is missed as a whole, but its parts are still found.
    return any(type(part).__module__ == _ACTIVATIONS for part in module.modules())


def _is_torch_leaf(module: nn.Module) -> bool:
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.modules.")
