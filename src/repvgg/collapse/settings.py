"""What the code of a forward reads besides its arguments and tensors: attributes, global and closure variables.

Such a value may select what a forward computes, so that the plain model checks it in each call. Only names are read
from the bytecode: a value may be found that the code does not use.
"""

from __future__ import annotations

import copy
import dis
import importlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum, EnumMeta
from functools import lru_cache
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from repvgg.collapse.code import function_in, nested_code
from repvgg.symbolic.shadow import STANDARD

_STANDARD = STANDARD | {"forward"}
_LIBRARIES = {"torch", "numpy", "repvgg", *sys.stdlib_module_names} - {"__main__"}
_SCALARS = (bool, int, float, str, type(None), Enum)
_MAX_ITEMS = 64  # of a container that counts as one value
_MAX_DEPTH = 4  # of configurations in configurations
_MAX_FUNCTIONS = 64  # whose code is read for one module
_MISSING = object()
_CALL = "()"  # in a path: the value is called
_Root: TypeAlias = dict[str, Any] | CellType | None


@dataclass(frozen=True, eq=False)
class Setting:
    """A value that the code of a module's forward reads.

    Attributes:
        root: where it starts: global variables, a variable of an enclosing function, or None for the module itself.
        path: the names that lead from there to the value, by attribute, by item, or by a call.
        value: as it was when the module was recorded.
        name: for texts.
        is_changed: whether that code may change it.
    """

    root: _Root
    path: tuple[Any, ...]
    value: Any
    name: str
    is_changed: bool

    @property
    def is_attribute(self) -> bool:
        """Whether it is an attribute of the module itself."""
        return self.root is None and len(self.path) == 1

    def differs(self, module: nn.Module) -> bool:
        """Whether the value is another one now, as ``module`` reads it."""
        value: Any = module if self.root is None else _contents(self.root)
        for name in self.path:
            value = _read(value, name)
        if value is self.value or value is _MISSING:
            return False
        return type(value) is not type(self.value) or bool(value != self.value)

    def __deepcopy__(self, memo: Any) -> Setting:
        return self

    def __reduce__(self) -> Any:
        # Global variables are stored by the name of their module; a stored closure has no code that changes it.
        name = self.root.get("__name__") if isinstance(self.root, dict) else "" if self.root is not None else None
        return _restored, (name, self.path, self.value, self.name, self.is_changed)

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}"


def _read(value: Any, name: Any) -> Any:
    if name == _CALL:
        return value() if callable(value) else _MISSING
    if value is os.environ:
        return os.environ.get(name)  # None is a value here: a variable that is not set
    return value.get(name, _MISSING) if isinstance(value, dict) else getattr(value, name, _MISSING)


def export_setting(switch: str) -> Setting | None:
    """Return a function that tells whether a model is being exported as a setting; None for other functions."""
    owner = {"is_in_onnx_export": torch.onnx, "is_exporting": torch.compiler, "is_tracing": torch.jit}.get(switch)
    return None if owner is None else Setting(vars(owner), (switch, _CALL), False, f"torch's {switch}()", False)


def _restored(module: str | None, *values: Any) -> Setting:
    root: _Root = None
    if module is not None:
        try:
            root = vars(importlib.import_module(module))
        except (ImportError, ValueError):  # of code that is in no file
            root = {}
    return Setting(root, *values)


def settings_read(module: nn.Module) -> list[Setting]:
    """Return the values that the forward of a module reads, without parameters, submodules and what PyTorch reads."""
    code = _code_of(module)
    found = _Found(code)
    own = vars(module)
    inherited = {n: v for n, v in _attributes(type(module)).items() if n not in own and not callable(v)}
    for name, value in {**inherited, **own}.items():
        if name in code.names and name not in _STANDARD and value is not None:
            found.add(None, (name,), value, name)
    if code.reads_class:
        for name, value in inherited.items():
            if name in code.names and name not in _STANDARD:
                found.add(None, ("__class__", name), value, f"{type(module).__name__}.{name}")
    if not code.names.isdisjoint(("environ", "environb", "getenv")):
        for name in sorted(name for name in code.names if name in os.environ or name.isupper()):
            found.add(vars(os), ("environ", name), os.environ.get(name), f"the environment variable {name}")
    for function, names in code.functions.items():
        variables = function.__globals__
        for name in names:
            if name in variables:
                found.add(variables, (name,), variables[name], f"the global {name}")
        for name, cell in _cells(function):
            found.add(cell, (), _contents(cell), f"the variable {name}")
    return list(found.settings.values())


