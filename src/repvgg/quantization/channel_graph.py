"""Which channels of a plain network can be rescaled without changing what it computes.

Dividing channel c of an activation by a positive number s, and multiplying the weights that read it by s, leaves a
network unchanged where everything between the weights that write the channel and those that read it is positively
homogeneous, ``f(x / s) = f(x) / s``: ReLU, pooling, resizing, sums of equally scaled channels.

:func:`trace_channels` captures the network with ``torch.export`` and follows *scale variables* through it: every output
channel of a convolution starts with a variable of its own, sums make the variables of their summands equal, and every
other operation fixes those that it reads to 1, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.fx import Node

from repvgg._contexts import eval_mode
from repvgg.errors import ExportError, first_line

_aten = torch.ops.aten

#: f(x/s) = f(x)/s for every s > 0, channel by channel.
_HOMOGENEOUS = {
    _aten.relu.default,
    _aten.relu_.default,
    _aten.leaky_relu.default,
    _aten.leaky_relu_.default,
    _aten.prelu.default,
    _aten.max_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_max_pool2d.default,
    _aten.mean.dim,
    _aten.amax.default,
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_nearest2d.vec,
    _aten.dropout.default,
    _aten.dropout_.default,
    _aten.feature_dropout.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.neg.default,
}
#: Those of them that read several pixels for each output, even if the size stays.
_READS_NEIGHBOURS = {
    _aten.max_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_max_pool2d.default,
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_nearest2d.vec,
}
#: Operations that only move elements: they are run on the tensor of variables itself.
_MOVES = {
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.slice.Tensor,
    _aten.chunk.default,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
    _aten.select.int,
    _aten.unbind.int,
    _aten.expand.default,
    _aten.cat.default,
    _aten.stack.default,
    _aten.pixel_shuffle.default,
    _aten.channel_shuffle.default,
}
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor}
_PRODUCTS = {_aten.mul.Tensor, _aten.mul_.Tensor}
_LAYERS: dict[Any, Literal["conv", "linear"]] = {
    _aten.conv2d.default: "conv",
    _aten.conv2d.padding: "conv",
    _aten.linear.default: "linear",
}

FIXED = 0  # the variable of everything that cannot be rescaled


@final
@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer of the network.

    Attributes:
        name: of the module that holds the weight; empty for the model itself.
        weight: name of the weight (O, I/groups, …) in the ``state_dict``.
        bias: name of the bias, if there is one.
        groups: 1 for a linear layer.
        inputs: (I,) scale variables of the input channels.
        outputs: (O,) scale variables of the output channels.
    """

    name: str
    kind: Literal["conv", "linear"]
    weight: str
    bias: str | None
    groups: int
    inputs: Tensor
    outputs: Tensor


@final
@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The layers of a network in the order of execution, and the scale variables that connect them.

    Attributes:
        layers: those whose weights are used once.
        num_variables: variables are numbered from 0; variable :data:`FIXED` is 1.
        reasons: why the output channels of a layer cannot be rescaled, by the name of its weight.
    """

    layers: tuple[Layer, ...]
    num_variables: int
    reasons: dict[str, str]


def trace_channels(model: nn.Module, images: Tensor) -> ChannelGraph:
    """Follow the channels of ``model`` on ``images`` (N, C, H, W) of its usual size.

    Raises:
        ExportError: ``torch.export`` cannot capture the model.
    """
    try:
        with eval_mode(model):
            program = torch.export.export(model, (images[:1].clone(),), strict=False)
    except Exception as error:
        raise ExportError(f"The network cannot be captured by torch.export: {first_line(error)}.") from error
    return _Tracer(program).run()


class _Variables:
    """Disjoint sets of scale variables."""

    def __init__(self) -> None:
        self._parents = [FIXED]
        self.reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def new(self, count: int) -> Tensor:
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, variable: int) -> int:
        while self._parents[variable] != variable:
            self._parents[variable] = self._parents[self._parents[variable]]
            variable = self._parents[variable]
        return variable

    def roots(self, variables: Tensor) -> Tensor:
        return torch.tensor([self.root(int(variable)) for variable in variables], dtype=torch.long)

    def unite(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Make the variables of two tensors of the same shape equal, element by element."""
        for axis in range(one.ndim):
            if one.stride(axis) == other.stride(axis) == 0:  # expanded over pixels: one of them suffices
                one, other = one.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
        pairs = torch.stack([one, other], -1).reshape(-1, 2)
        for first, second in set(map(tuple, pairs.tolist())):
            low, high = sorted((self.root(first), self.root(second)))
            if low != high:
                self._parents[high] = low  # FIXED is the lowest: it stays the root of its set
                if low == FIXED:
                    self.reasons.setdefault(high, reason)

    def why(self, variable: int) -> str | None:
        """Return the reason why a variable is fixed."""
        while variable != FIXED:
            if variable in self.reasons:
                return self.reasons[variable]
            if self._parents[variable] == variable:
                return None
            variable = self._parents[variable]
        return None


