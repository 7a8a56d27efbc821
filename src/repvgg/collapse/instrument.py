"""A structural copy of a model that reports the calls of its modules: neither the model nor another thread notices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from repvgg.collapse.modules import is_leaf, is_scripted, is_torch_utility, join, storage_of, submodule_or_none
from repvgg.symbolic import shadow_of, things_in
from repvgg.symbolic.shadow import STANDARD
from repvgg.verify.execution import parameter_of

META = torch.device("meta")


class InstrumentedCopy:
    """A copy of a model that shares its parameters.

    Args:
        original: the model.
        on_meta: whether the tensors of the copy are on the meta device.
        copy_parameters: whether its parameters have memory of their own.
        mode: paths of modules with a training flag other than that of eval mode.
        call: called in place of a module, with its path, its forward and the arguments.
        call_leaf: the same for torch's own modules without children, after the module itself.

    Attributes:
        module: the copy.
        parameter_memory: the storages of the parameters of the original.
        tensors_of: parameters and buffers of each leaf module, as they are before a call.
    """

    def __init__(
        self,
        original: nn.Module,
        *,
        on_meta: bool,
        copy_parameters: bool,
        mode: Mapping[str, bool],
        call: Callable[..., Any],
        call_leaf: Callable[..., Any],
    ) -> None:
        self.original, self.on_meta, self.copy_parameters = original, on_meta, copy_parameters
        self.module = shadow_of(original, self._own_tensor, training=False)
        self.parameter_memory = {storage_of(parameter) for parameter in original.parameters()} - {None}
        self.tensors_of: dict[nn.Module, list[Tensor | None]] = {}
        self._paths: dict[int, tuple[Tensor, str]] = {}
        self._holders: dict[int, tuple[Tensor, str]] = {}
        originals = dict(original.named_modules())
        for path, part in list(self.module.named_modules()):
            if is_scripted(part):
                self._enclose(path, part, call_leaf)
                continue
            if path in mode:
                part.training = mode[path]
            leaf = is_leaf(originals[path])
            # No reference to ``call`` remains in this object: it refers to its owner.
            self._wrap(path, part, originals[path], partial(call_leaf, part) if leaf else call)
            self._name_tensors(path, part)
            if leaf:
                self.tensors_of[part] = tensors_of_leaf(part)
        # A forward that was replaced on the instance may read the original.
        for path, parameter in original.named_parameters() if not on_meta else ():
            self._paths.setdefault(id(parameter), (parameter, path))

    @property
    def forward(self) -> Callable[..., Any]:
        """The forward of the copy, whose call is not reported."""
        return vars(self.module)["forward"].args[-1]  # type: ignore[no-any-return]

    def path_of(self, value: object) -> str | None:
        """Return the path of a parameter, buffer or attribute of the copy; None for all other tensors."""
        tensor, path = self._paths.get(id(value), (None, None))
        return path if tensor is value else None

    def holder_of(self, value: object) -> str | None:
        """Return the path of the module that had a tensor in a container before the call; None for other tensors."""
        tensor, path = self._holders.get(id(value), (None, None))
        return path if tensor is value else None

    def release(self) -> None:
        """Release what is in reference cycles with the functions that are called."""
        for part in self.module.modules():
            vars(part).pop("forward", None)
        self._paths.clear()
        self._holders.clear()

    def _own_tensor(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the copy: a parameter shares its memory, but may be given other data."""
        if self.on_meta:
            return tensor.to(META)
        if not isinstance(tensor, nn.Parameter):
            return tensor
        data = tensor.detach().clone() if self.copy_parameters else tensor.detach()
        return parameter_of(data, tensor)

    def _wrap(self, path: str, part: nn.Module, original: nn.Module, call: Callable[..., Any]) -> None:
        # The hooks of users would see our inputs; those of torch's own utilities compute weights.
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = {key: hook for key, hook in vars(part)[name].items() if is_torch_utility(hook)}
            vars(part)[name] = type(vars(part)[name])(hooks)
        for name in ("_backward_hooks", "_backward_pre_hooks"):
            vars(part)[name] = type(vars(part)[name])()
        # A forward that was replaced on the instance is a function of the user's, on the original.
        forward = vars(original).get("forward")
        if forward is None or getattr(forward, "__self__", None) is original:
            forward = vars(part).get("forward") or MethodType(type(part).forward, part)
        vars(part)["forward"] = partial(call, path, forward)

    def _name_tensors(self, path: str, part: nn.Module) -> None:
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for store in stores:
            for name, value in list(store.items()):
                if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
                    if self.on_meta and not value.is_meta:  # integers, which shadows share
                        value = store[name] = value.to(META)
                    self._paths.setdefault(id(value), (value, join(path, name)))
        boxes = (box for name, box in vars(part).items() if name not in STANDARD)
        for value in things_in(box for box in boxes if isinstance(box, (dict, list, tuple, deque))):
            if isinstance(value, Tensor):
                self._holders.setdefault(id(value), (value, path))

    def _enclose(self, path: str, scripted: nn.Module, call_leaf: Callable[..., Any]) -> None:
        """Report calls of a compiled script as those of a leaf."""
        owner_path, _, name = path.rpartition(".")
        owner = submodule_or_none(self.module, owner_path)
        if path and owner is not None and not isinstance(owner, _Scripted) and not is_scripted(owner):
            own = owner._modules[name] = _Scripted(scripted)
            vars(own)["forward"] = partial(call_leaf, own, path, scripted)


class _Scripted(nn.Module):
    """A compiled script in the copy."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        vars(self)["scripted"] = scripted

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["scripted"], name)


def tensors_of_leaf(leaf: nn.Module) -> list[Tensor | None]:
    """Return the parameters and buffers of a module without children."""
    return [*leaf._parameters.values(), *leaf._buffers.values()]
