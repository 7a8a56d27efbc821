"""Evaluate the nodes of an inlined graph: on symbols, on real tensors, or on meta tensors for their shapes.

:class:`SymbolicValues` is the core of the collapse. It assigns to every node the earlier node that it is a linear
function of, and that function; a maximal linear region is then a node whose users are not part of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.algebra import ConvMap
from repvgg.collapse.cost import Cost
from repvgg.collapse.inline import AliasAnalysis, InlinedGraph
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import (
    InputSpec,
    Layout,
    Source,
    SymbolicTensor,
    channels_of,
    guarded,
    shadow_of,
    unchanged_by_call,
)
from repvgg.symbolic.probe import ChannelProbe, ChannelsFound

Shapes: TypeAlias = Mapping[fx.Node, Sequence[int]]
KnownMaps: TypeAlias = "Callable[[str], ModuleMap | None]"

_ASSUMED_SIZES = (224, 224, 32)  # height, width and depth of synthetic inputs; large enough for any network's strides
_TRANSPOSED_RANKS = {nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5}


@dataclass(frozen=True, eq=False)
class ModuleMap:
    """The convolution that a module as a whole is equal to; ``conv`` has geometry and no values.

    Attributes:
        conv: the convolution.
        operations: names of the operations in the module.
        cost: what they cost.
        layout: that of the input.
    """

    conv: ConvMap
    operations: tuple[str, ...]
    cost: Cost
    layout: Layout

    @property
    def is_mergeable(self) -> bool:
        """Whether it consists of a convolution and at least one more operation."""
        return "conv" in self.operations and sum(operation != "identity" for operation in self.operations) >= 2


@dataclass(frozen=True, eq=False)
class Step:
    """A node inside a linear region: the operations that it performs, and their cost."""

    node: fx.Node
    operations: tuple[str, ...]
    cost: Cost

    @property
    def computes(self) -> bool:
        """Whether it does more than pass a tensor on."""
        return any(operation != "identity" for operation in self.operations)


@dataclass(frozen=True, eq=False)
class Value:
    """A node as a linear function of an earlier one.

    Attributes:
        source: the node that it is a function of.
        symbol: the function; on the meta device, without values.
        steps: the nodes in between, itself included, in execution order; empty for the source itself.
    """

    source: fx.Node
    symbol: SymbolicTensor
    steps: tuple[Step, ...] = ()

    @property
    def cost(self) -> Cost:
        """The total cost of all steps."""
        return sum((step.cost for step in self.steps), Cost())


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """Nodes of an inlined graph that are one convolution of ``source``; only the last, ``exit``, is used outside."""

    inlined: InlinedGraph
    exit: fx.Node
    value: Value

    @property
    def source(self) -> fx.Node:
        """The node whose tensor the region reads."""
        return self.value.source

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes, in execution order."""
        return self.value.steps

    @property
    def span(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The source, and the first and last node of the region."""
        return self.source, self.steps[0].node, self.exit

    @property
    def called_modules(self) -> list[str]:
        """Paths of the submodules that the region calls."""
        return [str(step.node.target) for step in self.steps if step.node.op == "call_module"]

    @property
    def is_chain(self) -> bool:
        """Whether each node is a function of the previous one, and of constants: there are no branches.

        Nodes that only pass a tensor on stay in the graph, and may read the shape of other nodes.
        """
        # Constants are inputs of nodes as well, but not inside the region.
        inside = {self.source, *(step.node for step in self.steps)}
        previous = self.source
        for step in self.steps:
            inputs = [n for n in step.node.all_input_nodes if n in inside]
            if inputs != [previous] and (step.computes or inputs[:1] != [previous]):
                return False
            previous = step.node
        return True

    @property
    def first_convolution(self) -> fx.Node:
        """The node that the merged convolution of a chain replaces: its first convolution.

        If no step is a convolution, the source is one: a transposed convolution that the chain scales.
        """
        return next((step.node for step in self.steps if "conv" in step.operations), self.source)


class Evaluator:
    """Evaluate nodes of an inlined graph, with all parameters and buffers passed through ``convert``.

    Args:
        inlined: the graph.
        convert: from a tensor to the tensor to compute with.
        keep_kernels: leave kernels of convolutions and linear layers unconverted; the algebra converts them later.
        strict: raise on modules that change their own state when they are called.
    """

    def __init__(
        self, inlined: InlinedGraph, convert: Callable[[Tensor], Tensor], keep_kernels: bool = True, strict: bool = True
    ) -> None:
        self.call = unchanged_by_call if strict else guarded
        self.inlined = inlined
        self.convert = convert
        self.keep_kernels = keep_kernels
        self._shadows: dict[str, nn.Module] = {}  # converting all weights of a module once per call would dominate

    def run(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Return the result of ``node`` for the values of its arguments; raise ReparamError if it is not linear."""
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        if node.op == "call_module":
            return self.call(self._shadow(str(node.target)), *args, **kwargs)
        if node.op == "call_method":
            return guarded(getattr(args[0], str(node.target)), *args[1:], **kwargs)
        return guarded(node.target, *args, **kwargs)

    def run_region(self, source: fx.Node, value: Any, nodes: Sequence[fx.Node]) -> Any:
        """Return the last of ``nodes``, a linear region in execution order, for ``source`` = ``value``."""
        values: dict[fx.Node, Any] = {source: value}

        def value_of(node: fx.Node) -> Any:
            if node not in values:  # a constant, or computed from constants
                values[node] = self.constant(node) if node.op == "get_attr" else self.run(node, value_of)
            return values[node]

        for node in nodes:
            value_of(node)
        return values[nodes[-1]]

    def constant(self, node: fx.Node) -> Any:
        """Return the parameter, buffer or attribute that ``node`` names."""
        value = get_attribute(*self.inlined.constants[node])
        return self.convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _shadow(self, path: str) -> nn.Module:
        if path not in self._shadows:
            part = self.inlined.module.get_submodule(path)
            self._shadows[path] = shadow_of(part, self.convert, keep_kernels=self.keep_kernels, training=False)
        return self._shadows[path]


def to_meta(tensor: Tensor) -> Tensor:
    """Return a float64 meta tensor of the same shape: enough for geometry and costs."""
    return torch.empty(tensor.shape, dtype=torch.float64, device="meta")


def get_attribute(root: nn.Module, path: str) -> Any:
    """Resolve a dotted ``path`` below ``root``."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class EvaluationOptions:
    """What is known about a graph before it is evaluated, and what may merge.

    Attributes:
        opaque: paths of submodules that must stay, below the scope, with the reason.
        merge_branches: whether branches may merge, or only chains.
        shapes: shapes of tensors, as far as they are known.
        known_maps: the convolution that the submodule at a path is equal to, if it was computed before.
        fixed_sizes: whether costs are those at ``shapes``, borders included.
    """

    opaque: Mapping[str, str]
    merge_branches: bool
    shapes: Shapes = field(default_factory=dict)
    known_maps: KnownMaps = lambda _: None
    fixed_sizes: bool = False


class SymbolicValues:
    """All nodes of a graph that are linear functions of another node, computed in one pass over it.

    Args:
        inlined: the graph.
        aliasing: which nodes share memory.
        options: see :class:`EvaluationOptions`.
        cuts: nodes at which regions must start.

    Attributes:
        by_node: the values.
        order: the position of each node in execution order.
        fixed: nodes that must stay.
        reasons: why a node has no value, or why it starts a new region instead of continuing that of its arguments.
    """

    def __init__(
        self, inlined: InlinedGraph, aliasing: AliasAnalysis, options: EvaluationOptions, cuts: Collection[fx.Node] = ()
    ) -> None:
        self.by_node: dict[fx.Node, Value] = {}
        opaque = options.opaque
        self.reasons = {node: opaque[target] for node, target in inlined.calls() if target in opaque}
        self.reasons |= dict.fromkeys(aliasing.unsafe_writes, "it modifies in place a tensor that is read again")
        self.fixed = frozenset(self.reasons)
        self._inlined, self._aliasing, self._options, self._cuts = inlined, aliasing, options, cuts
        self._evaluator = Evaluator(inlined, to_meta)
        self._nodes = list(inlined.graph.nodes)
        self.order = {node: position for position, node in enumerate(self._nodes)}
        self._constants: dict[fx.Node, Any] = {}
        self._starts: dict[fx.Node, Value] = {}
        for node in self._nodes:
            self._visit(node)

    def input_specs(self) -> list[InputSpec | None]:
        """Return what each input of the graph is expected to be, None where the graph does not determine it."""
        return [self.spec(node) for node in self._nodes if node.op == "placeholder"]

    def spec(self, node: fx.Node) -> InputSpec | None:
        """Return channels and layout of a node's tensor, None where the graph does not determine them."""
        try:
            symbol = self._start(node).symbol
        except ReparamError:
            return None
        return InputSpec(symbol.map.out_channels, symbol.layout)

    def _visit(self, node: fx.Node) -> None:
        # A clobbered tensor is no constant: a write changes it while the graph runs.
        if node.op == "get_attr" and node not in self._aliasing.clobbered:
            self._constants[node] = self._evaluator.constant(node)
        if not node.op.startswith("call") or node in self.fixed:
            return
        if all(argument in self._constants for argument in node.all_input_nodes):
            self._try(node, self._fold_constant)
        # In this order: from the longest region to the shortest.
        elif not self._try(node, self._continue) and any(n in self.by_node for n in node.all_input_nodes):
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
        """Extend the region that the arguments belong to."""
        self._record(node, lambda n: self.by_node[n] if n in self.by_node and n not in self._cuts else self._start(n))

    def _branch(self, node: fx.Node) -> None:
        """Use one argument as the source that the others are functions of, as in ``y + conv(y)``."""
        inputs = [n for n in node.all_input_nodes if n not in self._constants]
        sources = {self.by_node[n].source for n in inputs if n in self.by_node and n not in self._cuts}
        source = next((n for n in inputs if n in sources), None)
        if source is None:
            raise NotLinearError("none of its arguments is a function of another one")
        self._record(node, lambda n: self.by_node[n] if n in self.by_node and n is not source else self._start(n))

    def _restart(self, node: fx.Node) -> None:
        """Start a new region at the arguments."""
        self._record(node, self._start)

    def _record(self, node: fx.Node, value_of: Callable[[fx.Node], Value]) -> None:
        inputs = {n: value_of(n) for n in node.all_input_nodes if n not in self._constants}
        # All inputs share one source, or evaluation raises; its ledger records what this node costs.
        first = next(iter(inputs.values()))
        ledger = first.symbol.source
        count, before = len(ledger.operations), Cost.of_ledger(ledger)
        symbols = {n: value.symbol.copy() for n, value in inputs.items()}  # an in-place function changes its argument
        result = self._reuse_known_map(node, list(symbols.values()))
        if result is None:
            result = self._evaluator.run(node, lambda n: symbols[n] if n in symbols else self._constants[n])
        if not isinstance(result, SymbolicTensor):
            raise NotLinearError("its output is not one tensor")
        step = Step(node, tuple(ledger.operations[count:]), Cost.of_ledger(ledger) - before)
        # A dictionary, because branches share their first steps.
        earlier = {step.node: step for value in inputs.values() for step in value.steps}
        self.by_node[node] = Value(first.source, result, (*earlier.values(), step))

    def _reuse_known_map(self, node: fx.Node, symbols: Sequence[SymbolicTensor]) -> SymbolicTensor | None:
        """Return the output of a module whose map is cached for the same channels and layout, else None."""
        has_one_argument = node.op == "call_module" and len(node.args) == 1
        known = self._options.known_maps(str(node.target)) if has_one_argument else None
        if known is None or len(symbols) != 1 or not symbols[0].is_source or node.args[0] not in node.all_input_nodes:
            return None
        symbol = symbols[0]
        # Costs in the cache are without borders; with known sizes they must be computed again.
        if (known.conv.in_channels, known.layout) != (symbol.map.in_channels, symbol.layout) or symbol.source.sizes:
            return None
        symbol.source.add(known.operations, known.cost.multiply_adds, known.cost.weights)
        return SymbolicTensor(symbol.source, known.conv, known.layout)

    def _start(self, node: fx.Node) -> Value:
        """Return the node as the source of a region."""
        if node not in self._starts:
            source = Source(self._options.merge_branches)
            channels, layout = self._find_spec(node)
            symbol = SymbolicTensor.of(source, channels, device="meta", layout=layout)
            # Rows have no borders, so their cost per row is exact without sizes.
            if self._options.fixed_sizes and node in self._options.shapes and not layout.rows:
                source.sizes = tuple(self._options.shapes[node][2:])
            self._starts[node] = Value(node, symbol)
        return self._starts[node]

    def _find_spec(self, node: fx.Node) -> InputSpec:
        """Infer channels and layout of a node's tensor from the functions that read it."""
        if node in self.by_node:
            symbol = self.by_node[node].symbol
            return InputSpec(symbol.map.out_channels, symbol.layout)
        known = _spec_from_transposed(self._inlined, node)
        if known is not None:
            return known
        first_error: ReparamError | None = None
        for layout in self._possible_layouts(node):
            try:
                return channels_of(lambda probe: self._run_probe(node, probe), certain=True, layout=layout)
            except ReparamError as error:
                first_error = first_error or error
        raise first_error or NotLinearError("it is a number")

    def _possible_layouts(self, node: fx.Node) -> Iterator[Layout | None]:
        """Yield the layouts that fit the shape of a node; None if the shape is not known."""
        shape = self._options.shapes.get(node)
        if shape is None:
            yield None
            return
        # Channels at axis 1 are by far the more common, so they are tried first.
        if 3 <= len(shape) <= 5:
            yield Layout(len(shape))
        if shape:
            yield Layout(len(shape), rows=True)

    def _run_probe(self, start: fx.Node, probe: ChannelProbe) -> None:
        """Run the nodes that the probe reaches, in execution order, until one of them determines the channels."""
        known: dict[fx.Node, Any] = {start: probe}
        errors: list[ReparamError] = []
        # A heap by execution order, because a node may be reached over paths of different lengths.
        waiting = [(self.order[user], user) for user in start.users]
        heapq.heapify(waiting)
        seen: set[fx.Node] = set()
        while waiting:
            _, node = heapq.heappop(waiting)
            if node in seen or node in self.fixed or node.op == "output":
                continue
            seen.add(node)
            try:
                known[node] = self._evaluator.run(node, lambda n: known[n] if n in known else self._constants[n])
            except ChannelsFound:
                raise
            except ReparamError as error:
                errors.append(error)
            except KeyError:  # it also needs a tensor that does not depend on the probe
                continue
            # Functions that keep the channels return the probe itself: go on with their users.
            if known.get(node) is probe:
                for user in node.users:
                    heapq.heappush(waiting, (self.order[user], user))
        if errors:
            raise errors[0]


def transposed_conv_at(inlined: InlinedGraph, node: fx.Node) -> _ConvTransposeNd | None:
    """Return the transposed convolution that a node calls, if it runs torch's own forward."""
    module = inlined.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module) in _TRANSPOSED_RANKS and isinstance(module, _ConvTransposeNd) and "forward" not in vars(module):
        return module
    return None


