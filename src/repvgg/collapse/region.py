"""A linear region of a recording: the nodes that are one convolution of one tensor, and how it is replaced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import takewhile
from typing import Any

from torch import fx

from repvgg.collapse.cost import Cost
from repvgg.collapse.evaluator import Evaluator, recorded_number
from repvgg.collapse.recording import Recording
from repvgg.symbolic import (
    Layout,
    SymbolicTensor,
)


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
    """Nodes of a recorded graph that are one convolution of ``source``; only the last, ``exit``, is used outside.

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

        Nodes that still read the first one read the second instead: the sum in place of an addition; the source in
        place of any other node, of which only rank, dtype and device are still read.
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
        return any(recorded_number(n) is not None for step in self.steps for n in step.node.all_input_nodes)

    @property
    def layout_in_place(self) -> Layout | None:
        """The layout of what the first convolution of a chain reads, if the merged one can take its place; else None.

        Permutations, reshapes and means of a chain stay. A pointwise convolution fits anywhere among them.
        """
        symbol = self.value.read
        fits = symbol.has_axes_of_source or self.value.symbol.map.is_pointwise
        return symbol.layout if fits and self.is_chain else None

    @property
    def read_by_convolution(self) -> fx.Node | None:
        """The node of which the exit is one convolution: the source, or what a chain has after a mean; None if none is.

        After a mean the convolution is pointwise, and no later step may rearrange the axes.
        """
        value = self.value
        if value.symbol.is_convolution:
            return self.source
        if self.layout_in_place is None or value.symbol.arrangement != value.read.arrangement:
            return None
        before = [step.node for step in takewhile(lambda step: not step.computes, self.steps)]
        return before[-1] if before else self.source

    def run_in_place(self, evaluator: Evaluator, convolution: Callable[[Any], Any], x: Any) -> Any:
        """Run the chain with ``convolution`` in place of its first one, and without the others."""
        first = self.first_convolution
        values = {self.source: convolution(x) if first is self.source else x}
        previous = self.source
        for step in self.steps:
            node = step.node
            if node is first or step.computes:
                values[node] = convolution(values[previous]) if node is first else values[previous]
            else:
                values[node] = evaluator.run(node, evaluator.with_constants(values))
            previous = node
        return values[previous]

    def run(self, evaluator: Evaluator, value: Any) -> Any:
        """Return what the convolution of a region computes, for ``value`` in place of its source."""
        value_of = evaluator.with_constants({self.source: value})
        additions = {add.step.node for add in self.additions}
        for step in self.steps:
            if step.node not in additions:
                value_of(step.node)
        return reduce(operator.add, map(value_of, self.addends or (self.exit,)))


@dataclass(frozen=True, eq=False)
class Absorbed:
    """A part of a norm that the convolution of a region absorbs.

    Attributes:
        norm: the norm alone, as a region: a map ``a·x + b`` of each channel.
        channels: for each output channel of the convolution, the channel of the norm that applies to it, or None.
        shifts: whether the offset ``b`` applies as well; in a sum, only to one of the addends.
    """

    norm: Region
    channels: tuple[int | None, ...]
    shifts: bool

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """The output channels of the convolution that change, and the channel of the norm for each of them."""
        pairs = [(place, channel) for place, channel in enumerate(self.channels) if channel is not None]
        return [place for place, _ in pairs], [channel for _, channel in pairs]


def describe(recording: Recording, node: fx.Node) -> str:
    """Return what a node is in words: the path of the module, or the function and whose forward calls it."""
    if node.op in ("call_module", "placeholder", "get_attr"):
        return repr(str(node.target))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name} in the forward of {recording.owner(node) or 'the model'}"


def reads_invariant_metadata(node: fx.Node) -> bool:
    """Whether a node reads rank, dtype or device of a tensor, which are the same at both ends of a linear region."""
    if node.op == "call_method":
        return node.target in ("dim", "ndimension") and len(node.args) == 1
    return node.target is getattr and node.args[1] in ("ndim", "dtype", "device")
