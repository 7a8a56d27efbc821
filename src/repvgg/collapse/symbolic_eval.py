"""Evaluate the nodes of an recording graph: on symbols, on real tensors, or on meta tensors for their shapes.

:class:`SymbolicValues` is the core of the collapse. It assigns to every node the earlier node that it is a linear
function of, and that function; a maximal linear region is then a node whose users are not part of it.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.algebra import ConvMap
from repvgg.collapse.alias import AliasAnalysis
from repvgg.collapse.cost import Cost
from repvgg.collapse.modules import computes_weights, is_leaf
from repvgg.collapse.recording import Recording
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import (
    ITEM_ASSIGNMENTS,
    InputSpec,
    Layout,
    Source,
    SymbolicTensor,
    UnknownSize,
    channels_of,
    guarded,
    shadow_of,
    unchanged_by_call,
)
from repvgg.symbolic.probe import ChannelProbe, ChannelsFound

Shapes: TypeAlias = Mapping[fx.Node, Sequence[int]]
KnownMaps: TypeAlias = "Callable[[str], ModuleMap | None]"

_ARITHMETIC = {"add", "sub", "mul", "truediv", "div", "neg", "iadd", "isub", "imul", "itruediv", "multiply", "divide"}
_ASSUMED_SIZES = (224, 224, 32)  # height, width and depth of synthetic inputs; large enough for any network's strides
_TAKE_IMAGES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, torch.conv1d, torch.conv2d, torch.conv3d)
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
    """A node inside a linear region: the operations that it performs, and their cost.

    Attributes:
        node: the node.
        position: its place in execution order.
        operations: names of the operations of the algebra.
        cost: what they cost.
        is_leaf: whether the node calls one of torch's own modules.
        makes_kernel: whether it convolves with a kernel that it computes in each call.
    """

    node: fx.Node
    position: int
    operations: tuple[str, ...]
    cost: Cost
    is_leaf: bool
    makes_kernel: bool = False

    @property
    def computes(self) -> bool:
        """Whether it does more than pass a tensor on."""
        return self.number_of_operations > 0

    @property
    def number_of_operations(self) -> int:
        """How many operations there are to merge."""
        count = sum(operation != "identity" for operation in self.operations)
        # A padded nn.Conv2d is two operations of the algebra, but nothing is gained by "merging" it.
        return min(count, 1) + self.makes_kernel if self.is_leaf else count + self.makes_kernel


@dataclass(frozen=True, eq=False)
class Value:
    """A node as a linear function of an earlier one, linked to the values of its arguments.

    Attributes:
        source: the node that it is a function of.
        symbol: the function; on the meta device, without values.
        step: the node's own step; None for the source itself.
        inputs: the values of its arguments inside the region, without the source.
        start: the value of the source; the source's own is None.
    """

    source: fx.Node
    symbol: SymbolicTensor
    step: Step | None = None
    inputs: tuple[Value, ...] = ()
    start: Value | None = None

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The nodes from the source on, itself included, in execution order; empty for the source itself."""
        found: dict[fx.Node, Step] = {}
        waiting = [self]
        while waiting:  # branches share their first steps
            value = waiting.pop()
            if value.step is not None and value.step.node not in found:
                found[value.step.node] = value.step
                waiting += value.inputs
        return tuple(sorted(found.values(), key=lambda step: step.position))

    @cached_property
    def cost(self) -> Cost:
        """The total cost of all steps."""
        return sum((step.cost for step in self.steps), Cost())

    @cached_property
    def read(self) -> SymbolicTensor:
        """What the first convolution of a chain reads; of the source itself if there is none."""
        first = next((step for step in self.steps if "conv" in step.operations), None)
        value = self
        while value.inputs and value.step is not first:
            value = value.inputs[0]
        return value.inputs[0].symbol if value.inputs else value.start.symbol if value.start else value.symbol

    @cached_property
    def merged_cost(self) -> Cost:
        """The cost of the one convolution that computes it."""
        return Cost.of_symbol(self.symbol, averaged=bool(self.read.arrangement.averaged))

    @cached_property
    def is_worthwhile(self) -> bool:
        """Whether it consists of a convolution and at least one more operation."""
        operations = sum(step.number_of_operations for step in self.steps)
        has_conv = any("conv" in step.operations for step in self.steps)
        return operations >= 2 and has_conv and self.symbol.why_unreadable() is None

    def continues(self, node: fx.Node) -> bool:
        """Whether it is computed from ``node``, and ``node`` is in the same region."""
        return any(value.step is not None and value.step.node is node for value in self.inputs)


