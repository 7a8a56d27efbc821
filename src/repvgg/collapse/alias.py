"""Which nodes of a graph may share memory, and which in-place writes are visible under another name.

Merging a region moves its computation: all of it then runs where its convolution is called. That is only correct if no
in-place operation changes the region's input, or a tensor inside the region, between the two places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from repvgg.symbolic import HANDLERS, handlers, slicing

# Handlers whose output may be a view of the input, or the input itself.
_VIEWS = (
    *(handlers.unchanged, handlers.flatten, handlers.reshape_as, handlers.dropout),
    *(slicing.getitem, slicing.narrow, slicing.chunk, slicing.split),
)
# operator.iadd and its like, recognized by their dunder twins, and ``x[i] = y``.
_IN_PLACE_OPERATORS = {
    function for name, function in vars(operator).items() if name[:1] == "i" and f"__{name[1:]}__" in vars(operator)
} | {operator.setitem}


@dataclass(frozen=True)
class Effects:
    """What calling a module may do to its inputs; the defaults are the worst case.

    Attributes:
        writes: whether it may modify one in place.
        shares: whether its output may share memory with one.
    """

    writes: bool = True
    shares: bool = True


class AliasAnalysis:
    """Partition the nodes of one graph into classes that may share memory.

    Attributes:
        unsafe_writes: nodes that modify in place a tensor that is later read under an older name, in the graph or
            outside of it.
        clobbered: all nodes that may share memory with what an unsafe write modifies. Each must remain a tensor of its
            own, as it is in the original forward.
    """

    def __init__(self, graph: fx.Graph, effects_of: Callable[[str], Effects], escaped: frozenset[fx.Node]) -> None:
        self._effects_of = effects_of
        self._order: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes}  # union-find forest
        self._writes: list[fx.Node] = [node for node in graph.nodes if self._may_write(node)]
        for node in graph.nodes:
            for other in self._may_share_with(node):
                self._parent[self._class(node)] = self._class(other)
        self._escaped = escaped
        self.unsafe_writes = frozenset(node for node in self._writes if self._is_read_again(node))
        changed = {self._class(node) for node in self.unsafe_writes}
        self.clobbered = frozenset(node for node in graph.nodes if self._class(node) in changed)

    @classmethod
    def without_aliasing(cls) -> AliasAnalysis:
        """Return an analysis for which every node is an immutable value: cheap, and checked against later."""
        return cls(fx.Graph(), lambda path: Effects(), frozenset())

    def write_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """Return a node from ``first`` up to, not including, ``last`` that may modify the tensor of ``source``."""
        for node in self._writes:
            within = self._order[first] <= self._order[node] < self._order[last]
            if within and self._class(node) is self._class(source):
                return node
        return None

    def effects_on_inputs(self) -> Effects:
        """Return what the graph as a whole does to its inputs."""
        inputs = {self._class(node) for node in self._order if node.op == "placeholder"}
        outputs = {self._class(n) for node in self._order if node.op == "output" for n in node.all_input_nodes}
        return Effects(bool(inputs & {self._class(node) for node in self._writes}), bool(inputs & outputs))

    def _class(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            node = self._parent[node]
        return node

    def _may_write(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(node.all_input_nodes) and self._effects_of(str(node.target)).writes
        return node.op.startswith("call") and _is_in_place(node)

    def _may_share_with(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that the output of a node may share memory with."""
        if node.op == "call_module":
            # A module that writes to its input usually returns it, as nn.ReLU(inplace=True) does.
            effects = self._effects_of(str(node.target))
            return node.all_input_nodes if effects.shares or effects.writes else []
        if not node.op.startswith("call"):
            return []
        if node in self._writes and "out" not in node.kwargs:
            return [n for n in node.args[:1] if isinstance(n, fx.Node)]  # ``x.add_(y)`` returns x
        return [] if _returns_new_tensor(node) and node not in self._writes else node.all_input_nodes

    def _is_read_again(self, write: fx.Node) -> bool:
        """Whether an older name of what ``write`` modifies is read later, or from outside of the graph."""
        position = self._order[write]
        older = [n for n in self._order if self._order[n] < position and self._class(n) is self._class(write)]
        # Callers hold inputs, modules hold parameters, and attributes hold what escaped.
        outside = any(node.op in ("placeholder", "get_attr") or node in self._escaped for node in older)
        return outside or any(self._order[user] > position for node in older for user in node.users)


def _function(node: fx.Node) -> Any:
    return getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target


def _returns_new_tensor(node: fx.Node) -> bool:
    # Only known functions count: any other one may return a view.
    handler = HANDLERS.get(_function(node))
    return handler is not None and handler not in _VIEWS


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(_function(node), "__name__", str(node.target))
    # torch's naming convention; dunder names are not in place.
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or _function(node) in _IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
