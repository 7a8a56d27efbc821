"""From a plain ``nn.Module`` to the chain of layers that the engine knows, or a sentence that names what it is not.

The model's own ``forward`` is traced by torch.fx in eval mode; nothing is compiled and nothing is run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repvgg._contexts import eval_mode
from repvgg.engine.graph import Conv, ConvGeometry, Floats, Gate, Layer, Linear, Pair, Pool
from repvgg.errors import UnsupportedError, typed_line

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


def read(model: nn.Module) -> list[Layer]:
    """The layers of a plain network, in the order in which they run, with copies of its weights.

    Args:
        model: convolutions, ReLUs and squeeze-excite gates in a chain, then perhaps a global average pool, and linear
            layers. It is read as in eval mode, and is not changed.

    Raises:
        UnsupportedError: something in it is none of these; the text names it.
    """
    if fx.Tracer().is_leaf_module(model, ""):  # a layer alone: its own forward is not what is wanted
        model = nn.Sequential(model)
    return _Reading(_trace(model), Nodes(model, {}), {}).layers()


def read_graph(graph: fx.Graph, root: nn.Module, constants: Mapping[fx.Node, object]) -> list[Layer]:
    """The layers of a graph that was traced already, and that returns a tuple of one tensor.

    Args:
        graph: of torch functions and modules.
        root: the module that its nodes point to.
        constants: values of all placeholders but the images.

    Raises:
        UnsupportedError: see :func:`read`.
    """
    return _Reading(graph, Nodes(root, constants), constants, returns_tuple=True).layers()


def _trace(model: nn.Module) -> fx.Graph:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedError(f"{_quoted(name)} has hooks, which the engine would not call: remove them first.")
    try:
        with eval_mode(model):
            return fx.Tracer().trace(model)
    except Exception as error:  # whatever the forward of a stranger raises on a value that is none
        raise UnsupportedError(
            f"The forward of {type(model).__name__} cannot be traced ({typed_line(error)}): "
            "the engine takes plain networks, whose flow depends on no values."
        ) from error


def _quoted(name: str) -> str:
    return repr(name) if name else "The model itself"


@final
class _Reading:
    """A walk along the chain from the input to the output."""

    def __init__(
        self, graph: fx.Graph, nodes: Nodes, constants: Mapping[fx.Node, object], *, returns_tuple: bool = False
    ) -> None:
        self._nodes, self._returns_tuple = nodes, returns_tuple
        self._inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in constants]
        self._layers: list[Layer] = []
        self._flat = False  # whether there are two axes left

    def layers(self) -> list[Layer]:
        if len(self._inputs) != 1:
            raise UnsupportedError(f"The engine takes networks of one input, not of {len(self._inputs)}.")
        before = node = self._inputs[0]
        while (node := self._next(node)).op != "output":
            self._read(node)
            before = node
        if node.args != (((before,),) if self._returns_tuple else (before,)):
            raise UnsupportedError("The engine takes networks that return one tensor, not a collection of them.")
        if self._layers and isinstance(self._layers[-1], Pool) and not self._flat:
            raise UnsupportedError("The network ends with a pool of four axes: put a flatten(1) behind it.")
        if not self._layers:
            raise UnsupportedError("The network has no layer: there is nothing to compile.")
        return self._layers

    def _next(self, node: fx.Node) -> fx.Node:
        """The node behind, or the end of the gate that begins here."""
        users = list(node.users)
        if len(users) == 2:
            return self._gate(node, users)
        if len(users) != 1:
            self._refuse(node, f"is used {len(users)} times, where a chain goes on once")
        return users[0]

    def _read(self, node: fx.Node) -> None:
        """Take in one node of the chain. The end of a gate was taken in as a whole."""
        kind = self._kind(node)
        if kind in MUL and isinstance(self._layers[-1], Gate):
            return
        for kinds, take in self._takers():
            if kind in kinds:
                take(node)
                return
        self._refuse(node, "is none of the layers that the engine knows")

    def _takers(self) -> Iterable[tuple[tuple[Any, ...], Callable[[fx.Node], None]]]:
        return (
            (CONV, self._conv),
            (RELU, self._relu),
            (SAME, lambda node: None),
            (DROPOUT, self._dropout),
            (POOL, self._pool),
            (FLATTEN, self._flatten),
            (LINEAR, self._linear),
        )

    def _kind(self, node: fx.Node) -> Any:
        return self._nodes.kind(node)

    def _conv(self, node: fx.Node) -> None:
        self._before_pool(node)
        self._layers.append(self._conv_of(node))

    def _conv_of(self, node: fx.Node) -> Conv:
        if self._kind(node) not in CONV:
            self._refuse(node, "stands where a convolution is expected")
        call = self._nodes.weighted(node)
        if call.padding_mode != "zeros":
            self._refuse(node, f"pads with {call.padding_mode!r}, and the engine pads with zeros alone")
        weight, bias = self._floats(node, call.weight), self._bias(node, call.weight, call.bias)
        kernel: Pair = weight.shape[2:]
        stride, dilation = pair(call.stride), pair(call.dilation)
        geometry = ConvGeometry(
            kernel, stride, self._padding(node, call.padding, kernel, dilation), dilation, call.groups
        )
        return Conv(self._nodes.name(node), weight, bias, geometry)

    def _padding(self, node: fx.Node, padding: Any, kernel: Pair, dilation: Pair) -> Pair:
        if padding == "valid":
            return 0, 0
        if not isinstance(padding, str):
            return pair(padding)
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        if any(pixels % 2 for pixels in total):
            self._refuse(node, "pads one side more than the other")
        return total[0] // 2, total[1] // 2

    def _relu(self, node: fx.Node) -> None:
        before = self._layers[-1] if self._layers else None
        if before is None or isinstance(before, Pool):
            self._refuse(node, "has no convolution in front of it")
        self._layers[-1] = replace(before, relu=True)

    def _pool(self, node: fx.Node) -> None:
        self._before_pool(node)
        if not self._nodes.is_pool(node):
            self._refuse(node, "is no mean over all pixels of a channel")
        self._layers.append(Pool(self._nodes.name(node)))
        self._flat = self._nodes.drops_axes(node)

    def _before_pool(self, node: fx.Node) -> None:
        if any(isinstance(layer, (Pool, Linear)) for layer in self._layers):
            self._refuse(node, "comes behind the pool, where the engine takes linear layers alone")

    def _flatten(self, node: fx.Node) -> None:
        behind_pool = bool(self._layers) and isinstance(self._layers[-1], Pool)
        if self._nodes.flattened_axes(node) not in ((1, -1), (1, 3)) or not behind_pool:
            self._refuse(node, "is no flatten(1) behind a global average pool")
        self._flat = True

    def _dropout(self, node: fx.Node) -> None:
        if not self._nodes.is_idle(node):
            self._refuse(node, "drops numbers at random, as in training")

    def _linear(self, node: fx.Node) -> None:
        if not self._flat:
            self._refuse(node, "does not stand behind a global average pool and a flatten(1)")
        call = self._nodes.weighted(node)
        weight, bias = self._floats(node, call.weight), self._bias(node, call.weight, call.bias)
        self._layers.append(Linear(self._nodes.name(node), weight, bias))

    def _gate(self, node: fx.Node, users: list[fx.Node]) -> fx.Node:
        """The product that ends a gate which begins at ``node``."""
        first, product = sorted(users, key=lambda user: self._kind(user) in MUL)
        if self._kind(product) not in MUL or not self._layers or not self._nodes.is_pool(first):
            self._refuse(node, "goes two ways, and not as a squeeze-excite gate does")
        self._before_pool(first)
        down, relu, up, sigmoid = self._chain(first, 4)
        fits = self._kind(relu) in RELU and self._kind(sigmoid) in SIGMOID and set(sigmoid.users) == {product}
        if not fits:
            self._refuse(
                down, "begins no squeeze-excite gate that the engine knows: convolution, ReLU, convolution, sigmoid"
            )
        squeeze, excite = self._dense(down), self._dense(up)
        self._layers.append(Gate(squeeze.name, squeeze.weight, squeeze.bias, excite.weight, excite.bias))
        return product

    def _chain(self, node: fx.Node, count: int) -> list[fx.Node]:
        """The nodes behind ``node``, each the only user of the one before it."""
        nodes = [node]
        while len(nodes) <= count:
            if len(nodes[-1].users) != 1:
                self._refuse(nodes[-1], "goes several ways inside a gate")
            nodes.append(next(iter(nodes[-1].users)))
        return nodes[1:]

    def _dense(self, node: fx.Node) -> Linear:
        """A 1x1 convolution of one pixel as a matrix."""
        conv = self._conv_of(node)
        if conv.geometry != ConvGeometry((1, 1)):
            self._refuse(node, "is no plain 1x1 convolution, as a gate has")
        return Linear(conv.name, conv.weight[:, :, 0, 0], conv.bias)

    def _bias(self, node: fx.Node, weight: Any, bias: Any) -> Floats:
        return np.zeros(len(weight), np.float32) if bias is None and weight is not None else self._floats(node, bias)

    def _floats(self, node: fx.Node, tensor: Any) -> Floats:
        """A copy of the numbers of a tensor."""
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            self._refuse(
                node, "has weights that are not float32 numbers on the CPU: convert the model with .float().cpu()"
            )
        return np.array(tensor.detach().contiguous().numpy(), np.float32, order="C")

    def _refuse(self, node: fx.Node, why: str) -> NoReturn:
        kind = self._kind(node)
        what = kind if isinstance(kind, str) else kind.__name__
        more = " Fold batch norms first, with repvgg.reparameterize." if "BatchNorm" in what else ""
        who = "The input" if node.op == "placeholder" else f"{self._nodes.name(node)!r} ({what})"
        raise UnsupportedError(f"{who} {why}.{more}")