@dataclass(frozen=True, eq=False)
class Addition:
    """An addition inside a part of a sum: ``merged``, if any, is the addend that belongs to it, ``kept`` the other."""

    step: Step
    merged: fx.Node | None
    kept: fx.Node


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """Nodes of an recorded graph that are one convolution of ``source``; only the last, ``exit``, is used outside.

    A region may also be a part of a sum: ``a + b + c`` where one convolution computes ``a + c``. Its exit is then the
    addition that completes the part, here the last one. The convolution takes the place of one addend, and the
    additions of the others go: :attr:`replaced` and :attr:`removed` say so for both kinds of region.

    Attributes:
        recording: the graph.
        exit: the last node.
        value: the convolution.
        addends: for a part of a sum, the addends that the convolution computes together; it replaces the first.
        additions: for a part of a sum, the additions from its first addend to its exit, in execution order, each with
            the operands that are among ``addends``, at most one, and all others.
    """

    recording: Recording
    exit: fx.Node
    value: Value
    addends: tuple[fx.Node, ...] = ()
    additions: tuple[Addition, ...] = ()

    @property
    def source(self) -> fx.Node:
        """The node whose tensor the region reads."""
        return self.value.source

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes, in execution order."""
        inside = {step.node: step for step in self.value.steps} | {add.step.node: add.step for add in self.additions}
        return tuple(sorted(inside.values(), key=lambda step: step.position)) if self.additions else self.value.steps

    @property
    def replaced(self) -> fx.Node:
        """The node whose place the convolution takes, where it is called by a forward."""
        return self.addends[0] if self.addends else self.exit

    @property
    def removed(self) -> list[tuple[fx.Node, fx.Node]]:
        """The other nodes that go, in the order in which they can be removed, each with the node that remains for it.

        The second node is for whoever still reads the first one: for an addition the sum, for all others, of which only
        rank, dtype and device are still read, the source.
        """
        vanishing = [(add.step.node, add.kept) for add in self.additions if add.merged not in (None, self.replaced)]
        additions = {add.step.node for add in self.additions}
        others = [step.node for step in self.steps if step.node is not self.replaced and step.node not in additions]
        return vanishing + [(node, self.source) for node in reversed(others)]

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
        """Whether each node is a function of the previous one, and of constants: there are no branches and no sums.

        Nodes that only pass a tensor on stay in the graph, and may read the shape of other nodes.
        """
        if self.addends:
            return False
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

    @property
    def reads_sizes(self) -> bool:
        """Whether a step is given a size that the recorded run read from a tensor."""
        return any(_recorded_number(n) is not None for step in self.steps for n in step.node.all_input_nodes)

    @property
    def layout_in_place(self) -> Layout | None:
        """The layout of what the first convolution of a chain reads, if the merged one can take its place; else None.

        Permutations, reshapes and means of a chain stay. A pointwise convolution fits anywhere among them.
        """
        symbol = self.value.read
        fits = symbol.has_axes_of_source or self.value.symbol.map.is_pointwise
        return symbol.layout if fits and self.is_chain else None

    def run_in_place(self, evaluator: Evaluator, convolution: Callable[[Any], Any], x: Any) -> Any:
        """Run the chain with ``convolution`` in place of its first one, and without the others."""
        first = self.first_convolution
        values = {self.source: convolution(x) if first is self.source else x}
        previous = self.source
        for node, step in [(step.node, step) for step in self.steps]:
            if node is first or step.computes:
                values[node] = convolution(values[previous]) if node is first else values[previous]
            else:
                values[node] = evaluator.run(node, evaluator.with_constants(values))
            previous = node
        return values[previous]


class Evaluator:
    """Evaluate nodes of an recording graph, with all parameters and buffers passed through ``convert``.

    Args:
        recording: the graph.
        convert: from a tensor to the tensor to compute with.
        keep_kernels: leave kernels of convolutions and linear layers unconverted; the algebra converts them later.
        strict: raise on modules that change their own state when they are called.
    """

    def __init__(
        self, recording: Recording, convert: Callable[[Tensor], Tensor], keep_kernels: bool = True, strict: bool = True
    ) -> None:
        self.call = unchanged_by_call if strict else guarded
        self.recording = recording
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

    def run_region(self, region: Region, value: Any) -> Any:
        """Return what the convolution of a region computes, for ``value`` in place of its source."""
        value_of = self.with_constants({region.source: value})
        additions = {add.step.node for add in region.additions}
        for step in region.steps:
            if step.node not in additions:
                value_of(step.node)
        return reduce(operator.add, map(value_of, region.addends or (region.exit,)))

    def with_constants(self, values: dict[fx.Node, Any]) -> Callable[[fx.Node], Any]:
        """Return a function that returns values of nodes, and computes and adds those that are not there yet."""
        is_symbolic = any(isinstance(value, SymbolicTensor) for value in values.values())

        def value_of(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if (number := _recorded_number(node)) is not None:
                return number if is_symbolic else node.meta["value"]
            # A constant, or computed from constants.
            values[node] = self.constant(node) if node.op == "get_attr" else self.run(node, value_of)
            return values[node]

        return value_of

    def constant(self, node: fx.Node) -> Any:
        """Return the parameter, buffer or attribute that ``node`` names."""
        value = get_attribute(self.recording.module, str(node.target))
        return self.convert(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _shadow(self, path: str) -> nn.Module:
        if path not in self._shadows:
            part = self.recording.module.get_submodule(path)
            self._shadows[path] = shadow_of(
                part, self.convert, keep_kernels=self.keep_kernels, training=False, compute_weights=True
            )
        return self._shadows[path]


def _recorded_number(node: fx.Node) -> Any:
    """Return the size or the shape that a node of a recorded run read from a tensor; None for all other nodes.

    Another call may have another one, so the algebra may only pass it on, to follow a reshape.
    """
    value = node.meta.get("value") if node.meta.get("number") else None
    if isinstance(value, tuple):
        return tuple([UnknownSize(value=int(size)) for size in value])
    return UnknownSize(value=int(value)) if isinstance(value, int) and not isinstance(value, bool) else None


def _parameters_of(node: fx.Node) -> set[fx.Node]:
    """Return the parameters that a constant is computed from."""
    if node.op == "get_attr":
        return {node}
    return set[fx.Node]().union(*map(_parameters_of, node.all_input_nodes))


def _converts(node: fx.Node) -> bool:
    """Whether a node is arithmetic, which also takes integers, and broadcasts."""
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in _ARITHMETIC


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
        opaque: nodes that must stay, with the reason.
        escaped: nodes whose tensors other code may read, with the reason.
        merge_branches: whether branches may merge, or only chains.
        shapes: shapes of floating-point tensors, as far as they are known.
        recorded: whether ``shapes`` has all of them: a node without a shape is then no floating-point tensor.
        known_maps: the convolution that the submodule at a path is equal to, if it was computed before.
        fixed_sizes: whether costs are those at ``shapes``, borders included.
    """

    opaque: Mapping[fx.Node, str]
    escaped: Mapping[fx.Node, str]
    merge_branches: bool
    shapes: Shapes = field(default_factory=dict)
    recorded: bool = False
    known_maps: KnownMaps = lambda _: None
    fixed_sizes: bool = False


