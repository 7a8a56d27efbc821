"""A shadow of a module: the same code and structure over converted tensors; the module itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def shadow_of(module: Module, convert: Callable[[Tensor], Tensor]) -> Module:
    """A module that runs the code of ``module`` with every parameter and buffer passed through ``convert``.

    Plain attributes are shared, but for containers. Tied tensors and shared submodules stay tied and shared.
    Parameters become ordinary tensors, so that gradients flow through ``convert`` to the originals.
    """
    return _Shadows(convert).of(module)


class _Shadows:
    """Remembers what was converted already."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        self.convert = convert
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}

    def of(self, module: Module) -> Module:
        if id(module) not in self.modules:
            shadow: Any = module.__class__.__new__(module.__class__)
            self.modules[id(module)] = shadow
            # Containers are copied too: a forward that caches something in a dictionary caches it in the shadow's.
            state = {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in module.__dict__.items()}
            state["_parameters"] = {}
            # An ordinary tensor is no Parameter, and a buffer need not be one: both find their name there.
            state["_buffers"] = {k: self.tensor(v) for k, v in (*module._parameters.items(), *module._buffers.items())}
            state["_modules"] = {k: v if v is None else self.of(v) for k, v in module._modules.items()}
            shadow.__dict__.update(state)
        return self.modules[id(module)]  # type: ignore[return-value]

    def tensor(self, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        if id(value) not in self.tensors:
            self.tensors[id(value)] = self.convert(value)
        return self.tensors[id(value)]
