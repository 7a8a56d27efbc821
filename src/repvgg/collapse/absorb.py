"""Norms after a concatenation or a sum, or on a part of the channels, that the convolutions before them absorb.

The search merges functions of one tensor. A norm after ``cat([conv(x), conv(y)])`` is a function of two, and one on
``conv(x)[:, :k]`` shares the convolution with what reads the other channels. But a map of each channel on its own
passes through both: ``norm(cat([a, b])) = cat([norm_1(a), norm_2(b)])``, and a norm on a slice is one on the whole
tensor that keeps the other channels. So each convolution scales and shifts its own output channels, and the norm goes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from repvgg.collapse.cost import Cost
from repvgg.collapse.evaluator import Evaluator
from repvgg.collapse.insertion import InsertionPoint, Replacement
from repvgg.collapse.modules import is_batch_norm
from repvgg.collapse.recording import is_number
from repvgg.collapse.region import Absorbed, Region, Step, Value, describe, reads_invariant_metadata
from repvgg.collapse.sums import operands_of
from repvgg.collapse.symbolic_eval import SymbolicValues
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import Layout, Source, SymbolicTensor

# For each channel of a tensor, the channel of the norm that applies to it; None where it stays as it is.
Channels: TypeAlias = Sequence[int | None]

_CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
_MAPS = {"batch_norm", "scale", "shift"}


@dataclass
class _Path:
    """What one norm passes through on the way to the convolutions before it.

    Attributes:
        nodes: all nodes on the way.
        beside: nodes that read other channels of the same tensors.
        taken: for each convolution, which channels it takes over, and whether with the offset.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    beside: list[fx.Node] = field(default_factory=list)
    taken: dict[fx.Node, tuple[Channels, bool]] = field(default_factory=dict)

    def take(self, node: fx.Node, channels: Channels, shifts: bool) -> bool:
        """Let a convolution take over a map of its channels; False if one of them has a map already."""
        known, with_offset = self.taken.get(node, ([None] * len(channels), shifts))
        pairs = list(zip(known, channels, strict=True))
        if with_offset is not shifts or any(None not in pair for pair in pairs):
            return False
        self.taken[node] = [mine if other is None else other for mine, other in pairs], shifts
        return True