class SymbolicValues:
    """All nodes of a graph that are linear functions of another node.

    They are computed in one pass over the graph. A cut at a node, where regions must start from then on, only
    evaluates again what depends on it.

    Args:
        recording: the graph.
        aliasing: which nodes share memory.
        options: see :class:`EvaluationOptions`.
        cuts: nodes at which regions must start.

    Attributes:
        recording: the graph.
        by_node: the values.
        by_source: the nodes that are functions of a node.
        constants: the values of nodes that depend on no input, on the meta device.
        cuts: nodes at which regions must start.
        order: the position of each node in execution order.
        fixed: nodes that must stay.
        reasons: why a node has no value, or why it starts a new region instead of continuing that of its arguments.
    """

    def __init__(
        self, recording: Recording, aliasing: AliasAnalysis, options: EvaluationOptions, cuts: Collection[fx.Node] = ()
    ) -> None:
        self.by_node: dict[fx.Node, Value] = {}
        self.by_source: dict[fx.Node, set[fx.Node]] = {}
        self.cuts = set(cuts)
        self._modules = {target: recording.module.get_submodule(target) for _, target in recording.calls()}
        opaque = options.opaque
        self.reasons = dict(opaque)
        self.reasons |= dict.fromkeys(aliasing.unsafe_writes, "it modifies in place a tensor that is read again")
        self.fixed = frozenset(self.reasons)
        self.recording, self._aliasing, self._options = recording, aliasing, options
        self._evaluator = Evaluator(recording, to_meta)
        self._nodes = list(recording.graph.nodes)
        self.order = {node: position for position, node in enumerate(self._nodes)}
        self.constants: dict[fx.Node, Any] = {}
        self._specs: dict[fx.Node, list[InputSpec]] = {}
        self._starts: dict[tuple[fx.Node, InputSpec], Value] = {}
        for node in self._nodes:
            self._visit(node)

    def cut(self, nodes: Collection[fx.Node]) -> set[fx.Node]:
        """Let regions start at ``nodes``; return the sources of all regions that change."""
        self.cuts |= set(nodes)
        changed: set[fx.Node] = set()
        waiting: list[tuple[int, fx.Node]] = []
        queued: set[fx.Node] = set()

        def queue_users(node: fx.Node) -> None:
            for user in node.users:
                if user not in queued:
                    queued.add(user)
                    heapq.heappush(waiting, (self.order[user], user))

        for node in nodes:
            changed |= {self.by_node[node].source} if node in self.by_node else set()
            queue_users(node)
        while waiting:
            _, node = heapq.heappop(waiting)
            before = self.by_node.pop(node, None)
            if before is not None:
                self.by_source[before.source].discard(node)
            if node not in self.fixed:
                self.reasons.pop(node, None)
            self._visit(node)
            after = self.by_node.get(node)
            # Its region, and those of its arguments, which may end there from now on or no longer do.
            inputs = (self.by_node.get(n) for n in node.all_input_nodes)
            changed |= {value.source for value in (before, after, *inputs) if value is not None}
            # What reads a cut only depends on whether it is a tensor of known channels.
            if (before or after) and not (before and after and node in self.cuts):
                queue_users(node)
        return changed

    def input_specs(self) -> list[InputSpec | None]:
        """Return what each input of the graph is expected to be, None where the graph does not determine it."""
        return [self.spec(node) for node in self._nodes if node.op == "placeholder"]

    def spec(self, node: fx.Node) -> InputSpec | None:
        """Return channels and layout of a node's tensor, None where the graph does not determine them."""
        try:
            specs = self._possible_specs(node)
        except ReparamError:
            return None
        used = {self.by_node[user].start for user in self.by_source.get(node, ())}
        return next((spec for spec in specs if self._starts.get((node, spec)) in used), next(iter(specs), None))

    def _visit(self, node: fx.Node) -> None:
        # A clobbered tensor is no constant: a write changes it while the graph runs.
        if node.op == "get_attr" and node not in self._aliasing.clobbered:
            self.constants[node] = self._evaluator.constant(node)
        if (number := _recorded_number(node)) is not None:
            self.constants[node] = number
            return
        if not node.op.startswith("call") or node in self.fixed:
            return
        inputs = [n for n in node.all_input_nodes if n not in self.constants]
        try:
            if not inputs:
                self.constants[node] = self._evaluator.run(node, self.constants.__getitem__)
            else:
                self._evaluate(node, inputs)
        except ReparamError as error:
            self.reasons.setdefault(node, str(error))

    def _evaluate(self, node: fx.Node, inputs: Sequence[fx.Node]) -> None:
        """Set the value of ``node``, for the earliest source that all its arguments are functions of.

        Raises ReparamError if there is none.
        """
        if self._options.recorded and node not in self._options.shapes:
            raise NotLinearError("its output is not one tensor")
        errors: list[ReparamError] = []
        for start in self._possible_starts(inputs, errors):
            values = [value for n in inputs if (value := self._as_function_of(start, n)) is not None]
            if len(values) < len(inputs):
                continue
            try:
                if start.source.op == "placeholder" and all(value is start for value in values) and _converts(node):
                    raise NotLinearError("the model may be called with integers or with one channel")
                self._record(node, start, dict(zip(inputs, values, strict=True)))
            except ReparamError as error:
                errors.append(error)
            else:
                if errors:  # why it does not continue a longer region
                    self.reasons.setdefault(node, str(errors[0]))
                return
        raise errors[0] if errors else NotLinearError("it combines functions of two different tensors")

    def _possible_starts(self, inputs: Sequence[fx.Node], errors: list[ReparamError]) -> Iterator[Value]:
        """Yield the sources of the regions that the arguments belong to, then the arguments as sources themselves."""
        # In this order: from the longest region to the shortest.
        values = [self.by_node[n] for n in inputs if n in self.by_node and n not in self.cuts]
        starts = {value.start: None for value in values if value.start is not None}
        yield from sorted(starts, key=lambda start: self.order[start.source])
        for n in inputs:
            try:
                for spec in self._possible_specs(n):
                    yield self._start(n, spec)
            except ReparamError as error:
                errors.append(error)

    def _as_function_of(self, start: Value, node: fx.Node) -> Value | None:
        """Return ``node`` as a function of a source, or None."""
        if node is start.source:
            return start
        value = self.by_node.get(node)
        return value if value is not None and value.start is start and node not in self.cuts else None

    def _makes_kernel(self, node: fx.Node) -> bool:
        """Whether the kernel of a convolution is computed from other parameters in each call."""
        if node.op == "call_module":
            return computes_weights(self._modules[str(node.target)])
        computed = [n for n in node.all_input_nodes if n in self.constants and n.op.startswith("call")]
        read = {n for made in computed for n in _parameters_of(made)}
        before = sum(self.constants[n].numel() for n in read)
        # A kernel that is larger than what it is made of stays as it is.
        return bool(computed) and sum(self.constants[n].numel() for n in computed) <= before

    def _record(self, node: fx.Node, start: Value, inputs: Mapping[fx.Node, Value]) -> None:
        ledger = start.symbol.source
        count, before = len(ledger.operations), Cost.of_ledger(ledger)
        symbols = {n: value.symbol.copy() for n, value in inputs.items()}  # an in-place function changes its argument
        result = self._reuse_known_map(node, list(symbols.values()))
        if result is None:
            result = self._evaluator.run(node, lambda n: symbols[n] if n in symbols else self.constants[n])
        if not isinstance(result, SymbolicTensor):
            raise NotLinearError("its output is not one tensor")
        # A padding that nothing writes to is read as it is.
        is_written = any(user.target in ITEM_ASSIGNMENTS for user in node.users)
        if not is_written and (error := result.why_unreadable()) is not None:
            raise error
        operations, cost = tuple(ledger.operations[count:]), Cost.of_ledger(ledger) - before
        leaf = node.op == "call_module" and is_leaf(self._modules[str(node.target)])
        makes_kernel = "conv" in operations and self._makes_kernel(node)
        step = Step(node, self.order[node], operations, cost, leaf, makes_kernel)
        inside = tuple([value for value in inputs.values() if value.step is not None])
        self.by_node[node] = Value(start.source, result, step, inside, start)
        self.by_source.setdefault(start.source, set()).add(node)

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

    def _start(self, node: fx.Node, spec: InputSpec) -> Value:
        """Return the node as the source of a region."""
        if (node, spec) not in self._starts:
            source = Source(self._options.merge_branches)
            symbol = SymbolicTensor.of(source, spec.channels, device="meta", layout=spec.layout)
            source.shape = tuple(self._options.shapes[node]) if node in self._options.shapes else None
            # Rows have no borders, so their cost per row is exact without sizes.
            if self._options.fixed_sizes and node in self._options.shapes and not spec.layout.rows:
                source.sizes = tuple(self._options.shapes[node][2:])
            self._starts[node, spec] = Value(node, symbol)
        return self._starts[node, spec]

    def _possible_specs(self, node: fx.Node) -> list[InputSpec]:
        """Return channels and layout of a node's tensor; where its shape leaves two layouts open, the likelier first.

        Raises ReparamError if nothing determines them.
        """
        if node not in self._specs:
            self._specs[node] = self._find_specs(node)
        return self._specs[node]

    def _find_specs(self, node: fx.Node) -> list[InputSpec]:
        known = self.by_node[node].symbol if node in self.by_node else None
        specs = [] if known is None else [InputSpec(known.map.out_channels, known.layout)]
        if not self._options.recorded:
            return specs or [_spec_from_transposed(self.recording, node) or self._probe(node)]
        shape = self._options.shapes.get(node)
        if shape is None:
            raise NotLinearError("one of its arguments is no floating-point tensor")
        possible = [InputSpec(shape[-1 if layout.rows else 1], layout) for layout in _possible_layouts(shape)]
        specs += possible[::-1] if self._is_read_as_rows(node) else possible
        return list(dict.fromkeys(specs))

    def _probe(self, node: fx.Node) -> InputSpec:
        """Infer channels and layout of a node's tensor from the functions that read it."""
        first_error: ReparamError | None = None
        shape = self._options.shapes.get(node)
        for layout in (None,) if shape is None else _possible_layouts(shape):
            try:
                return channels_of(lambda probe: self._run_probe(node, probe), certain=True, layout=layout)
            except ReparamError as error:
                first_error = first_error or error
        raise first_error or NotLinearError("it is a number")

    def _is_read_as_rows(self, node: fx.Node, depth: int = 4) -> bool:
        """Whether a linear layer reads the tensor of a node, perhaps after functions that keep its shape."""
        shape = self._options.shapes.get(node)
        for user in node.users:
            function = type(self._modules[str(user.target)]) if user.op == "call_module" else user.target
            if function in (nn.Linear, F.linear):
                return True
            keeps_shape = function not in _TAKE_IMAGES and self._options.shapes.get(user) == shape
            if depth and keeps_shape and self._is_read_as_rows(user, depth - 1):
                return True
        return False

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
                known[node] = self._evaluator.run(node, lambda n: known[n] if n in known else self.constants[n])
            except ChannelsFound:
                raise
            except ReparamError as error:
                errors.append(error)
            except KeyError:  # it also needs a tensor that does not depend on the probe
                continue
            # Functions that keep the channels return a probe: go on with their users.
            if isinstance(known.get(node), ChannelProbe):
                for user in node.users:
                    heapq.heappush(waiting, (self.order[user], user))
        if errors:
            raise errors[0]