def _spec_from_transposed(inlined: InlinedGraph, node: fx.Node) -> InputSpec | None:
    """Return channels and layout of an output or an input of a transposed convolution; None for other nodes.

    The algebra has no map for a transposed convolution, so a probe would not learn anything from one.
    """
    producer = transposed_conv_at(inlined, node)
    if producer is not None:
        return InputSpec(producer.out_channels, Layout(_TRANSPOSED_RANKS[type(producer)]))
    consumer = next((found for user in node.users if (found := transposed_conv_at(inlined, user)) is not None), None)
    return None if consumer is None else InputSpec(consumer.in_channels, Layout(_TRANSPOSED_RANKS[type(consumer)]))


def has_rank_agnostic_norm(module: nn.Module) -> bool:
    """Whether ``module`` contains a batch norm that takes tensors of more than one rank."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, nn.BatchNorm2d) for part in module.modules())


def synthetic_inputs(specs: Sequence[InputSpec | None]) -> tuple[Tensor, ...] | None:
    """Return meta tensors that match ``specs``, or None if one of them is not known."""
    inputs = []
    for spec in specs:
        if spec is None or spec.layout.rank is None:
            return None
        sizes = _ASSUMED_SIZES[: spec.layout.rank - 2]
        shape = (*sizes, spec.channels) if spec.layout.rows else (spec.channels, *sizes)
        inputs.append(torch.empty(2, *shape, device="meta"))
    return tuple(inputs) or None


def run_on_meta(inlined: InlinedGraph, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return the value of every node for meta tensors shaped like ``inputs``; nodes that fail are left out."""
    evaluator = Evaluator(inlined, to_meta, keep_kernels=False, strict=False)
    given = iter(inputs)
    known: dict[fx.Node, Any] = {}
    for node in inlined.graph.nodes:
        try:
            if node.op == "placeholder":
                value = next(given)
                known[node] = to_meta(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            elif node.op == "get_attr":
                known[node] = evaluator.constant(node)
            elif node.op != "output":
                known[node] = evaluator.run(node, known.__getitem__)
        except Exception:  # user code that needs values, or that needs the result of a node that failed
            continue
    return known


def shapes_of(known: Mapping[fx.Node, Any]) -> Shapes:
    """Return the shapes of the values that are tensors."""
    return {node: tuple(value.shape) for node, value in known.items() if isinstance(value, Tensor)}