@dataclass(frozen=True, eq=False)
class _Code:
    """What the code of a forward, and of what it may call, says.

    Attributes:
        functions: the functions, with the global variables that each reads.
        names: names of attributes and variables, and texts.
        assigned: names of attributes and variables that they assign to.
        reads_class: whether they may read attributes of the class and not of the module.
    """

    functions: dict[FunctionType, list[str]]
    names: frozenset[str]
    assigned: frozenset[str]
    reads_class: bool


class _Found:
    """The settings that were found, by their names."""

    def __init__(self, code: _Code) -> None:
        self.code = code
        self.settings: dict[str, Setting] = {}

    def add(self, root: _Root, path: tuple[Any, ...], value: Any, text: str) -> None:
        """Add a value, or the values in it that the code may name."""
        if text in self.settings or isinstance(value, (nn.Module, Tensor, EnumMeta)) or _is_library(value):
            return
        if isinstance(value, ContextVar):
            try:
                path, value = (*path, "get", _CALL), value.get()
            except LookupError:  # it has no value here
                return
        if isinstance(value, _SCALARS) or _is_small(value):
            names = {*map(str, path), text.rpartition(" ")[2]}
            self.settings[text] = Setting(root, path, copy.copy(value), text, not names.isdisjoint(self.code.assigned))
        elif len(path) < _MAX_DEPTH and (isinstance(value, type) or not callable(value)):
            inside = value if isinstance(value, dict) else _attributes(value)
            for name in [name for name in inside if name in self.code.names and not str(name).startswith("__")]:
                more = f"{text}[{name!r}]" if isinstance(value, dict) else f"{text}.{name}"
                self.add(root, (*path, name), inside[name], more)


def _is_small(value: Any) -> bool:
    """Whether a value is a container of few scalars."""
    is_container = isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _MAX_ITEMS
    return is_container and all(isinstance(item, _SCALARS) for item in value)


def _attributes(value: Any) -> dict[str, Any]:
    kinds = (value if isinstance(value, type) else type(value)).__mro__
    found: dict[str, Any] = {}
    for kind in reversed([kind for kind in kinds if not _is_library(kind)]):
        found |= vars(kind)
    return found if isinstance(value, type) else found | getattr(value, "__dict__", {})


def _is_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    is_code = isinstance(value, (ModuleType, type, FunctionType))
    return is_code and str(name).partition(".")[0] in {*_LIBRARIES, "builtins"}


def _code_of(module: nn.Module) -> _Code:
    own = [function for value in vars(module).values() if (function := function_in(value)) is not None]
    return _reachable(type(module), own) if own else _code_of_class(cast("Any", type(module)))


@lru_cache(maxsize=1024)
def _code_of_class(kind: Any) -> _Code:
    return _reachable(kind, [])


def _reachable(kind: type, own: Iterable[FunctionType]) -> _Code:
    functions: dict[FunctionType, list[str]] = {}
    todo = [*own, *_methods(kind, "forward")]
    while todo and len(functions) < _MAX_FUNCTIONS:
        function = todo.pop()
        if function in functions or _is_library(function):
            continue
        functions[function] = _globals_read(function)
        names = {name for code in nested_code(function.__code__) for name in code.co_names}
        todo += (method for name in names for method in _methods(kind, name))
        values = [function.__globals__.get(name) for name in functions[function]]
        for value in [*values, *(_contents(cell) for _, cell in _cells(function))]:
            # Functions of other Python modules and of classes are called by their names.
            is_namespace = isinstance(value, (ModuleType, type)) and not _is_library(value)
            called = [vars(value)[name] for name in names if name in vars(value)] if is_namespace else [value]
            todo += (found for item in called if (found := function_in(item)) is not None)
    codes = [code for function in functions for code in nested_code(function.__code__)]
    read = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    steps = (step for code in codes for step in dis.get_instructions(code))
    assigned = {str(step.argval) for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")}
    of_class = any(isinstance(vars(base).get(name), classmethod) for base in kind.__mro__ for name in read)
    return _Code(
        functions, frozenset(read), frozenset(assigned), of_class or not read.isdisjoint(("type", "__class__"))
    )


def _globals_read(function: FunctionType) -> list[str]:
    steps = (step for code in nested_code(function.__code__) for step in dis.get_instructions(code))
    return sorted({str(step.argval) for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")})


def _cells(function: FunctionType) -> Iterator[tuple[str, CellType]]:
    pairs = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return ((name, cell) for name, cell in pairs if name != "__class__")


def _contents(root: dict[str, Any] | CellType) -> Any:
    try:
        return root.cell_contents if isinstance(root, CellType) else root
    except ValueError:  # an empty cell
        return _MISSING


def _methods(kind: type, name: str) -> Iterator[FunctionType]:
    """Yield the functions of a class under a name, those that others override included: ``super()`` calls them."""
    for base in kind.__mro__:
        function = function_in(vars(base).get(name))
        if function is not None and not base.__module__.startswith("torch."):
            yield function