def _possible_layouts(shape: Sequence[int]) -> Iterator[Layout]:
    """Yield the layouts that a tensor of a shape may have."""
    # Channels at axis 1 are by far the more common, so they are tried first.
    if 3 <= len(shape) <= 5:
        yield Layout(len(shape))
    if shape:
        yield Layout(len(shape), rows=True)


def transposed_conv_at(recording: Recording, node: fx.Node) -> _ConvTransposeNd | None:
    """Return the transposed convolution that a node calls, if it runs torch's own forward."""
    module = recording.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module) in _TRANSPOSED_RANKS and isinstance(module, _ConvTransposeNd) and "forward" not in vars(module):
        return module
    return None


def _spec_from_transposed(recording: Recording, node: fx.Node) -> InputSpec | None:
    """Return channels and layout of an output or an input of a transposed convolution; None for other nodes.

    The algebra has no map for a transposed convolution, so a probe would not learn anything from one.
    """
    producer = transposed_conv_at(recording, node)
    if producer is not None:
        return InputSpec(producer.out_channels, Layout(_TRANSPOSED_RANKS[type(producer)]))
    consumer = next((found for user in node.users if (found := transposed_conv_at(recording, user)) is not None), None)
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


def run_on_meta(recording: Recording, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return the value of every node for meta tensors shaped like ``inputs``; nodes that fail are left out."""
    evaluator = Evaluator(recording, to_meta, keep_kernels=False, strict=False)
    given = iter(inputs)
    known: dict[fx.Node, Any] = {}
    for node in recording.graph.nodes:
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
