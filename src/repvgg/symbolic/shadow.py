"""A shadow of a module: the same code and structure over converted tensors; the module itself is never touched."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from repvgg.errors import NotLinearError

Module = TypeVar("Module", bound=nn.Module)


_STANDARD = frozenset(nn.Module().__dict__)
_SETTLED = _STANDARD - {"_parameters", "_buffers", "_modules"}  # what no forward changes

# Of these it is known that they keep nothing in eval mode; they are also most of what a network is made of.
_STATELESS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict)


_FORWARDS = {kind.forward: kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _only_convolves(module: nn.Module) -> bool:
    """Whether a module hands its parameters to a convolution or ``linear`` and does nothing else with them."""
    kind: Any = type(module)
    standard: Any = _FORWARDS.get(kind.forward)
    return standard is nn.Linear or (standard is not None and kind._conv_forward is standard._conv_forward)


def shadow_of(
    module: Module, convert: Callable[[Tensor], Tensor], *, keep_kernels: bool = False, training: bool | None = None
) -> Module:
    """A module that runs the code of ``module`` with every parameter and buffer passed through ``convert``.

    Whatever that code does to itself it does to the shadow: attributes, containers in attributes, and tensors are the
    shadow's own. Tied tensors and shared submodules stay tied and shared. Parameters that are converted become
    ordinary tensors, so that gradients flow through ``convert`` to the originals.

    Args:
        module: any module.
        convert: from a tensor to the tensor in its place.
        keep_kernels: leave the parameters of ``nn.Linear`` and of convolutions as they are: the algebra converts them
            when it has to.
        training: the mode of all shadows; that of the modules, unless given.
    """
    return _Shadows(convert, keep_kernels, training).of(module)


def _is_patched(module: nn.Module) -> bool:
    """Whether something else stands in the place of the ``forward`` of a class than another method of the module."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


class _Shadows:
    """Remembers what was converted already."""

    def __init__(self, convert: Callable[[Tensor], Tensor], keep_kernels: bool, training: bool | None) -> None:
        self.convert = convert
        self.keep_kernels = keep_kernels
        self.training = training
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.containers: dict[int, Any] = {}

    def of(self, module: Module) -> Module:
        if isinstance(module, torch.jit.ScriptModule):  # it has no code in Python
            return module
        if id(module) not in self.modules:
            shadow: Any = object.__new__(type(module))
            self.modules[id(module)] = shadow
            shadow.__dict__.update(self._state(module))
        return self.modules[id(module)]  # type: ignore[return-value]

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state = {k: v if k in _STANDARD else self.own(v) for k, v in module.__dict__.items()}
        state.pop("_compiled_call_impl", None)
        as_is = self.keep_kernels and _only_convolves(module)
        tensors = module._parameters | module._buffers
        own = tensors if as_is else {k: self.tensor(v) for k, v in tensors.items()}
        # What is still a parameter is found as one; an ordinary tensor is none, and a buffer need not be one.
        state["_parameters"] = {k: v for k, v in own.items() if isinstance(v, nn.Parameter)}
        state["_buffers"] = {k: v for k, v in own.items() if k not in state["_parameters"]}
        state["_modules"] = {k: v if v is None else self.of(v) for k, v in module._modules.items()}
        state["training"] = module.training if self.training is None else self.training
        if _is_patched(module):
            state["forward"] = _refuse
        return state

    def own(self, value: Any) -> Any:
        """The shadow's own version of an attribute: what can be changed in place is not shared."""
        if isinstance(value, nn.Module):
            return self.of(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, (dict, list, set, deque)):
            return self.container(value)
        return tuple(map(self.own, value)) if type(value) is tuple else _copy_of_plain_object(value)

    def container(self, value: Any) -> Any:
        if id(value) not in self.containers:
            own = self.containers[id(value)] = copy.copy(value)  # of the same kind, with the same settings
            own.clear()
            if isinstance(value, dict):
                own.update({k: self.own(v) for k, v in value.items()})
            else:
                (own.update if isinstance(own, set) else own.extend)([self.own(v) for v in value])
        return self.containers[id(value)]

    def tensor(self, value: Tensor | None) -> Tensor | None:
        if value is None or nn.parameter.is_lazy(value):
            return value
        if id(value) not in self.tensors:
            converted = self.convert(value) if value.is_floating_point() else value
            shared = converted is value and not isinstance(value, nn.Parameter)
            self.tensors[id(value)] = converted.clone() if shared else converted
        return self.tensors[id(value)]


def _copy_of_plain_object(value: Any) -> Any:
    """A copy of an object that keeps its state in a ``__dict__`` and is no class, function or module of Python."""
    if type(value).__module__ == "builtins" or isinstance(value, type) or not hasattr(value, "__dict__"):
        return value
    try:
        return copy.copy(value)
    except Exception:  # what cannot be copied is shared
        return value


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise NotLinearError("its forward was replaced on the instance")


def things_in(values: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """Everything that stands in ``values``: containers are looked into, and so are plain objects, ``depth`` deep."""
    for value in values:
        if isinstance(value, dict) and depth > 0:
            yield from things_in(value.values(), depth - 1)
        elif isinstance(value, (list, tuple, set, deque)) and depth > 0:
            yield from things_in(value, depth - 1)
        else:
            yield value
            if depth > 1 and not isinstance(value, (Tensor, nn.Module, type)) and hasattr(value, "__dict__"):
                yield from things_in(list(vars(value).values()), depth - 2)


def fingerprint(module: nn.Module, but: str | None = None) -> object:
    """What stands in the attributes of all modules: it is another one after code that kept or changed something.

    Args:
        module: usually a shadow.
        but: attributes whose names start like this do not count.
    """
    parts = (part for part in module.modules() if type(part) not in _STATELESS)
    items = ((name, value) for part in parts for name, value in vars(part).items() if name not in _SETTLED)
    return [(name, _standing(value)) for name, value in items if not (but and name.startswith(but))]


def _standing(value: Any, depth: int = 3) -> object:
    """A value as far as containers go: which objects are in it, and in which state the tensors are."""
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        versioned = not nn.parameter.is_lazy(value) and not value.is_inference()
        return id(value), value._version if versioned else None
    if isinstance(value, (nn.Module, type)) or not depth:
        return id(value)
    if isinstance(value, dict):
        return [(k if isinstance(k, (int, str)) else id(k), _standing(v, depth - 1)) for k, v in value.items()]
    if isinstance(value, (list, tuple, set, deque)):
        return [_standing(v, depth - 1) for v in value]
    return id(value), _standing(vars(value), depth - 1) if hasattr(value, "__dict__") else None
