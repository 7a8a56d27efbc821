"""Running single nodes of a flat graph: on symbols, on tensors, or on tensors without values."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.algebra import ConvMap
from repvgg.collapse.alias import Memory
from repvgg.collapse.cost import Cost
from repvgg.collapse.inline import Flat
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import Layout, Source, SymbolicTensor, channels_of, guarded, shadow_of, unchanged_by_call
from repvgg.symbolic.probe import ChannelProbe, ChannelsFound


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


_RANKS = {nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5}


def transposed_at(flat: Flat, node: fx.Node) -> _ConvTransposeNd | None:
    """The transposed convolution that a node calls, if it runs torch's own forward."""
    module = flat.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    own = isinstance(module, _ConvTransposeNd) and type(module) in _RANKS and "forward" not in vars(module)
    return module if own else None  # type: ignore[return-value]


def told_by_transposed(flat: Flat, node: fx.Node) -> tuple[int, Layout] | None:
    """Channels and layout of the tensor of a node that a transposed convolution puts out or takes, else None."""
    makes = transposed_at(flat, node)
    if makes is not None:
        return makes.out_channels, Layout(_RANKS[type(makes)])
    takes = next((found for user in node.users if (found := transposed_at(flat, user)) is not None), None)
    return None if takes is None else (takes.in_channels, Layout(_RANKS[type(takes)]))


def is_scaling(conv: ConvMap) -> bool:
    """Whether a map scales and shifts each channel and does nothing else."""
    return conv.is_depthwise and conv.is_pointwise


Expected: TypeAlias = tuple[int, Layout]
Linear: TypeAlias = "Callable[[str], LinearModule | None]"
Shapes: TypeAlias = Mapping[fx.Node, Sequence[int]]


@dataclass(frozen=True, eq=False)
class LinearModule:
    """A module that is one convolution as a whole; ``conv`` has geometry and no values."""

    conv: ConvMap
    operations: tuple[str, ...]
    cost: Cost
    layout: Layout

    @property
    def is_worth_it(self) -> bool:
        """Whether it is a convolution and at least one more thing."""
        return "conv" in self.operations and sum(operation != "identity" for operation in self.operations) >= 2


@dataclass(frozen=True, eq=False)
class Step:
    """A node inside a linear region: what it did, and what that costs."""

    node: fx.Node
    operations: tuple[str, ...]
    cost: Cost

    @property
    def effective(self) -> bool:
        """Whether it did more than hand a tensor on."""
        return any(operation != "identity" for operation in self.operations)


@dataclass(frozen=True, eq=False)
class Value:
    """A node as a function of an earlier one.

    Attributes:
        source: the node that it is a function of.
        symbol: the function; without values, on the meta device.
        steps: the nodes in between, itself included, in the order of execution; none for the source itself.
    """

    source: fx.Node
    symbol: SymbolicTensor
    steps: tuple[Step, ...] = ()

    @property
    def cost(self) -> Cost:
        """What all steps cost."""
        return sum((step.cost for step in self.steps), Cost())


