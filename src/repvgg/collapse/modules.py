"""Facts about single modules that the collapse depends on: wrappers, hooks, leaves, paths."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.symbolic import things_in

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def join(*names: str) -> str:
    """Join the non-empty parts of a dotted path."""
    return ".".join(filter(None, names))


def path_below(path: str, outer: str) -> str:
    """Return the path of something inside the module at ``outer`` as that module names it."""
    return path[len(outer) + 1 :] if outer else path


def is_inside(inner: str, outer: str) -> bool:
    """Whether the path ``inner`` is ``outer`` or below it; "" is the root."""
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def paths_around(names: Iterable[str]) -> set[str]:
    """Return the paths that one of the given paths is inside of, themselves and "" included."""
    found: set[str] = set()
    for name in names:
        while name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def has_parameters(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has a parameter."""
    return any(True for _ in module.parameters())


def hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """Yield the hook dictionaries in ``module`` that could observe or change activations or gradients."""
    return (vars(part)[name] for part in module.modules() for name in _HOOKS if vars(part).get(name))


def is_torch_utility(hook: Any) -> bool:
    """Whether a hook is one of torch's own that compute a weight: weight norm, spectral norm, pruning."""
    modules = (getattr(hook, "__module__", None), type(hook).__module__)
    return any(str(name).startswith("torch.nn.utils") for name in modules)


def has_own_hooks(part: nn.Module) -> bool:
    """Whether a user put a hook on this very module."""
    return any(not is_torch_utility(hook) for name in _HOOKS for hook in (vars(part).get(name) or {}).values())


def computes_weights(part: nn.Module) -> bool:
    """Whether a module computes its weight in each call: weight norm, spectral norm, pruning."""
    old_style = any(is_torch_utility(hook) for hook in (vars(part).get("_forward_pre_hooks") or {}).values())
    return old_style or torch.nn.utils.parametrize.is_parametrized(part)


def is_computed_attribute(model: nn.Module, path: str) -> bool:
    """Whether a tensor is one that hooks of torch compute from parameters, as the last call of the module left it."""
    owner_path, _, name = path.rpartition(".")
    owner = submodule_or_none(model, owner_path)
    return owner is not None and name in vars(owner) and not is_scripted(owner) and computes_weights(owner)


def inner_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper that only changes how it runs; None if it is no such wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module  # type: ignore[no-any-return]
    # torch.compile; matched by name because importing torch._dynamo takes seconds
    inner = module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None
    return inner if isinstance(inner, nn.Module) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module without any wrapper that only changes how it runs, around it or inside.

    If there are wrappers inside, it is a structural copy that shares all tensors.
    """
    while (inner := inner_module(module)) is not None:
        module = inner
    if all(inner_module(part) is None for part in module.modules()):
        return module
    return _copy_without_wrappers(module, {})


def _copy_without_wrappers(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while (inner := inner_module(module)) is not None:
        module = inner
    if is_scripted(module):
        return module
    if id(module) not in done:
        own: Any = object.__new__(type(module))
        done[id(module)] = own
        own.__dict__.update(vars(module))
        own._modules = {
            name: None if child is None else _copy_without_wrappers(child, done)
            for name, child in module._modules.items()
        }
        own.__dict__.pop("_compiled_call_impl", None)
    return done[id(module)]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own and has no children: it is recorded as one step."""
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.")


def is_batch_norm(part: nn.Module) -> bool:
    """Whether a module is a batch norm, or another norm with running statistics, which is one in eval mode."""
    statistics = (part._buffers.get(name) for name in ("running_mean", "running_var"))
    return isinstance(part, _BatchNorm) or all(isinstance(value, Tensor) for value in statistics)


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all batch norms of a model with their paths."""
    return [(name, part) for name, part in model.named_modules() if not is_scripted(part) and is_batch_norm(part)]


def is_scripted(module: nn.Module) -> bool:
    """Whether the code of a module is no longer in Python."""
    return isinstance(module, torch.jit.ScriptModule)


def held_elsewhere(model: nn.Module) -> set[nn.Module]:
    """Return modules that are registered in several places, or that another module holds without registering them."""
    references = Counter(child for part in model.modules() for child in part._modules.values() if child is not None)
    found = {part for part, count in references.items() if count > 1}
    for holder in model.modules():
        if is_scripted(holder):
            continue
        own = set(holder.modules())
        for module in (value for value in things_in(vars(holder).values()) if isinstance(value, nn.Module)):
            # A reference to a parent is common, and does not mean that the parent is called.
            if module not in own and not any(part is holder for part in module.modules()):
                found |= set(module.modules())
    return found


def norms_in_graphs(model: nn.Module) -> list[str]:
    """Return the paths of scripts, traces and graph modules whose graphs contain batch norms."""
    found: list[str] = []
    for path, part in model.named_modules():
        if is_scripted(part):
            inside = hasattr(part, "inlined_graph") and "batch_norm" in str(part.inlined_graph)
        elif isinstance(part, fx.GraphModule):
            inside = any("batch_norm" in str(node.target) for node in part.graph.nodes if node.op == "call_function")
        else:
            continue
        if inside and not any(is_inside(path, outer) for outer in found):
            found.append(path)
    return found


def submodule_or_none(model: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at ``path``, or None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def storage_of(value: Tensor) -> int | None:
    """Return an identifier of the memory of a tensor; None for sparse and nested ones."""
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def state_outside_pytorch() -> tuple[Any, ...]:
    """Return the states of the random generators of Python and NumPy, to be compared."""
    numpy = sys.modules.get("numpy")
    if not numpy:
        return (random.getstate(),)
    name, keys, *rest = numpy.random.get_state()
    return (random.getstate(), name, keys.tobytes(), *rest)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch on exit."""
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    python, cpu, gpu = random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    numpy = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy and of_numpy:
            numpy.random.set_state(of_numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(gpu)
