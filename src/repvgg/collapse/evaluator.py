"""Evaluate the nodes of a recording, on symbols or on real tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from repvgg.collapse.recording import Recording, is_constant, is_number
from repvgg.symbolic import (
    SymbolicTensor,
    UnknownSize,
    guarded,
    shadow_of,
    unchanged_by_call,
)


class Evaluator:
    """Evaluate nodes of the graph of a recording, with all parameters and buffers passed through ``convert``.

    Args:
        recording: the graph.
        convert: from a tensor to the tensor to compute with.
        keep_kernels: leave kernels of convolutions and linear layers unconverted; the algebra converts them later.
    """

    def __init__(self, recording: Recording, convert: Callable[[Tensor], Tensor], keep_kernels: bool = True) -> None:
        self.recording = recording
        self.convert = convert
        self.keep_kernels = keep_kernels
        self._shadows: dict[str, nn.Module] = {}  # converting all weights of a module once per call would dominate

    def run(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Return the result of ``node`` for the values of its arguments; raise ReparamError if it is not linear."""
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        if node.op == "call_module":
            return unchanged_by_call(self._shadow(str(node.target)), *args, **kwargs)
        if node.op == "call_method":
            return guarded(getattr(args[0], str(node.target)), *args[1:], **kwargs)
        return guarded(node.target, *args, **kwargs)

    def with_constants(self, values: dict[fx.Node, Any]) -> Callable[[fx.Node], Any]:
        """Return a function that returns values of nodes, and computes and adds those that are not there yet."""
        return _Values(self, values)

    def computed(self, node: fx.Node) -> Any:
        """Return a constant that a forward computes: as the model computes it, in its own dtype, and then converted.

        In float64, a rounding in the forward could fall the other way.
        """
        value = _Values(self, {}, own=True)(node)
        return self.convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def constant(self, node: fx.Node) -> Any:
        """Return the parameter, buffer or attribute that ``node`` names."""
        value = self.recording.constant(node)
        return self.convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _shadow(self, path: str) -> nn.Module:
        if path not in self._shadows:
            part = self.recording.module.get_submodule(path)
            self._shadows[path] = shadow_of(
                part, self.convert, keep_kernels=self.keep_kernels, training=False, compute_weights=True
            )
        return self._shadows[path]


class _Values:
    """The values of nodes, computed when they are asked for; with ``own``, in the dtype of the model.

    This is no function inside another one: that would refer to itself, and its tensors would wait for the garbage
    collector.
    """

    def __init__(self, evaluator: Evaluator, values: dict[fx.Node, Any], *, own: bool = False) -> None:
        self.evaluator, self.values, self.own = evaluator, values, own
        self.is_symbolic = any(isinstance(value, SymbolicTensor) for value in values.values())

    def __call__(self, node: fx.Node) -> Any:
        if node not in self.values:
            if (number := recorded_number(node)) is not None:
                return number if self.is_symbolic else node.meta["value"]
            self.values[node] = self.compute(node)
        return self.values[node]

    def compute(self, node: fx.Node) -> Any:
        evaluator = self.evaluator
        if node.op == "get_attr":
            if not self.own:
                return evaluator.constant(node)
            value = evaluator.recording.constant(node)
            return value.detach().clone() if isinstance(value, Tensor) else value  # the forward may write to it
        return evaluator.computed(node) if is_constant(node) and not self.own else evaluator.run(node, self)


def recorded_number(node: fx.Node) -> Any:
    """Return the size or the shape that a node of a recorded run read from a tensor; None for all other nodes.

    Another call may have another one, so the algebra may only pass it on, to follow a reshape.
    """
    value = node.meta.get("value") if is_number(node) else None
    if isinstance(value, tuple):
        return tuple([UnknownSize(value=int(size)) for size in value])
    return UnknownSize(value=int(value)) if isinstance(value, int) and not isinstance(value, bool) else None


def meta_tensor(shape: Sequence[int]) -> Tensor:
    """Return a float64 meta tensor: enough for geometry and costs."""
    return torch.empty(tuple(shape), dtype=torch.float64, device="meta")
