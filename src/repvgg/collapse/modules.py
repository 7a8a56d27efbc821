"""Questions to any model: its batch norms, its hooks, and what is inside a wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def join(*names: str) -> str:
    """A dotted path."""
    return ".".join(filter(None, names))


def hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """The hooks in ``module`` that would see, or change, what flows through it."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (vars(part)[name] for part in module.modules() for name in names if vars(part).get(name))


def has_hooks(module: nn.Module) -> bool:
    """Whether there is any such hook."""
    return any(True for _ in hooks_of(module))


def unwrap(module: nn.Module, path: str = "") -> tuple[nn.Module, str]:
    """The module inside wrappers that only change how it runs, and its path, that of the wrapper being ``path``."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(module.module, join(path, "module"))
    if type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return unwrap(module._orig_mod, join(path, "_orig_mod"))  # type: ignore[arg-type]  # torch.compile
    return module, path


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own and has no parts."""
    return not any(module.children()) and type(module).__module__.startswith("torch.nn.")


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All batch norms of a model with their paths."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, _BatchNorm)]
