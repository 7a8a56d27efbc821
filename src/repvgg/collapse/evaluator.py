"""Running single nodes of a flat graph: on symbols, on tensors, or on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg.collapse.flat import Flat
from repvgg.symbolic import guarded, shadow_of, unchanged_by_call


class Evaluator:
    """Runs single nodes of a flat graph, on symbols or tensors, over tensors passed through ``convert``.

    If ``strict``, a module that keeps or changes something when it is called is refused.
    """

    def __init__(
        self, flat: Flat, convert: Callable[[Tensor], Tensor], keep_kernels: bool = True, strict: bool = True
    ) -> None:
        self.call = unchanged_by_call if strict else guarded
        self.flat = flat
        self.convert = convert
        self.keep_kernels = keep_kernels
        self._shadows: dict[str, nn.Module] = {}

    def run(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """The outcome of ``node`` when its arguments are ``value_of`` their nodes.

        Raises:
            ReparamError: it is not linear.
        """
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        if node.op == "call_module":
            return self.call(self._shadow(str(node.target)), *args, **kwargs)
        if node.op == "call_method":
            return guarded(getattr(args[0], str(node.target)), *args[1:], **kwargs)
        return guarded(node.target, *args, **kwargs)

    def outcome(self, source: fx.Node, value: Any, nodes: Sequence[fx.Node]) -> Any:
        """The last of ``nodes``, a linear region in order, where ``source`` is ``value``."""
        values: dict[fx.Node, Any] = {source: value}

        def value_of(node: fx.Node) -> Any:
            if node not in values:  # a constant, perhaps computed from others
                values[node] = self.constant(node) if node.op == "get_attr" else self.run(node, value_of)
            return values[node]

        for node in nodes:
            value_of(node)
        return values[nodes[-1]]

    def constant(self, node: fx.Node) -> Any:
        """The parameter, buffer or attribute that ``node`` names."""
        value = attribute(*self.flat.constants[node])
        return self.convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _shadow(self, path: str) -> nn.Module:
        if path not in self._shadows:
            part = self.flat.module.get_submodule(path)
            self._shadows[path] = shadow_of(part, self.convert, keep_kernels=self.keep_kernels, training=False)
        return self._shadows[path]


def to_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape in float64 without values: enough for geometry and costs."""
    return torch.empty(tensor.shape, dtype=torch.float64, device="meta")


def attribute(root: nn.Module, path: str) -> Any:
    """What stands at a dotted ``path`` below ``root``."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value
