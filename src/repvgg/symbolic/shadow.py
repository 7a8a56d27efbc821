"""A shadow of a module: the same code and structure over converted tensors; the module itself stays untouched."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from repvgg.errors import NotLinearError

Module = TypeVar("Module", bound=nn.Module)


STANDARD = frozenset(nn.Module().__dict__)  # attributes that every module has
_CONSTANT = STANDARD - {"_parameters", "_buffers", "_modules"}  # attributes that no forward changes

# These store nothing in eval mode, and most of a network consists of them; skipping them makes fingerprints cheap.
_STATELESS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict)


_FORWARDS = {kind.forward: kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def computes_weight(hook: Any) -> bool:
    """Whether a forward pre-hook is one of torch's that compute a weight from other parameters, and do nothing else."""
    return isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod))


def _only_convolves(module: nn.Module) -> bool:
    """Whether a module passes its parameters to a convolution or ``linear`` and does nothing else with them."""
    if module._forward_pre_hooks:
        return False
    kind: Any = type(module)
    standard: Any = _FORWARDS.get(kind.forward)
    return standard is nn.Linear or (standard is not None and kind._conv_forward is standard._conv_forward)


def shadow_of(
    module: Module,
    convert: Callable[[Tensor], Tensor],
    *,
    keep_kernels: bool = False,
    training: bool | None = None,
    compute_weights: bool = False,
) -> Module:
    """Return a module that runs the code of ``module`` with every parameter and buffer passed through ``convert``.

    Code that modifies its module modifies the shadow: attributes, containers in attributes, and tensors are copies.
    Tied tensors and shared submodules stay tied and shared. Converted parameters become ordinary tensors, so that
    gradients flow through ``convert`` to the originals.

    Args:
        module: any module.
        convert: from a tensor to the tensor in its place.
        keep_kernels: leave the parameters of ``nn.Linear`` and of convolutions unconverted: the algebra converts them
            when they are multiplied out.
        training: the mode of all shadows; default: that of the modules.
        compute_weights: compute once what hooks of torch (``weight_norm``, ``spectral_norm``, pruning) compute in every
            call, and leave these hooks out; in eval mode, they always compute the same.
    """
    return _Shadows(convert, keep_kernels, training, compute_weights).of(module)


def _is_patched(module: nn.Module) -> bool:
    """Whether ``forward`` was replaced on the instance by something that is not one of its methods."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


class _Shadows:
    """Shadows of modules that share tensors, submodules and containers as the originals do."""

    def __init__(
        self, convert: Callable[[Tensor], Tensor], keep_kernels: bool, training: bool | None, compute_weights: bool
    ) -> None:
        self.convert = convert
        self.keep_kernels = keep_kernels
        self.training = training
        self.compute_weights = compute_weights
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.containers: dict[int, Any] = {}

    def of(self, module: Module) -> Module:
        if isinstance(module, torch.jit.ScriptModule):  # its code is not in Python, and cannot be shadowed
            return module
        if id(module) not in self.modules:
            # Without __init__, which may need arguments. Registered before its state, because modules may form cycles.
            shadow: Any = object.__new__(type(module))
            self.modules[id(module)] = shadow
            shadow.__dict__.update(self._state(module))
            if self.compute_weights and not shadow.training and shadow._forward_pre_hooks:
                _compute_weights(shadow)
        return self.modules[id(module)]  # type: ignore[return-value]

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state = {k: v if k in STANDARD else self.own(v) for k, v in module.__dict__.items()}
        # module.compile() stores a compiled call there, which would run on the original's tensors.
        state.pop("_compiled_call_impl", None)
        as_is = self.keep_kernels and _only_convolves(module)
        tensors = module._parameters | module._buffers
        own = tensors if as_is else {k: self.tensor(v) for k, v in tensors.items()}
        # Converted parameters are ordinary tensors, which ``_parameters`` must not contain; ``_buffers`` may.
        state["_parameters"] = {k: v for k, v in own.items() if isinstance(v, nn.Parameter)}
        state["_buffers"] = {k: v for k, v in own.items() if k not in state["_parameters"]}
        state["_modules"] = {k: v if v is None else self.of(v) for k, v in module._modules.items()}
        state["training"] = module.training if self.training is None else self.training
        if _is_patched(module):
            state["forward"] = _refuse
        return state

    def own(self, value: Any) -> Any:
        """Return the shadow's version of an attribute: what can be modified in place is not shared."""
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
            # copy.copy keeps the class and its settings, such as the maxlen of a deque. Registered before its items are
            # copied, for containers that contain themselves.
            own = self.containers[id(value)] = copy.copy(value)
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
            # A buffer that convert returned unchanged must be copied, or in-place updates would reach the original.
            shared = converted is value and not isinstance(value, nn.Parameter)
            self.tensors[id(value)] = converted.clone() if shared else converted
        return self.tensors[id(value)]