class Values:
    """The values of all nodes of a graph that are linear functions of another one, found in one pass over it.

    Attributes:
        of: the values.
        place: where each node stands in the order of execution.
        left: nodes that must stay as they are.
        reasons: why a node has none, or why it is not a function of what its own arguments are functions of.
    """

    def __init__(
        self,
        flat: Flat,
        memory: Memory,
        opaque: Mapping[str, str],
        cuts: Collection[fx.Node],
        merge: bool,
        shapes: Shapes,
        linear: Linear = lambda _: None,
        at_these_sizes: bool = False,
    ) -> None:
        self._linear = linear
        self._at_these_sizes = at_these_sizes
        self.of: dict[fx.Node, Value] = {}
        self.reasons = {node: opaque[target] for node, target in flat.calls() if target in opaque}
        self.reasons |= dict.fromkeys(memory.unsafe, "it changes a tensor in place that is read again")
        self.left = frozenset(self.reasons)
        self._flat = flat
        self._evaluator = Evaluator(flat, to_meta)
        self._nodes = list(flat.graph.nodes)
        self.place = {node: place for place, node in enumerate(self._nodes)}
        self._memory, self._cuts, self._merge, self._shapes = memory, cuts, merge, shapes
        self._constants: dict[fx.Node, Any] = {}
        self._starts: dict[fx.Node, Value] = {}
        for node in self._nodes:
            self._visit(node)

    def inputs(self) -> list[Expected | None]:
        """What each input of the graph is expected to be, None where nothing tells."""
        return [self.expected(node) for node in self._nodes if node.op == "placeholder"]

    def expected(self, node: fx.Node) -> Expected | None:
        """The channels and the layout of the tensor of a node, None where nothing tells."""
        try:
            symbol = self._start(node).symbol
        except ReparamError:
            return None
        return symbol.map.out_channels, symbol.layout

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr" and node not in self._memory.torn:
            self._constants[node] = self._evaluator.constant(node)
        if not node.op.startswith("call") or node in self.left:
            return
        if all(argument in self._constants for argument in node.all_input_nodes):
            self._try(node, self._fold_constant)
        elif not self._try(node, self._continue) and any(n in self.of for n in node.all_input_nodes):
            self._try(node, self._branch) or self._try(node, self._restart)

    def _try(self, node: fx.Node, attempt: Callable[[fx.Node], None]) -> bool:
        try:
            attempt(node)
        except ReparamError as error:
            self.reasons.setdefault(node, str(error))
            return False
        return True

    def _fold_constant(self, node: fx.Node) -> None:
        self._constants[node] = self._evaluator.run(node, self._constants.__getitem__)

    def _continue(self, node: fx.Node) -> None:
        """Go on with the region that the arguments are in."""
        self._record(node, lambda n: self.of[n] if n in self.of and n not in self._cuts else self._start(n))

    def _branch(self, node: fx.Node) -> None:
        """Take one argument for the source that the others are functions of, as in ``y + conv(y)``."""
        inputs = [n for n in node.all_input_nodes if n not in self._constants]
        sources = {self.of[n].source for n in inputs if n in self.of and n not in self._cuts}
        source = next((n for n in inputs if n in sources), None)
        if source is None:
            raise NotLinearError("none of its arguments is a function of another one")
        self._record(node, lambda n: self.of[n] if n in self.of and n is not source else self._start(n))

    def _restart(self, node: fx.Node) -> None:
        """Start a new region at the arguments."""
        self._record(node, self._start)

    def _record(self, node: fx.Node, value_of: Callable[[fx.Node], Value]) -> None:
        inputs = {n: value_of(n) for n in node.all_input_nodes if n not in self._constants}
        first = next(iter(inputs.values()))
        ledger = first.symbol.source
        count, before = len(ledger.operations), Cost.of_ledger(ledger)
        symbols = {n: value.symbol.copy() for n, value in inputs.items()}  # a function in place changes its own
        outcome = self._at_once(node, list(symbols.values()))
        if outcome is None:
            outcome = self._evaluator.run(node, lambda n: symbols[n] if n in symbols else self._constants[n])
        if not isinstance(outcome, SymbolicTensor):
            raise NotLinearError("its outcome is not one tensor")
        step = Step(node, tuple(ledger.operations[count:]), Cost.of_ledger(ledger) - before)
        earlier = {step.node: step for value in inputs.values() for step in value.steps}
        self.of[node] = Value(first.source, outcome, (*earlier.values(), step))

    def _at_once(self, node: fx.Node, symbols: Sequence[SymbolicTensor]) -> SymbolicTensor | None:
        """The outcome of a module that was evaluated before, as a whole, on the same input; None of all others."""
        found = self._linear(str(node.target)) if node.op == "call_module" and len(node.args) == 1 else None
        if found is None or len(symbols) != 1 or not symbols[0].is_source or node.args[0] not in node.all_input_nodes:
            return None
        symbol = symbols[0]
        if (found.conv.in_channels, found.layout) != (symbol.map.in_channels, symbol.layout) or symbol.source.sizes:
            return None
        symbol.source.add(found.operations, found.cost.multiply_adds, found.cost.weights)
        return SymbolicTensor(symbol.source, found.conv, found.layout)

    def _start(self, node: fx.Node) -> Value:
        """The node as the source of a region."""
        if node not in self._starts:
            source = Source(self._merge)
            channels, layout = self._channels(node)
            symbol = SymbolicTensor.of(source, channels, device="meta", layout=layout)
            if self._at_these_sizes and node in self._shapes and not layout.rows:
                source.sizes = tuple(self._shapes[node][2:])
            self._starts[node] = Value(node, symbol)
        return self._starts[node]

    def _channels(self, node: fx.Node) -> Expected:
        """The channels and the layout of a node's tensor, as the functions that read it expect them."""
        if node in self.of:
            symbol = self.of[node].symbol
            return symbol.map.out_channels, symbol.layout
        told = told_by_transposed(self._flat, node)
        if told is not None:
            return told
        error: ReparamError | None = None
        for layout in self._layouts(node):
            try:
                return channels_of(lambda probe: self._spread(node, probe), certain=True, layout=layout)
            except ReparamError as refusal:
                error = error or refusal
        raise error or NotLinearError("it is a number")

    def _layouts(self, node: fx.Node) -> Iterator[Layout | None]:
        """What the tensor of a node may be; None where its shape is not known."""
        shape = self._shapes.get(node)
        if shape is None:
            yield None
            return
        if 3 <= len(shape) <= 5:
            yield Layout(len(shape))
        if shape:
            yield Layout(len(shape), rows=True)

    def _spread(self, start: fx.Node, probe: ChannelProbe) -> None:
        """Run the nodes that the probe reaches, in order, until one of them tells."""
        known: dict[fx.Node, Any] = {start: probe}
        errors: list[ReparamError] = []
        waiting = [(self.place[user], user) for user in start.users]
        heapq.heapify(waiting)
        seen: set[fx.Node] = set()
        while waiting:
            _, node = heapq.heappop(waiting)
            if node in seen or node in self.left or node.op == "output":
                continue
            seen.add(node)
            try:
                known[node] = self._evaluator.run(node, lambda n: known[n] if n in known else self._constants[n])
            except ChannelsFound:
                raise
            except ReparamError as error:
                errors.append(error)
            except KeyError:
                continue
            if known.get(node) is probe:
                for user in node.users:
                    heapq.heappush(waiting, (self.place[user], user))
        if errors:
            raise errors[0]