class _Tracer:
    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._graph = program.graph
        signature = program.graph_signature
        self._state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._constants = signature.inputs_to_lifted_tensor_constants
        self._variables = _Variables()
        self._values: dict[Node, Any] = {}  # of every activation: its variables, in the shape of the tensor
        self._layers: list[Layer] = []

    def run(self) -> ChannelGraph:
        for node in self._graph.nodes:
            if node.op == "placeholder":
                if node.name not in self._state and node.name not in self._constants:
                    self._values[node] = _fixed_like(node)
            elif node.op == "call_function":
                # What is computed from parameters alone is a constant, as they are.
                if any(one in self._values for one in node.all_input_nodes):
                    self._values[node] = self._call(node)
            elif node.op == "output":
                self._fix(node, "it is an output of the network")
        roots = self._variables.roots
        reasons = {layer.weight: reason for layer in self._layers if (reason := self._reason(layer)) is not None}
        layers = tuple(
            replace(layer, inputs=roots(layer.inputs), outputs=roots(layer.outputs)) for layer in self._layers
        )
        return ChannelGraph(layers, len(self._variables), reasons)

    def _reason(self, layer: Layer) -> str | None:
        """Return why output channels of ``layer`` are fixed, if all are."""
        if any(self._variables.root(int(variable)) != FIXED for variable in layer.outputs):
            return None
        return self._variables.why(int(layer.outputs[0])) or "its channels are added to fixed ones"

    def _call(self, node: Node) -> Any:
        target = node.target
        if target in _LAYERS:
            return self._layer(node, _LAYERS[target])
        if target in _HOMOGENEOUS and self._reads_one_activation(node):
            channels = self._same_channels(node)
            # Adaptive max pooling returns indices, too.
            return channels if isinstance(node.meta["val"], Tensor) else [channels, _fixed(channels.shape)]
        if target in _MOVES:
            return self._move(node)
        if target in _SUMS:
            return self._sum(node)
        if target in _PRODUCTS:
            return self._product(node)
        if str(target) == "<built-in function getitem>":
            source, index = _arguments(node)
            return self._values[source][index]
        self._fix(node, f"{_name(node)} is not positively homogeneous")
        return _fixed_like(node)

    def _layer(self, node: Node, kind: Literal["conv", "linear"]) -> Tensor:
        x, weight, bias, groups = _layer_arguments(node)
        shape = _shape(node)
        state = [one for one in (weight, bias) if isinstance(one, Node)]
        computed = any(one.name not in self._state or len(one.users) != 1 for one in state)
        channels = None if computed else self._input_channels(x, kind)
        if channels is None:
            what = "its weights are computed or shared" if computed else "it mixes pixels with channels"
            self._fix(node, f"it is read by {_name(node)}: {what}")
            return _fixed(shape)
        outputs = self._variables.new(weight.meta["val"].shape[0])
        name = self._state[weight.name]
        layer = Layer(
            name.rpartition(".")[0],
            kind,
            name,
            self._state[bias.name] if isinstance(bias, Node) else None,
            groups,
            channels,
            outputs,
        )
        self._layers.append(layer)
        return (outputs.reshape(1, -1, 1, 1) if kind == "conv" else outputs).expand(shape)

    def _input_channels(self, x: Node, kind: Literal["conv", "linear"]) -> Tensor | None:
        """Return the variables of the channels of ``x``, or ``None`` where a channel has several."""
        variables: Tensor = self._values[x]
        variables = variables.movedim(1 if kind == "conv" else -1, 0).flatten(1)
        return None if (variables != variables[:, :1]).any() else variables[:, 0].clone()

    def _reads_one_activation(self, node: Node) -> bool:
        return sum(one in self._values for one in node.all_input_nodes) == 1

    def _same_channels(self, node: Node) -> Tensor:
        """Return the variables of an operation that works on each channel by itself."""
        arguments = _arguments(node)
        x: Tensor = self._values[arguments[0]]
        shape = _shape(node)
        if x.shape == shape and node.target not in _READS_NEIGHBOURS:
            return x
        if node.target in (_aten.mean.dim, _aten.amax.default):
            axes = arguments[1] if len(arguments) > 1 else list(range(x.ndim))
            return self._reduced(node, x, axes, shape)
        channels = x.movedim(1, 0).flatten(1)
        if (channels != channels[:, :1]).any():
            return self._not_per_channel(node)
        return channels[:, 0].reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def _reduced(self, node: Node, x: Tensor, axes: list[int], shape: torch.Size) -> Tensor:
        first = x
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        if (x != first).any():
            return self._not_per_channel(node)
        return first.reshape(shape)

    def _not_per_channel(self, node: Node) -> Tensor:
        self._fix(node, f"{_name(node)} mixes channels of different scales")
        return _fixed(_shape(node))

    def _move(self, node: Node) -> Any:
        # Sizes are those of a batch of one image, as in the graph.
        arguments: Any = torch.fx.node.map_arg(node.args, lambda one: self._values.get(one))
        if any(one not in self._values for one in node.all_input_nodes):  # a constant among activations
            self._fix(node, "it is joined with a constant")
            return _fixed_like(node)
        target: Any = node.target
        if target is _aten.view.default:
            target = _aten.reshape.default  # variables are expanded, so that a view of them may not exist
        return target(*arguments, **node.kwargs)

    def _sum(self, node: Node) -> Tensor:
        first, second = _arguments(node)[:2]
        if first not in self._values:  # a parameter plus an activation
            first, second = second, first
        ours: Tensor = self._values[first]
        if isinstance(second, Node) and second in self._values:
            theirs: Tensor = self._values[second]
            shape = _shape(node)
            ours, theirs = ours.expand(shape), theirs.expand(shape)
            self._variables.unite(ours, theirs, "it is added to something that cannot be rescaled")
            return ours
        if isinstance(second, int | float) and second == 0:
            return ours
        self._fix(node, "a constant is added to it")
        return _fixed(_shape(node))

    def _product(self, node: Node) -> Tensor:
        first, second = _arguments(node)[:2]
        activations = [one for one in (first, second) if isinstance(one, Node) and one in self._values]
        shape = _shape(node)
        if len(activations) == 1:  # times a number or a constant tensor
            factor: Tensor = self._values[activations[0]]
            return factor.expand(shape)
        # One factor carries the scale, the other one, a gate, is fixed: the one that is fixed already if there is one.
        carrier, gate = activations
        if self._is_fixed(carrier):
            carrier, gate = gate, carrier
        self._fix_value(gate, "it multiplies another activation")
        carried: Tensor = self._values[carrier]
        return carried.expand(shape)

    def _is_fixed(self, node: Node) -> bool:
        values: Tensor = self._values[node]
        return all(self._variables.root(variable) == FIXED for variable in set(values.flatten().tolist()))

    def _fix(self, node: Node, reason: str) -> None:
        for one in node.all_input_nodes:
            if one in self._values:
                self._fix_value(one, reason)

    def _fix_value(self, node: Node, reason: str) -> None:
        values = self._values[node]
        for value in values if isinstance(values, tuple | list) else (values,):
            self._variables.unite(value, torch.tensor(FIXED).expand(value.shape), reason)


def _fixed_like(node: Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, tuple | list):
        return [_fixed(one.shape) for one in value]
    return _fixed(value.shape) if isinstance(value, Tensor) else value


def _shape(node: Node) -> torch.Size:
    """Return the shape of the result, or of the first one of several."""
    value = node.meta["val"]
    shape: torch.Size = (value if isinstance(value, Tensor) else value[0]).shape
    return shape


def _fixed(shape: torch.Size) -> Tensor:
    return torch.tensor(FIXED).expand(shape)


def _arguments(node: Node) -> tuple[Any, ...]:
    return node.args


def _layer_arguments(node: Node) -> tuple[Node, Any, Any, int]:
    """Return input, weight, bias and groups of a convolution or linear layer."""
    names: list[str] = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, _arguments(node), strict=False)) | dict(node.kwargs)
    return given["input"], given["weight"], given.get("bias"), given.get("groups", 1)


def _name(node: Node) -> str:
    target: Callable[..., Any] | str = node.target
    return str(getattr(target, "__name__", target)).partition(".")[0]
