"""From a plain ``nn.Module`` to the chain of layers that the engine knows, or a sentence that names what it is not.

The model's own ``forward`` is traced by torch.fx in eval mode; nothing is compiled and nothing is run.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NoReturn, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from repvgg.engine.layers import Conv, ConvGeometry, Floats, Gate, Layer, Linear, Pair, Pool
from repvgg.errors import UnsupportedError, typed_line
from repvgg.modes import eval_mode

_RELU: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
_SIGMOID: tuple[Any, ...] = (nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid")
_MUL: tuple[Any, ...] = (operator.mul, torch.mul, "mul")
_SAME: tuple[Any, ...] = (nn.Identity, nn.Dropout, nn.Dropout2d)
_FLATTEN: tuple[Any, ...] = (nn.Flatten, torch.flatten, "flatten")
_POOL: tuple[Any, ...] = (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)
_MEAN: tuple[Any, ...] = (torch.mean, "mean")


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
    return _Reading(_trace(model), dict(model.named_modules())).layers()


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

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._layers: list[Layer] = []
        self._flat = False  # whether there are two axes left

    def layers(self) -> list[Layer]:
        if len(self._inputs) != 1:
            raise UnsupportedError(f"The engine takes networks of one input, not of {len(self._inputs)}.")
        node = self._inputs[0]
        while (node := self._next(node)).op != "output":
            self._read(node)
        if node.args != (node.all_input_nodes[0],):
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
        if kind in _MUL and isinstance(self._layers[-1], Gate):
            return
        for kinds, take in self._takers():
            if kind in kinds:
                take(node)
                return
        self._refuse(node, "is none of the layers that the engine knows")

    def _takers(self) -> Iterable[tuple[tuple[Any, ...], Callable[[fx.Node], None]]]:
        return (
            ((nn.Conv2d,), self._conv),
            (_RELU, self._relu),
            (_SAME, lambda node: None),
            ((*_POOL, *_MEAN), self._pool),
            (_FLATTEN, self._flatten),
            ((nn.Linear,), self._linear),
        )

    def _kind(self, node: fx.Node) -> Any:
        """What a node does: the very type of a module, a function, or the name of a method."""
        return type(self._modules[str(node.target)]) if node.op == "call_module" else node.target

    def _conv(self, node: fx.Node) -> None:
        self._before_pool(node)
        self._layers.append(self._conv_of(node))

    def _conv_of(self, node: fx.Node) -> Conv:
        module = self._modules[str(node.target)]
        if type(module) is not nn.Conv2d:
            self._refuse(node, "stands where a convolution is expected")
        if module.padding_mode != "zeros":
            self._refuse(node, f"pads with {module.padding_mode!r}, and the engine pads with zeros alone")
        kernel, stride, dilation = (_pair(value) for value in (module.kernel_size, module.stride, module.dilation))
        padding = self._padding(node, module, kernel, dilation)
        geometry = ConvGeometry(kernel, stride, padding, dilation, module.groups)
        return Conv(str(node.target), self._floats(node, module.weight), self._bias(node, module), geometry)

    def _padding(self, node: fx.Node, module: nn.Conv2d, kernel: Pair, dilation: Pair) -> Pair:
        if module.padding == "valid":
            return 0, 0
        if not isinstance(module.padding, str):
            return _pair(module.padding)
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
        if not self._is_pool(node):
            self._refuse(node, "is no mean over all pixels of a channel")
        self._layers.append(Pool(self._name(node)))
        self._flat = self._kind(node) in _MEAN and not node.kwargs.get("keepdim", (*node.args, False)[2:3] == (True,))

    def _before_pool(self, node: fx.Node) -> None:
        if any(isinstance(layer, (Pool, Linear)) for layer in self._layers):
            self._refuse(node, "comes behind the pool, where the engine takes linear layers alone")

    def _is_pool(self, node: fx.Node) -> bool:
        """Whether a node takes the mean over height and width."""
        kind = self._kind(node)
        if kind is nn.AdaptiveAvgPool2d:
            return _pair(self._modules[str(node.target)].output_size) == (1, 1)
        values = [*node.args[1:], *(value for name, value in node.kwargs.items() if name != "keepdim")]
        if kind is F.adaptive_avg_pool2d:
            return len(values) == 1 and _pair(values[0]) == (1, 1)
        axes = values[0] if values and kind in _MEAN else None
        return isinstance(axes, (tuple, list)) and sorted(axis % 4 for axis in axes) == [2, 3]

    def _flatten(self, node: fx.Node) -> None:
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, nn.Flatten):
            axes: tuple[Any, Any] = (module.start_dim, module.end_dim)
        else:
            given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
            axes = (given.get("start_dim", 0), given.get("end_dim", -1))
        if axes not in ((1, -1), (1, 3)) or not self._layers or not isinstance(self._layers[-1], Pool):
            self._refuse(node, "is no flatten(1) behind a global average pool")
        self._flat = True

    def _linear(self, node: fx.Node) -> None:
        if not self._flat:
            self._refuse(node, "does not stand behind a global average pool and a flatten(1)")
        module = self._modules[str(node.target)]
        self._layers.append(Linear(str(node.target), self._floats(node, module.weight), self._bias(node, module)))

    def _gate(self, node: fx.Node, users: list[fx.Node]) -> fx.Node:
        """The product that ends a gate which begins at ``node``."""
        first, product = sorted(users, key=lambda user: self._kind(user) in _MUL)
        if self._kind(product) not in _MUL or not self._layers or not self._is_pool(first):
            self._refuse(node, "goes two ways, and not as a squeeze-excite gate does")
        self._before_pool(first)
        down, relu, up, sigmoid = self._chain(first, 4)
        fits = self._kind(relu) in _RELU and self._kind(sigmoid) in _SIGMOID and set(sigmoid.users) == {product}
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

    def _bias(self, node: fx.Node, module: nn.Module) -> Floats:
        bias, weight = module._parameters["bias"], module._parameters["weight"]
        return np.zeros(len(weight), np.float32) if bias is None and weight is not None else self._floats(node, bias)

    def _floats(self, node: fx.Node, tensor: Any) -> Floats:
        """A copy of the numbers of a tensor."""
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            self._refuse(node, "has weights that are not float32 on the CPU: convert the model with .float().cpu()")
        return np.array(tensor.detach().contiguous().numpy(), np.float32, order="C")

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _refuse(self, node: fx.Node, why: str) -> NoReturn:
        kind = self._kind(node)
        what = kind if isinstance(kind, str) else kind.__name__
        more = " Fold batch norms first, with repvgg.reparameterize." if "BatchNorm" in what else ""
        raise UnsupportedError(f"{self._name(node)!r} ({what}) {why}.{more}")


def _pair(value: Any) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)