def _compute_weights(shadow: nn.Module) -> None:
    """Run the hooks that compute weights, and remove them."""
    found = [hook for hook in shadow._forward_pre_hooks.values() if computes_weight(hook)]
    for hook in found * len(found):  # one of them may compute what an earlier one reads
        hook(shadow, ())
    others = ((key, hook) for key, hook in shadow._forward_pre_hooks.items() if not computes_weight(hook))
    shadow._forward_pre_hooks = type(shadow._forward_pre_hooks)(others)


def _copy_of_plain_object(value: Any) -> Any:
    """Copy an object that keeps its state in a ``__dict__``; classes, functions and builtins are shared."""
    if type(value).__module__ == "builtins" or isinstance(value, type) or not hasattr(value, "__dict__"):
        return value
    try:
        return copy.copy(value)
    except Exception:  # what cannot be copied is shared
        return value


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise NotLinearError("its forward was replaced on the instance")


def things_in(values: Iterable[Any], depth: int = 4) -> Iterator[Any]:
    """Yield everything in ``values``, inside containers and attributes of plain objects up to ``depth`` levels."""
    for value in values:
        if isinstance(value, dict) and depth > 0:
            yield from things_in(value.values(), depth - 1)
        elif isinstance(value, (list, tuple, set, deque)) and depth > 0:
            yield from things_in(value, depth - 1)
        else:
            yield value
            if depth > 1 and not isinstance(value, (Tensor, nn.Module, type)) and hasattr(value, "__dict__"):
                yield from things_in(list(vars(value).values()), depth - 2)


def fingerprint(module: nn.Module) -> object:
    """Return the state of the attributes of all modules; it differs after code that stored or modified something."""
    parts = (part for part in module.modules() if type(part) not in _STATELESS)
    items = ((name, value) for part in parts for name, value in vars(part).items() if name not in _CONSTANT)
    return [(name, _state_of(value)) for name, value in items]


def own_state(part: nn.Module) -> object:
    """Return the state of a module's own attributes, with tensors by identity: a write to one does not change it."""
    if type(part) in _STATELESS:
        return None
    kept = ((k, v) for k, v in vars(part).items() if k not in _CONSTANT and k not in ("_modules", "forward"))
    return [(name, _state_of(value, versions=False)) for name, value in kept]


def _state_of(value: Any, depth: int = 3, versions: bool = True) -> object:
    """The state of a value: the identities of the objects in it, and the versions of its tensors."""
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        # Lazy parameters and inference tensors have no version counter.
        versioned = versions and not nn.parameter.is_lazy(value) and not value.is_inference()
        return id(value), value._version if versioned else None
    if isinstance(value, (nn.Module, type)) or not depth:
        return id(value)
    if isinstance(value, dict):
        return [
            (k if isinstance(k, (int, str)) else id(k), _state_of(v, depth - 1, versions)) for k, v in value.items()
        ]
    if isinstance(value, (list, tuple, set, deque)):
        return [_state_of(v, depth - 1, versions) for v in value]
    return id(value), _state_of(vars(value), depth - 1, versions) if hasattr(value, "__dict__") else None
