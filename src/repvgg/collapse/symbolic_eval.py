"""Evaluate the nodes of a recording on symbols: the core of the collapse.

:class:`SymbolicValues` assigns to every node the earlier node that it is a linear
function of, and that function; a maximal linear region is then a node whose users are not part of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.collapse.alias import AliasAnalysis
from repvgg.collapse.cost import Cost
from repvgg.collapse.evaluator import Evaluator, meta_tensor, recorded_number
from repvgg.collapse.modules import computes_weights, is_computed_attribute, is_leaf
from repvgg.collapse.recording import Recording, is_constant
from repvgg.collapse.region import Step, Value
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import (
    ITEM_ASSIGNMENTS,
    InputSpec,
    Layout,
    Source,
    SymbolicTensor,
)

_ARITHMETIC = {"add", "sub", "mul", "truediv", "div", "neg", "iadd", "isub", "imul", "itruediv", "multiply", "divide"}
_TAKE_IMAGES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED_RANKS = {nn.ConvTranspose1d: 3, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5}


def _parameters_of(node: fx.Node) -> set[fx.Node]:
    """Return the parameters that a constant is computed from."""
    if node.op == "get_attr":
        return {node}
    return set[fx.Node]().union(*map(_parameters_of, node.all_input_nodes))


def _converts(node: fx.Node) -> bool:
    """Whether a node is arithmetic, which also takes integers, and broadcasts."""
    return node.op != "call_module" and getattr(node.target, "__name__", node.target) in _ARITHMETIC


class SymbolicValues:
    """All nodes of a graph that are linear functions of another node.

    They are computed in one pass over the graph. A cut at a node, where regions must start from then on, only
    evaluates again what depends on it.

    Args:
        recording: the graph.
        aliasing: which nodes share memory.
        opaque: nodes that must stay, with the reason.
        merge_branches: whether branches may merge, or only chains.
        fixed_sizes: whether costs are those at the recorded sizes, borders included.
        cuts: nodes at which regions must start.

    Attributes:
        recording: the graph.
        by_node: the values.
        by_source: the nodes that are functions of a node.
        shapes: the shapes of all floating-point tensors.
        constants: the values of nodes that depend on no input, on the meta device.
        cuts: nodes at which regions must start.
        order: the position of each node in execution order.
        fixed: nodes that must stay.
        reasons: why a node has no value, or why it starts a new region instead of continuing that of its arguments.
    """

    def __init__(
        self,
        recording: Recording,
        aliasing: AliasAnalysis,
        opaque: Mapping[fx.Node, str],
        merge_branches: bool = True,
        fixed_sizes: bool = False,
        cuts: Collection[fx.Node] = (),
    ) -> None:
        self.by_node: dict[fx.Node, Value] = {}
        self.by_source: dict[fx.Node, set[fx.Node]] = {}
        self.cuts = set(cuts)
        self._modules = {target: recording.module.get_submodule(target) for _, target in recording.calls()}
        self.reasons = dict(opaque)
        self.reasons |= dict.fromkeys(aliasing.unsafe_writes, "it modifies in place a tensor that is read again")
        self.fixed = frozenset(self.reasons)
        self.recording, self._aliasing = recording, aliasing
        self._merge_branches, self._fixed_sizes = merge_branches, fixed_sizes
        self._evaluator = Evaluator(recording, lambda tensor: meta_tensor(tensor.shape))
        self._nodes = list(recording.graph.nodes)
        self.order = {node: position for position, node in enumerate(self._nodes)}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {
            node: node.meta["shape"]
            for node in self._nodes
            if "shape" in node.meta and node.meta["dtype"].is_floating_point
        }
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

    def _visit(self, node: fx.Node) -> None:
        # A clobbered tensor is no constant: a write changes it while the graph runs.
        if node.op == "get_attr" and is_constant(node) and node not in self._aliasing.clobbered:
            self.constants[node] = self._evaluator.constant(node)
        if (number := recorded_number(node)) is not None:
            self.constants[node] = number
            return
        if not node.op.startswith("call") or node in self.fixed:
            return
        inputs = [n for n in node.all_input_nodes if n not in self.constants]
        try:
            if not inputs:
                self.constants[node] = self._constant(node)
            elif not is_constant(node):  # of a tensor that a write changes while the graph runs
                self._evaluate(node, inputs)
        except ReparamError as error:
            self.reasons.setdefault(node, str(error))

    def _constant(self, node: fx.Node) -> Any:
        """Return the value of a node that depends on no input, on the meta device."""
        shape = self.shapes.get(node)
        if shape is not None and is_constant(node):  # not every function runs on meta tensors
            return meta_tensor(shape)
        return self._evaluator.run(node, self.constants.__getitem__)

    def _evaluate(self, node: fx.Node, inputs: Sequence[fx.Node]) -> None:
        """Set the value of ``node``, for the earliest source that all its arguments are functions of.

        Raises ReparamError if there is none.
        """
        if node not in self.shapes:
            raise NotLinearError("its output is not one tensor")
        errors: list[ReparamError] = []
        for start in self._possible_starts(inputs, errors):
            values = [value for n in inputs if (value := self._as_function_of(start, n)) is not None]
            if len(values) < len(inputs):
                continue
            try:
                if self._may_be_converted(start.source) and all(value is start for value in values) and _converts(node):
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

    def _may_be_converted(self, source: fx.Node) -> bool:
        """Whether a node is an input of which no layer determines that it has real numbers and its channels."""
        users = (type(self._modules[str(u.target)]) if u.op == "call_module" else u.target for u in source.users)
        return source.op == "placeholder" and not any(user in _TAKE_IMAGES or user is nn.Linear for user in users)

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
        attributes = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        if any(is_computed_attribute(self.recording.module, path) for path in attributes):
            return True
        computed = [n for n in node.all_input_nodes if n in self.constants and n.op.startswith("call")]
        read = {n for made in computed for n in _parameters_of(made)}
        before = sum(self.constants[n].numel() for n in read)
        # A kernel that is larger than what it is made of stays as it is.
        return bool(computed) and sum(self.constants[n].numel() for n in computed) <= before

    def alone(self, node: fx.Node) -> Value | None:
        """Return a node by itself as a function of its only argument; None if it is no linear one."""
        inputs = [n for n in node.all_input_nodes if n not in self.constants]
        if len(inputs) != 1 or node not in self.shapes:
            return None
        try:
            specs = self._possible_specs(inputs[0])
        except ReparamError:
            return None
        for spec in specs:
            start = self._start(inputs[0], spec)
            try:
                return self._function(node, start, {inputs[0]: start})
            except ReparamError:
                continue
        return None

    def ends_with_conv(self, node: fx.Node) -> bool:
        """Whether a node is a function of an earlier one with a convolution in it."""
        return node in self.by_node and any("conv" in step.operations for step in self.by_node[node].steps)

    def _record(self, node: fx.Node, start: Value, inputs: Mapping[fx.Node, Value]) -> None:
        self.by_node[node] = self._function(node, start, inputs)
        self.by_source.setdefault(start.source, set()).add(node)

    def _function(self, node: fx.Node, start: Value, inputs: Mapping[fx.Node, Value]) -> Value:
        ledger = start.symbol.source
        count, before = len(ledger.operations), Cost.of_ledger(ledger)
        symbols = {n: value.symbol.copy() for n, value in inputs.items()}  # an in-place function changes its argument
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
        return Value(start.source, result, step, inside, start)

    def _start(self, node: fx.Node, spec: InputSpec) -> Value:
        """Return the node as the source of a region."""
        if (node, spec) not in self._starts:
            source = Source(self._merge_branches)
            symbol = SymbolicTensor.of(source, spec.channels, device="meta", layout=spec.layout)
            source.shape = self.shapes.get(node)
            # Rows have no borders, so their cost per row is exact without sizes.
            if self._fixed_sizes and source.shape is not None and not spec.layout.rows:
                source.sizes = source.shape[2:]
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
        shape = self.shapes.get(node)
        if shape is None:
            raise NotLinearError("one of its arguments is no floating-point tensor")
        possible = [InputSpec(shape[-1 if layout.rows else 1], layout) for layout in _possible_layouts(shape)]
        specs += possible[::-1] if self._is_read_as_rows(node) else possible
        if not all(spec.channels for spec in specs):
            raise NotLinearError("one of its arguments has no channels")
        return list(dict.fromkeys(specs))

    def _is_read_as_rows(self, node: fx.Node, depth: int = 4) -> bool:
        """Whether a linear layer reads the tensor of a node, perhaps after functions that keep its shape."""
        shape = self.shapes.get(node)
        for user in node.users:
            function = type(self._modules[str(user.target)]) if user.op == "call_module" else user.target
            if function in (nn.Linear, F.linear):
                return True
            keeps_shape = function not in _TAKE_IMAGES and self.shapes.get(user) == shape
            if depth and keeps_shape and self._is_read_as_rows(user, depth - 1):
                return True
        return False


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