class NormAbsorption:
    """Finds the norms that are wholly absorbed by convolutions, once the search has found all else.

    Args:
        values: those at the end of the search.
        fixed: nodes whose tensors must stay as they are, with the reason.
        merged: regions that become convolutions.
        find_convolution: returns the region of a convolution that ends at a node and is not merged, or why there is
            none.
        why_not: why the nodes of a region, which ends with a norm, may not all change together, or None.

    Attributes:
        targets: the convolutions that absorb norms, by the last node of their region.
        norms: the norms that go, with the forwards that change for it.
        reasons: why others stay.
    """

    def __init__(
        self,
        values: SymbolicValues,
        fixed: Mapping[fx.Node, str],
        merged: Collection[Replacement],
        find_convolution: Callable[[fx.Node], Replacement | str],
        why_not: Callable[[Region], str | None],
    ) -> None:
        self.values, self.recording = values, values.recording
        self.fixed = {**{node: values.reasons[node] for node in values.fixed}, **fixed}
        self.find_convolution, self.why_not = find_convolution, why_not
        self.merged = {found.region.exit: found for found in merged if not found.region.addends}
        self.inside = {step.node for found in merged for step in found.region.steps}
        self.inside |= {addend for found in merged for addend in found.region.addends}
        self.targets: dict[fx.Node, Replacement] = {}
        self.norms: list[Replacement] = []
        self.gone: dict[fx.Node, fx.Node] = {}  # norms that were absorbed, with what they read
        self.reasons: dict[fx.Node, str] = {}
        self._evaluator = Evaluator(self.recording, lambda tensor: tensor)
        self._selections: dict[fx.Node, tuple[fx.Node, list[int]] | None] = {}
        for node in values.order:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        """Let the convolutions before a node absorb it, if it is a norm and they can."""
        if node in self.inside or node in self.fixed or node in self.values.constants or not self._may_be_norm(node):
            return
        norm = self.values.alone(node)
        if norm is None or not _is_map_of_channels(norm):
            return
        path, layout = _Path(), norm.symbol.layout
        if not self._passes_channels_on(norm.source, layout):
            return  # the search has compared a convolution and the norm that follows it
        try:
            self._pass_reader(norm.source, node)
            self._push(norm.source, range(norm.symbol.map.out_channels), True, layout, path)
            found = [(end, self._target(end), *taken) for end, taken in path.taken.items()]
            region = Region(self.recording, node, norm)
            around = map(self._plain_step, dict.fromkeys([*path.nodes, *path.beside]))
            steps = [*(target.region.value for _, target, _, _ in found), *around]
            whole = replace(norm, inputs=tuple(steps))
            if (reason := self.why_not(Region(self.recording, node, whole))) is not None:
                raise NotLinearError(reason)
        except ReparamError as error:
            self.reasons[node] = str(error)
            return
        for end, target, channels, shifts in found:
            more = Absorbed(region, tuple(channels), shifts)
            self.targets[end] = replace(target, absorbed=(*target.absorbed, more))
        owner = self.recording.owner(node)
        rewritten = frozenset[str]() if node.op == "call_module" else frozenset({owner})
        self.norms.append(Replacement(region, InsertionPoint("chain", owner, rewritten)))
        self.gone[node] = norm.source

    def _passes_channels_on(self, node: fx.Node, layout: Layout) -> bool:
        """Whether a node concatenates, adds or selects channels, or is a norm that is absorbed."""
        if node in self.merged or self.values.ends_with_conv(node):
            return False
        found = (self._parts(node, layout), self._addends(node), self._selection(node, layout))
        return node in self.gone or any(found)

    def _may_be_norm(self, node: fx.Node) -> bool:
        """Whether a node is a batch norm, or a function that computes with parameters."""
        if not node.op.startswith("call") or node not in self.values.shapes or node.meta.get("writes"):
            return False
        if node.op == "call_module":
            return is_batch_norm(self.recording.module.get_submodule(str(node.target)))
        constants = [n for n in node.all_input_nodes if n in self.values.constants]
        return any(isinstance(self.values.constants[n], Tensor) for n in constants)

    def _target(self, end: fx.Node) -> Replacement:
        """Return the region of the convolution that ends at a node; raise NotLinearError if there is none."""
        found = self.targets.get(end) or self.merged.get(end) or self.find_convolution(end)
        if isinstance(found, str):
            raise NotLinearError(f"{describe(self.recording, end)} cannot absorb it: {found}")
        return found

    def _push(self, node: fx.Node, channels: Channels, shifts: bool, layout: Layout, path: _Path) -> None:
        """Let what computes a tensor absorb a map of its ``channels``; raise NotLinearError if something cannot."""
        name = describe(self.recording, node)
        if node in path.nodes:
            raise NotLinearError(f"{name} is read more than once in front of it")
        if node in self.fixed:
            raise NotLinearError(f"{name} stays: {self.fixed[node]}")
        if node in self.merged or (node not in self.inside and self.values.ends_with_conv(node)):
            if not path.take(node, channels, shifts):
                raise NotLinearError(f"{name} is read more than once in front of it")
            return
        if node in self.inside:
            raise NotLinearError(f"{name} is folded into another convolution")
        if node in self.gone:
            path.nodes.append(node)
            self._pass_reader(self.gone[node], node)
            self._push(self.gone[node], channels, shifts, layout, path)
        elif (parts := self._parts(node, layout)) is not None:
            path.nodes.append(node)
            start = 0
            for part in parts:
                size = self.values.shapes[part][layout.axis]
                if any(channel is not None for channel in channels[start : start + size]):
                    self._pass_reader(part, node)
                    self._push(part, channels[start : start + size], shifts, layout, path)
                start += size
        elif (addends := self._addends(node)) is not None:
            path.nodes.append(node)
            for addend, is_first in zip(addends, (True, False), strict=True):
                self._pass_reader(addend, node)
                self._push(addend, channels, shifts and is_first, layout, path)
        elif (selected := self._selection(node, layout)) is not None:
            base, taken = selected
            path.nodes.append(node)
            spread: list[int | None] = [None] * self.values.shapes[base][layout.axis]
            for place, channel in zip(taken, channels, strict=True):
                if channel is not None and spread[place] is not None:
                    raise NotLinearError(f"{name} takes a channel more than once")
                spread[place] = channel if channel is not None else spread[place]
            path.beside += self._pass_selections(base, node, spread, layout)
            self._push(base, spread, shifts, layout, path)
        else:
            raise NotLinearError(f"in front of it is {name}, which is no convolution")

    def _pass_reader(self, node: fx.Node, reader: fx.Node) -> None:
        """Raise NotLinearError if something else reads a tensor."""
        if any(user is not reader for user in _readers(node)):
            raise NotLinearError(f"{describe(self.recording, node)} in front of it is read elsewhere too")

    def _pass_selections(self, base: fx.Node, mine: fx.Node, changed: Channels, layout: Layout) -> list[fx.Node]:
        """Return the other readers of ``base``; raise NotLinearError if one reads a channel that changes."""
        found: list[fx.Node] = []
        for reader in _readers(base):
            ends = [reader] if reader in self.values.shapes or reader.op == "output" else [*_readers(reader)]
            found += [reader] if reader not in ends else []
            if not ends:  # it turns numbers into Python's
                raise NotLinearError(f"{describe(self.recording, base)} in front of it is read elsewhere too")
            for end in ends:
                if end is mine:
                    continue
                selected = self._selection(end, layout)
                if selected is None or selected[0] is not base or any(changed[i] is not None for i in selected[1]):
                    raise NotLinearError(f"{describe(self.recording, base)} in front of it is read elsewhere too")
                found.append(end)
        return found

    def _parts(self, node: fx.Node, layout: Layout) -> list[fx.Node] | None:
        """Return what a node concatenates along the channels; None if it is no such concatenation."""
        if node.target not in _CONCATENATIONS or node.kwargs.keys() - {"dim"} or not node.args:
            return None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        parts: Any = node.args[0]
        shapes = self.values.shapes
        if not isinstance(dim, int) or not layout.is_channel_axis(dim) or not isinstance(parts, (list, tuple)):
            return None
        return list(parts) if all(isinstance(part, fx.Node) and part in shapes for part in parts) else None

    def _addends(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        found, shapes = operands_of(node), self.values.shapes
        if found is None or any(shapes.get(addend) != shapes[node] for addend in found):
            return None
        return None if found[0] is found[1] else found

    def _selection(self, node: fx.Node, layout: Layout) -> tuple[fx.Node, list[int]] | None:
        """Return the tensor of which a node returns channels, and which channels; None if it is no such node."""
        if node not in self._selections:
            self._selections[node] = self._find_selection(node, layout)
        return self._selections[node]

    def _find_selection(self, node: fx.Node, layout: Layout) -> tuple[fx.Node, list[int]] | None:
        if node not in self.values.shapes or node.meta.get("writes") or node in self.values.constants:
            return None
        part_of = node.args[0] if node.target is operator.getitem else None
        inner = part_of if isinstance(part_of, fx.Node) and part_of not in self.values.shapes else node
        inputs = [n for n in inner.all_input_nodes if n not in self.values.constants]
        if len(inputs) != 1 or inputs[0] not in self.values.shapes or not inner.op.startswith("call"):
            return None
        shape = self.values.shapes[inputs[0]]
        if len(shape) != layout.rank or any(n in self.values.fixed for n in (inner, node)):
            return None
        source = Source()
        source.shape = tuple(shape)
        symbol = SymbolicTensor.of(source, shape[layout.axis], layout=layout)
        try:
            result = self._evaluator.run(inner, self._evaluator.with_constants({inputs[0]: symbol}))
            result = result if inner is node else result[node.args[1]]
        except (ReparamError, LookupError, TypeError):
            return None
        if not isinstance(result, SymbolicTensor) or not result.is_convolution:
            return None
        channels = _selected_channels(result)
        return None if channels is None else (inputs[0], channels)

    def _plain_step(self, node: fx.Node) -> Value:
        step = Step(node, self.values.order[node], (), Cost(), is_leaf=False)
        return Value(node, SymbolicTensor.of(Source(), 1, device="meta"), step)


def _is_map_of_channels(value: Value) -> bool:
    symbol, operations = value.symbol, set(value.step.operations) if value.step is not None else set[str]()
    is_affine = symbol.map.is_depthwise and symbol.map.is_pointwise and symbol.is_convolution
    return is_affine and bool(operations) and operations <= _MAPS


def _selected_channels(symbol: SymbolicTensor) -> list[int] | None:
    """Return which channel of the source each channel is; None if one is anything else than a channel as it is."""
    conv = symbol.map
    if not conv.is_pointwise or (conv.bias is not None and bool(conv.bias.any())):
        return None
    weight = conv.weight.flatten(1)
    if conv.is_depthwise:
        return list(range(conv.out_channels)) if bool((weight == 1).all()) else None
    if conv.groups > 1 or not bool((((weight != 0).sum(1) == 1) & (weight.sum(1) == 1)).all()):
        return None
    return [int(channel) for channel in weight.argmax(1)]


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the users of a node that read its elements: sizes, rank, dtype and device stay the same."""
    return (user for user in node.users if not is_number(user) and not reads_invariant_metadata(user))
