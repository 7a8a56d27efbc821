"""A shadow of a module: the same code and structure over converted tensors; the module itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


_STANDARD = frozenset(nn.Module().__dict__)


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else value


def _only_convolves(module: nn.Module) -> bool:
    """Whether a module hands its parameters to ``conv2d`` and does nothing else with them."""
    kind = type(module)
    return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]


def shadow_of(module: Module, convert: Callable[[Tensor], Tensor], *, keep_kernels: bool = False) -> Module:
    """A module that runs the code of ``module`` with every parameter and buffer passed through ``convert``.

    Plain attributes are shared, but for containers. Tied tensors and shared submodules stay tied and shared.
    Parameters become ordinary tensors, so that gradients flow through ``convert`` to the originals.

    Args:
        module: any module.
        convert: from a tensor to the tensor in its place.
        keep_kernels: leave the parameters of ``nn.Conv2d`` as they are: the algebra converts them when it has to.
    """
    return _Shadows(convert, keep_kernels).of(module)


class _Shadows:
    """Remembers what was converted already."""

    def __init__(self, convert: Callable[[Tensor], Tensor], keep_kernels: bool) -> None:
        self.convert = convert
        self.keep_kernels = keep_kernels
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}

    def of(self, module: Module) -> Module:
        if id(module) not in self.modules:
            shadow: Any = module.__class__.__new__(module.__class__)
            self.modules[id(module)] = shadow
            # Containers are copied too: a forward that caches something in a dictionary caches it in the shadow's.
            state = {k: _own(v) if k not in _STANDARD else v for k, v in module.__dict__.items()}
            state["_parameters"] = {}
            # An ordinary tensor is no Parameter, and a buffer need not be one: both find their name there.
            tensors = module._parameters | module._buffers
            as_is = self.keep_kernels and _only_convolves(module)
            state["_buffers"] = tensors if as_is else {k: self.tensor(v) for k, v in tensors.items()}
            state["_modules"] = {k: v if v is None else self.of(v) for k, v in module._modules.items()}
            shadow.__dict__.update(state)
        return self.modules[id(module)]  # type: ignore[return-value]

    def tensor(self, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        if id(value) not in self.tensors:
            self.tensors[id(value)] = self.convert(value)
        return self.tensors[id(value)]
