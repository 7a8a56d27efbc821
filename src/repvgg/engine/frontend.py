"""The frontend: reads a module or an FX graph into a list of layers, or names the first node that is not supported.

torch.fx traces the module's own ``forward`` in eval mode. No tensor is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repvgg._contexts import eval_mode
from repvgg.engine.graph import Conv, ConvGeometry, Floats, Gate, Layer, Linear, Pair, Pool
from repvgg.errors import UnsupportedError, typed_line

# What a node calls: the exact class of a module (a subclass may override forward), a function, or a method's name.
Targets: TypeAlias = tuple[Any, ...]
CONV: Targets = (nn.Conv2d, torch.conv2d)
LINEAR: Targets = (nn.Linear, F.linear)
RELU: Targets = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
SIGMOID: Targets = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")
MUL: Targets = (operator.mul, torch.mul, "mul")
NO_OPS: Targets = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
DROPOUT: Targets = (F.dropout, F.dropout2d)
FLATTEN: Targets = (nn.Flatten, torch.flatten, "flatten")
MEAN: Targets = (torch.mean, "mean")
POOL: Targets = (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, *MEAN)

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of conv2d and of linear


def read(model: nn.Module) -> list[Layer]:
    """Read the layers of a plain network in execution order, with copies of their weights.

    Args:
        model: convolutions, ReLUs and squeeze-and-excitation gates in a chain, then optionally a global average pool
            and linear layers. It is traced in eval mode, and not changed.

    Raises:
        UnsupportedError: a part of the model is not supported; the message names it.
    """
    if fx.Tracer().is_leaf_module(model, ""):  # the root is always traced into, even if it is a single nn.Conv2d
        model = nn.Sequential(model)
    return _Reader(_trace(model), model, {}).layers()


def read_graph(graph: fx.Graph, root: nn.Module, constants: Mapping[fx.Node, object]) -> list[Layer]:
    """Read the layers of a traced graph that returns a tuple of one tensor.

    Args:
        graph: calls torch functions and modules.
        root: the module that its nodes refer to.
        constants: the values of all placeholders except the images.

    Raises:
        UnsupportedError: see :func:`read`.
    """
    return _Reader(graph, root, constants, returns_tuple=True).layers()


def _trace(model: nn.Module) -> fx.Graph:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedError(
                f"{repr(name) if name else 'The model'} has forward hooks, which the engine would not call: "
                "remove them first."
            )
    try:
        with eval_mode(model):
            return fx.Tracer().trace(model)
    except Exception as error:
        raise UnsupportedError(
            f"The forward of {type(model).__name__} cannot be traced ({typed_line(error)}): "
            "remove control flow that depends on values."
        ) from error


@final
@dataclass(frozen=True, eq=False)
class _WeightedCall:
    """The arguments of a convolution or of a linear layer, as the model passes them."""

    weight: Any  # a tensor, or a node if the graph computes it
    bias: Any = None  # the same, or None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    padding_mode: str = "zeros"


@final
class _Reader:
    """Follows the chain of nodes from the input to the output; for the arguments, see :func:`read_graph`."""

    def __init__(
        self, graph: fx.Graph, root: nn.Module, constants: Mapping[fx.Node, object], *, returns_tuple: bool = False
    ) -> None:
        self._root, self._constants, self._returns_tuple = root, constants, returns_tuple
        self._modules = dict(root.named_modules())
        self._inputs = [node for node in graph.nodes if node.op == "placeholder" and node not in constants]
        self._layers: list[Layer] = []
        self._flat = False  # set once values are (N, C)
        handlers: list[tuple[Targets, Callable[[fx.Node], None]]] = [
            (CONV, self._conv),
            (RELU, self._relu),
            (NO_OPS, lambda node: None),
            (DROPOUT, self._dropout),
            (POOL, self._pool),
            (FLATTEN, self._flatten),
            (LINEAR, self._linear),
        ]
        self._handlers = {target: handler for targets, handler in handlers for target in targets}

    def layers(self) -> list[Layer]:
        if len(self._inputs) != 1:
            raise UnsupportedError(f"The engine needs a network with one input, not {len(self._inputs)}.")
        previous = node = self._inputs[0]
        while (node := self._next(node)).op != "output":
            self._read(node)
            previous = node
        if node.args != (((previous,),) if self._returns_tuple else (previous,)):
            raise UnsupportedError("The engine needs a network that returns one tensor: return it alone.")
        if not self._layers:
            raise UnsupportedError("The network has no layer: there is nothing to compile.")
        if isinstance(self._layers[-1], Pool) and not self._flat:
            raise UnsupportedError("The network ends with a pool of four axes: add a flatten(1) after it.")
        return self._layers

    def _next(self, node: fx.Node) -> fx.Node:
        """Return the next node of the chain; if a gate begins here, read it and return its final multiplication."""
        users = list(node.users)
        if len(users) == 2:
            return self._gate(node, users)
        if len(users) != 1:
            self._refuse(node, f"is used {len(users)} times, but the engine needs a chain")
        return users[0]

    def _read(self, node: fx.Node) -> None:
        target = self._target(node)
        if target in MUL and self._layers and isinstance(self._layers[-1], Gate):
            return  # the last node of a gate, which _gate has read
        handler = self._handlers.get(target)
        if handler is None:
            self._refuse(node, "is not supported by the engine")
        handler(node)

    # Nodes: what they call, and with which arguments

    def _target(self, node: fx.Node) -> Any:
        return type(self._module(node)) if node.op == "call_module" else node.target

    def _module(self, node: fx.Node) -> Any:
        return self._modules[str(node.target)]

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _weighted_call(self, node: fx.Node) -> _WeightedCall:
        if node.op != "call_module":
            given = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
            return _WeightedCall(**{name: self._value(value) for name, value in given.items() if name != "input"})
        module = self._module(node)
        # Not module.weight, which a parametrization would compute.
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if type(module) is nn.Linear:
            return _WeightedCall(weight, bias)
        return _WeightedCall(
            weight, bias, module.stride, module.padding, module.dilation, module.groups, module.padding_mode
        )

    def _value(self, value: Any) -> Any:
        """Return the value of an argument if it is known before anything runs, else the node that computes it."""
        if not isinstance(value, fx.Node):
            return value
        if value.op != "get_attr":
            return self._constants.get(value, value)
        found: Any = self._root
        for part in str(value.target).split("."):
            found = getattr(found, part)
        return found

    def _is_global_pool(self, node: fx.Node) -> bool:
        target = self._target(node)
        if target is nn.AdaptiveAvgPool2d:
            return _pair(self._module(node).output_size) == (1, 1)
        values = [*node.args[1:], *(value for name, value in node.kwargs.items() if name != "keepdim")]
        if target is F.adaptive_avg_pool2d:
            return len(values) == 1 and _pair(values[0]) == (1, 1)
        axes = values[0] if values and target in MEAN else None
        return isinstance(axes, (tuple, list)) and sorted(axis % 4 for axis in axes) == [2, 3]

    def _drops_axes(self, pool: fx.Node) -> bool:
        """Whether a pool returns two axes."""
        keeps = pool.kwargs.get("keepdim", (*pool.args, False)[2:3] == (True,))  # mean(x, dim, keepdim)
        return self._target(pool) in MEAN and not keeps

    # Handlers of the nodes of a chain

    def _conv(self, node: fx.Node) -> None:
        self._check_before_pool(node)
        self._layers.append(self._read_conv(node))

    def _read_conv(self, node: fx.Node) -> Conv:
        if self._target(node) not in CONV:
            self._refuse(node, "is not a convolution, which the engine expects here")
        call = self._weighted_call(node)
        if call.padding_mode != "zeros":
            self._refuse(node, f"has the padding mode {call.padding_mode!r}, but the engine supports 'zeros' only")
        weight, bias = self._floats(node, call.weight), self._bias(node, call.weight, call.bias)
        kernel: Pair = weight.shape[2:]
        stride, dilation = _pair(call.stride), _pair(call.dilation)
        padding = self._padding(node, call.padding, kernel, dilation)
        return Conv(self._name(node), weight, bias, ConvGeometry(kernel, stride, padding, dilation, call.groups))

    def _padding(self, node: fx.Node, padding: Any, kernel: Pair, dilation: Pair) -> Pair:
        if padding == "valid":
            return 0, 0
        if not isinstance(padding, str):
            return _pair(padding)
        total = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        if any(pixels % 2 for pixels in total):
            self._refuse(node, "pads one side more than the other: use a kernel of odd size")
        return total[0] // 2, total[1] // 2

    def _relu(self, node: fx.Node) -> None:
        before = self._layers[-1] if self._layers else None
        if before is None or isinstance(before, Pool):
            self._refuse(node, "does not follow a layer that the engine can fuse it into")
        self._layers[-1] = replace(before, relu=True)

    def _dropout(self, node: fx.Node) -> None:
        given = dict(zip(("p", "training"), node.args[1:], strict=False)) | node.kwargs
        if given.get("training", True) is not False:
            self._refuse(node, "drops values at random, as in training: pass training=False")

    def _pool(self, node: fx.Node) -> None:
        self._check_before_pool(node)
        if not self._is_global_pool(node):
            self._refuse(node, "is not a global average pool, the only pooling that the engine supports")
        self._layers.append(Pool(self._name(node)))
        self._flat = self._drops_axes(node)

    def _check_before_pool(self, node: fx.Node) -> None:
        if any(isinstance(layer, (Pool, Linear)) for layer in self._layers):
            self._refuse(node, "follows the global pool, where the engine supports linear layers only")

    def _flatten(self, node: fx.Node) -> None:
        if node.op == "call_module":
            axes = self._module(node).start_dim, self._module(node).end_dim
        else:
            given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
            axes = given.get("start_dim", 0), given.get("end_dim", -1)
        follows_pool = bool(self._layers) and isinstance(self._layers[-1], Pool)
        if axes not in ((1, -1), (1, 3)) or not follows_pool:
            self._refuse(node, "is not a flatten(1) right after a global average pool")
        self._flat = True

    def _linear(self, node: fx.Node) -> None:
        if not self._flat:
            self._refuse(node, "does not follow a global average pool and a flatten(1)")
        call = self._weighted_call(node)
        weight, bias = self._floats(node, call.weight), self._bias(node, call.weight, call.bias)
        self._layers.append(Linear(self._name(node), weight, bias))

    # Squeeze-and-excitation: x * sigmoid(conv(relu(conv(pool(x)))))

    def _gate(self, node: fx.Node, users: list[fx.Node]) -> fx.Node:
        """Read the gate that begins at ``node``, and return the multiplication that ends it."""
        first, product = sorted(users, key=lambda user: self._target(user) in MUL)
        if self._target(product) not in MUL or not self._layers or not self._is_global_pool(first):
            self._refuse(node, "has two users that do not form a squeeze-and-excitation gate")
        self._check_before_pool(first)
        down, relu, up, sigmoid = self._following(first, 4)
        if not (self._target(relu) in RELU and self._target(sigmoid) in SIGMOID and set(sigmoid.users) == {product}):
            self._refuse(
                down, "does not begin a squeeze-and-excitation gate of convolution, ReLU, convolution and sigmoid"
            )
        squeeze, excite = self._matrix(down), self._matrix(up)
        self._layers.append(Gate(squeeze.name, squeeze.weight, squeeze.bias, excite.weight, excite.bias))
        return product

    def _following(self, node: fx.Node, count: int) -> list[fx.Node]:
        """Return the next nodes, each of which is the only user of the one before."""
        nodes = [node]
        while len(nodes) <= count:
            if len(nodes[-1].users) != 1:
                self._refuse(nodes[-1], "has several users inside of a gate")
            nodes.append(next(iter(nodes[-1].users)))
        return nodes[1:]

    def _matrix(self, node: fx.Node) -> Linear:
        """Read a 1x1 convolution of a single pixel as a matrix."""
        conv = self._read_conv(node)
        if conv.geometry != ConvGeometry((1, 1)):
            self._refuse(node, "is not a 1x1 convolution without groups, as the engine expects in a gate")
        return Linear(conv.name, conv.weight[:, :, 0, 0], conv.bias)

    # Weights

    def _bias(self, node: fx.Node, weight: Any, bias: Any) -> Floats:
        return np.zeros(len(weight), np.float32) if bias is None and weight is not None else self._floats(node, bias)

    def _floats(self, node: fx.Node, tensor: Any) -> Floats:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            self._refuse(node, "has weights that are not float32 tensors on the CPU: call model.float().cpu() first")
        return np.array(tensor.detach().contiguous().numpy(), np.float32, order="C")  # a copy

    def _refuse(self, node: fx.Node, reason: str) -> NoReturn:
        target = self._target(node)
        what = target if isinstance(target, str) else target.__name__
        hint = " Fold batch norms first, with repvgg.reparameterize." if "BatchNorm" in what else ""
        subject = "The input" if node.op == "placeholder" else f"{self._name(node)!r} ({what})"
        raise UnsupportedError(f"{subject} {reason}.{hint}")


def _pair(value: Any) -> Pair:
    """Expand a number to both axes."""
    first, second = (value, value) if isinstance(value, int) else (*value, *value)[:2]
    return int(first), int(second)
