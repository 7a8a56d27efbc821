"""Find the convolutions of a model, decide which of them may be replaced, and replace them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from repvgg.errors import ReparamError
from repvgg.symbolic import shadow_of, things_in

Where = Callable[[str, nn.Conv2d], bool]

_REGISTERED = ("_modules", "_parameters", "_buffers")
# A block would not run the hooks that observe the convolution.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Site:
    """A convolution in a model.

    Attributes:
        names: all its paths, in the order of the model.
        conv: the convolution.
        refusal: why it cannot be replaced by something else, or None.
    """

    names: tuple[str, ...]
    conv: nn.Conv2d
    refusal: str | None


def deep_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy; raise ReparamError if a part of the model cannot be copied, or returns itself as its copy."""
    try:
        out = copy.deepcopy(model)
    except Exception as error:
        raise ReparamError(
            f"The model cannot be copied ({type(error).__name__}: {error}): remove what cannot be copied, or give "
            "its class a __deepcopy__."
        ) from error
    # A __deepcopy__ that returns self would make the result share modules with the input.
    own = {id(part) for part in model.modules()}
    for name, part in out.named_modules():
        if id(part) in own:
            raise ReparamError(f"The model cannot be copied: {name!r} returns itself as its copy.")
    return out


def find_sites(model: nn.Module) -> list[Site]:
    """Return every ``nn.Conv2d`` of a model once, in the order of the model."""
    names = defaultdict(list)
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Conv2d):
            names[part].append(name)
    references = _References(model)
    return [Site(tuple(paths), conv, references.why_not_replaceable(conv)) for conv, paths in names.items()]


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they are registered, in place; return the model, or its replacement."""
    for part in list(model.modules()):
        for name, child in part._modules.items():
            if child is not None and child in new:
                part._modules[name] = new[child]
    return new.get(model, model)


class _References:
    """References to modules and parameters from outside of the module that registers them."""

    def __init__(self, model: nn.Module) -> None:
        self.held = set(_held(model))
        self.read = _read_from_outside(model)

    def why_not_replaceable(self, conv: nn.Conv2d) -> str | None:
        """Return why no other module can replace ``conv``, or None."""
        tensors = [tensor for tensor in conv._parameters.values() if tensor is not None]
        if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
            return "it has no kernel before its first image: run the model once"
        if any(id(thing) in self.held for thing in (conv, *tensors)):
            return "it is also held in an attribute that registers no module"
        if any(id(tensor) in self.read for tensor in tensors):
            return "its parameters are read from outside of it"
        return None


def _held(model: nn.Module) -> Iterator[int]:
    """Yield the ids of modules and tensors in attributes, lists and bound methods that no state dict shows."""
    for part in model.modules():
        for thing in things_in(value for key, value in vars(part).items() if key not in _REGISTERED):
            yield id(thing)
            yield id(getattr(thing, "__self__", None))


def _read_from_outside(model: nn.Module) -> set[int]:
    """Return the ids of parameters that one module's forward reads from another, as far as torch.fx can trace it."""
    found: set[int] = set()
    for part in model.modules():
        if part._modules and "forward" not in vars(part) and not isinstance(part, torch.jit.ScriptModule):
            own = {id(tensor) for tensor in part._parameters.values()}
            found |= _reads(part) - own
    return found


def _reads(part: nn.Module) -> set[int]:
    """Return the ids of the parameters that a forward reads itself: run it on a shadow, with submodules as leaves.

    Tensors are proxies of torch.fx. Its tracer is not used: it patches ``nn.Module`` for all threads while it runs.
    """
    reads: set[int] = set()
    shadow = shadow_of(part, lambda tensor: tensor)
    tracer = _Tracer()
    tracer.root, tracer.graph, tracer.tensor_attrs = shadow, fx.Graph(), {}
    for module in shadow.modules():
        module.__dict__["_parameters"] = _ReadParameters(module._parameters, reads)
        if module is not shadow and not isinstance(module, torch.jit.ScriptModule):
            module.__dict__["forward"] = _leaf(tracer)
            module.__dict__.update({name: {} for name in _HOOKS})
    # Control flow that depends on values ends the run; reads up to there count.
    with suppress(Exception):
        forward, arguments = tracer.create_args_for_root(type(shadow).forward, True)
        forward(*arguments)
    return reads


class _Tracer(fx.Tracer):
    """Makes proxies; what they are computed from does not matter."""

    def create_arg(self, a: Any) -> Any:
        return None if isinstance(a, Tensor) else super().create_arg(a)


def _leaf(tracer: fx.Tracer) -> Callable[..., fx.Proxy]:
    return lambda *args, **kwargs: tracer.create_proxy("call_function", _leaf, (), {})


class _ReadParameters(dict[str, Any]):
    """The parameters of a module; records the ids of those that are read as attributes."""

    def __init__(self, parameters: Mapping[str, Any], reads: set[int]) -> None:
        super().__init__(parameters)
        self.reads = reads

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self.reads.add(id(value))
        return value


def why_not_replaceable(conv: nn.Conv2d, owners: Mapping[int, int]) -> str | None:
    """Return why ``conv`` is not exactly a convolution with its own kernel and bias, or None.

    ``owners`` is the result of :func:`count_owners`.
    """
    # The kernel that forward uses is then not the parameter that a block would be solved for.
    if parametrize.is_parametrized(conv):
        return "its kernel is computed by a parametrization"
    if type(conv).forward is not nn.Conv2d.forward or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{type(conv).__name__} overrides forward"
    if "forward" in vars(conv):
        return "its forward was replaced on the instance"
    if any(vars(conv).get(name) for name in _HOOKS):
        return "it has hooks"
    if not conv.weight.is_floating_point() or conv.weight.is_meta:
        return f"its kernel has no real numbers ({conv.weight.dtype} on {conv.weight.device})"
    # A tied weight would be trained by one module and no longer by the other.
    if any(owners[id(tensor)] > 1 for tensor in conv.parameters()):
        return "it shares a parameter with another module"
    return None


def count_owners(model: nn.Module) -> dict[int, int]:
    """Count how many modules register each parameter, by its id."""
    counts: dict[int, int] = defaultdict(int)
    for part in model.modules():
        for tensor in part._parameters.values():
            counts[id(tensor)] += 1
    return counts
