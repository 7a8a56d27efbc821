"""What the code of a class says that no recording shows: methods that call its parts, switches that its forward reads.

Only names are read from the bytecode. They keep something unchanged, and never allow a merge.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

from torch import nn

_EXPORT_SWITCHES = (
    *("is_in_onnx_export", "is_exporting", "is_compiling", "is_dynamo_compiling"),
    *("is_scripting", "is_tracing"),
)
_GRADIENT_SWITCHES = ("is_grad_enabled", "is_inference_mode_enabled")
_INSPECTIONS = ("type", "id", "callable", "hasattr")
# Since Python 3.12 the lowest bit of LOAD_ATTR's argument marks a method call; before, LOAD_METHOD is its own opcode.
_LOAD_ATTR_MARKS_CALLS = sys.version_info >= (3, 12)


@dataclass(frozen=True)
class CodeFacts:
    """Facts about the code of a module's class.

    Attributes:
        methods: names of the methods that its author wrote, ``forward`` and dunder methods excepted.
        calls: by method, the attributes that it calls as ``self.name(...)``.
        export_switches: functions that the forward, or what it calls, asks whether the model is being exported.
        gradient_switches: functions that they ask whether gradients are recorded.
        reads_training: whether they read ``training``.
        names: all names in that code.
        reads_rest: whether the forward reads what it takes as ``*args`` or ``**kwargs``.
        inspects_objects: whether that code may ask which object a value is, by ``is`` or a function such as ``type``;
            comparisons with None aside.
    """

    methods: frozenset[str]
    calls: dict[str, frozenset[str]]
    export_switches: tuple[str, ...]
    gradient_switches: tuple[str, ...]
    reads_training: bool
    names: frozenset[str]
    reads_rest: bool
    inspects_objects: bool


def code_facts(module: nn.Module) -> CodeFacts:
    """Return the facts about the class of a module."""
    return _facts_of_class(cast("Any", type(module)))


@lru_cache(maxsize=1024)
def _facts_of_class(kind: Any) -> CodeFacts:
    attributes = own_attributes(kind)
    functions = {name: f for name, value in attributes.items() if (f := function_in(value)) is not None}
    codes = [code for _, code in reachable_code(functions, "forward")]
    names = {name for code in codes for name in code.co_names}
    methods = {name: f for name, f in functions.items() if name != "forward" and not name.startswith("__")}
    return CodeFacts(
        methods=frozenset(methods),
        calls={name: frozenset(_called_attributes(function)) for name, function in methods.items()},
        export_switches=tuple(name for name in _EXPORT_SWITCHES if name in names),
        gradient_switches=tuple(name for name in _GRADIENT_SWITCHES if name in names),
        reads_training="training" in names,
        names=frozenset(names),
        reads_rest=_reads_rest(functions.get("forward")),
        inspects_objects=any(map(_inspects_objects, codes)),
    )


def has_public_methods(kind: type[nn.Module]) -> bool:
    """Whether a class has methods of its own that a user may call besides ``forward``."""
    return any(not name.startswith("_") for name in _facts_of_class(cast("Any", kind)).methods)


def own_attributes(kind: type) -> dict[str, Any]:
    """Return what a class and its bases define, those of PyTorch excepted."""
    bases = [base for base in reversed(kind.__mro__) if not base.__module__.startswith("torch.")]
    return {name: value for base in bases for name, value in vars(base).items()}


def function_in(value: Any) -> FunctionType | None:
    """Return the Python function that a call, or reading a property, of a value runs, if it is plain to see."""
    if isinstance(value, property):
        value = value.fget
    while isinstance(value, (MethodType, partial, staticmethod, classmethod, cached_property)):
        value = value.func if isinstance(value, (partial, cached_property)) else value.__func__
    return value if isinstance(value, FunctionType) else None


def reachable_code(functions: Mapping[str, FunctionType], start: str) -> Iterator[tuple[str, CodeType]]:
    """Yield the code of a method and of those that it may call, with their names; ``forward`` only as the start."""
    todo, done = [start], {"forward"} - {start}
    while todo:
        name = todo.pop()
        if name in done or name not in functions:
            continue
        done.add(name)
        for code in nested_code(inspect.unwrap(functions[name]).__code__):
            todo += code.co_names
            yield name, code


def _reads_rest(forward: FunctionType | None) -> bool:
    if forward is None:
        return False
    code = inspect.unwrap(forward).__code__
    first = code.co_argcount + code.co_kwonlyargcount
    count = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    rest = set(code.co_varnames[first : first + count])
    reads = (step for step in dis.get_instructions(code) if step.opname.startswith("LOAD_"))
    return any(
        bool(rest.intersection(step.argval if isinstance(step.argval, tuple) else (step.argval,))) for step in reads
    )


def _inspects_objects(code: CodeType) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    if any(step.opname == "LOAD_GLOBAL" and step.argval in _INSPECTIONS for step in steps):
        return True
    # Comparing with None loads it just before, or is an opcode of its own.
    pairs = pairwise(steps)
    return any(step.opname == "IS_OP" and before.argrepr != "None" for before, step in pairs)


def nested_code(code: CodeType) -> Iterator[CodeType]:
    """Yield code and that of the functions that are defined in it."""
    yield code
    for constant in code.co_consts:  # lambdas and comprehensions
        if isinstance(constant, CodeType):
            yield from nested_code(constant)


def is_method_call(step: dis.Instruction) -> bool:
    """Whether an instruction loads an attribute that is called at once."""
    marked = _LOAD_ATTR_MARKS_CALLS and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)
    return step.opname == "LOAD_METHOD" or marked


def _called_attributes(function: Any) -> Iterator[str]:
    """Yield the attributes that a method calls on its first argument."""
    code = inspect.unwrap(function).__code__
    own = code.co_varnames[:1]
    for nested in nested_code(code):
        before: Any = None
        for step in dis.get_instructions(nested):
            if is_method_call(step) and before in own:
                yield str(step.argval)
            if step.opname.startswith("LOAD_FAST"):
                before = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
            elif step.opname not in ("CACHE", "PUSH_NULL"):
                before = None
