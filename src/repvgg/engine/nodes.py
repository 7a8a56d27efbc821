"""What a node of a traced graph computes, whether a module, a function or a method does it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from repvgg.engine.layers import Pair

Kinds: TypeAlias = tuple[Any, ...]

CONV: Kinds = (nn.Conv2d, torch.conv2d)
LINEAR: Kinds = (nn.Linear, F.linear)
RELU: Kinds = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
SIGMOID: Kinds = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")
MUL: Kinds = (operator.mul, torch.mul, "mul")
SAME: Kinds = (nn.Identity, nn.Dropout, nn.Dropout2d)
DROPOUT: Kinds = (F.dropout, F.dropout2d)
FLATTEN: Kinds = (nn.Flatten, torch.flatten, "flatten")
MEAN: Kinds = (torch.mean, "mean")
POOL: Kinds = (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, *MEAN)


@final
@dataclass(frozen=True, eq=False)
class Weighted:
    """A convolution or a linear layer as it is called.

    Attributes:
        weight: a tensor, or something else where the graph computes it.
        bias: the same, or None.
        stride: of a convolution, and so on.
    """

    weight: Any
    bias: Any = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: str = "zeros"


_FIELDS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@final
class Nodes:
    """The nodes of one graph.

    Args:
        root: the module that was traced, with everything that nodes point to.
        constants: values of placeholders that are no images.
    """

    def __init__(self, root: nn.Module, constants: Mapping[fx.Node, object]) -> None:
        self._root, self._constants = root, constants
        self._modules = dict(root.named_modules())

    def kind(self, node: fx.Node) -> Any:
        """The very type of a module, a function, or the name of a method."""
        return type(self.module(node)) if node.op == "call_module" else node.target

    def module(self, node: fx.Node) -> Any:
        """What a node calls."""
        return self._modules[str(node.target)]

    def name(self, node: fx.Node) -> str:
        """Of the module, or of the node itself."""
        return str(node.target) if node.op == "call_module" else node.name

    def weighted(self, node: fx.Node) -> Weighted:
        """A convolution or a linear layer."""
        if node.op != "call_module":
            given = dict(zip(_FIELDS, node.args, strict=False)) | node.kwargs
            return Weighted(**{name: self._value(value) for name, value in given.items() if name != "input"})
        module = self.module(node)
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if type(module) is nn.Linear:
            return Weighted(weight, bias)
        return Weighted(
            weight, bias, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        )

    def is_pool(self, node: fx.Node) -> bool:
        """Whether a node takes the mean over height and width."""
        kind = self.kind(node)
        if kind is nn.AdaptiveAvgPool2d:
            return pair(self.module(node).output_size) == (1, 1)
        values = [*node.args[1:], *(value for name, value in node.kwargs.items() if name != "keepdim")]
        if kind is F.adaptive_avg_pool2d:
            return len(values) == 1 and pair(values[0]) == (1, 1)
        axes = values[0] if values and kind in MEAN else None
        return isinstance(axes, (tuple, list)) and sorted(axis % 4 for axis in axes) == [2, 3]

    def drops_axes(self, node: fx.Node) -> bool:
        """Whether a pool returns two axes only."""
        return self.kind(node) in MEAN and not node.kwargs.get("keepdim", (*node.args, False)[2:3] == (True,))

    def flattened_axes(self, node: fx.Node) -> tuple[Any, Any]:
        """The first and the last axis of a flatten."""
        if node.op == "call_module":
            return self.module(node).start_dim, self.module(node).end_dim
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return given.get("start_dim", 0), given.get("end_dim", -1)

    def is_idle(self, node: fx.Node) -> bool:
        """Whether a dropout drops nothing."""
        given = dict(zip(("p", "training"), node.args[1:], strict=False)) | node.kwargs
        return given.get("training", True) is False

    def _value(self, value: Any) -> Any:
        """What is known of an argument before anything runs."""
        if not isinstance(value, fx.Node):
            return value
        if value.op != "get_attr":
            return self._constants.get(value, value)
        found: Any = self._root
        for part in str(value.target).split("."):
            found = getattr(found, part)
        return found


def pair(value: Any) -> Pair:
    """A number for both axes, or one for each."""
    first, second = (value, value) if isinstance(value, int) else (*value, *value)[:2]
    return int(first), int(second)