_GUESS = (224, 224, 32)  # height, width and depth


def depends_on_ranks(module: nn.Module) -> bool:
    """Whether there is a batch norm in ``module`` that takes tensors of more than one rank."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, nn.BatchNorm2d) for part in module.modules())


def made_up(expected: Sequence[Expected | None]) -> tuple[Tensor, ...] | None:
    """Tensors, without values, such as are expected; None where that is not known of one."""
    if not expected or any(one is None or one[1].rank is None for one in expected):
        return None
    return tuple(torch.empty(2, *_shape(*one), device="meta") for one in expected if one is not None)


def _shape(channels: int, layout: Layout) -> tuple[int, ...]:
    sizes = _GUESS[: (layout.rank or 2) - 2]
    return (*sizes, channels) if layout.rows else (channels, *sizes)


def run_on_meta(flat: Flat, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """The outcome of every node on ``inputs``, tensors without values; nodes that do not run on these have none."""
    evaluator = Evaluator(flat, to_meta, keep_kernels=False, strict=False)
    given = iter(inputs)
    known: dict[fx.Node, Any] = {}
    for node in flat.graph.nodes:
        try:
            if node.op == "placeholder":
                value = next(given)
                known[node] = to_meta(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            elif node.op == "get_attr":
                known[node] = evaluator.constant(node)
            elif node.op != "output":
                known[node] = evaluator.run(node, known.__getitem__)
        except Exception:  # a stranger's code, without values to work on
            continue
    return known


def shapes_of(known: Mapping[fx.Node, Any]) -> Shapes:
    """The shapes of those that are tensors."""
    return {node: tuple(value.shape) for node, value in known.items() if isinstance(value, Tensor)}
