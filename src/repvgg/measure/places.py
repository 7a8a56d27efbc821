"""Where in a model an op is executed: the path of the innermost module whose forward is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextmanager
def places_in(model: nn.Module) -> Iterator[Callable[[], str]]:
    """A function that tells the path of the module that is running; "" for the model itself, and outside of it.

    No module is touched: the hooks stand for all modules of the process, and see to those of ``model`` only. A module
    that has several paths goes by the first one.
    """
    path_of = {id(module): path for path, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in path_of:
            running.append(path_of[id(module)])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in path_of:
            running.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield lambda: running[-1] if running else ""
    finally:
        for hook in hooks:
            hook.remove()


def stages_of(model: nn.Module) -> list[str]:
    """The paths that divide a model into its stages: its children, and the children of those that only hold others.

    A child is opened, and its own children are taken, if it is a list of modules, or a sequence with another sequence
    or list in it, as the bodies of many networks are.
    """
    return [path for name, child in model.named_children() for path in _opened(name, child)]


def stage_of(path: str, stages: list[str]) -> str:
    """The stage that a path is in; "" for what the model does itself."""
    return next((stage for stage in stages if path == stage or path.startswith(f"{stage}.")), "")


def _opened(path: str, module: nn.Module) -> Iterator[str]:
    inner = dict(module.named_children())
    lists = (nn.ModuleList, nn.ModuleDict)
    nested = isinstance(module, nn.Sequential) and any(isinstance(c, (nn.Sequential, *lists)) for c in inner.values())
    if inner and (isinstance(module, lists) or nested):
        for name, child in inner.items():
            yield from _opened(f"{path}.{name}", child)
    else:
        yield path
