"""Which nodes of a graph may share memory, and what changes memory in place that something else reads later."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from repvgg.symbolic import HANDLERS, handlers, slicing

_SHARING = (
    *(handlers.unchanged, handlers.flatten, handlers.reshape_as, handlers.dropout),
    *(slicing.getitem, slicing.narrow, slicing.chunk, slicing.split),
)
_OPERATORS = {
    function for name, function in vars(operator).items() if name[:1] == "i" and f"__{name[1:]}__" in vars(operator)
} | {operator.setitem}


@dataclass(frozen=True)
class Effects:
    """What calling a module may do to its inputs.

    Attributes:
        writes: it may change one in place.
        shares: its outcome may share memory with one.
    """

    writes: bool = True
    shares: bool = True


class Memory:
    """The nodes of one graph in classes that may share memory.

    Attributes:
        unsafe: nodes that change in place what is read again under another name, by the graph or by others outside.
        torn: the nodes whose memory they change: each has to be a tensor of its own, as it is in the forward.
    """

    def __init__(self, graph: fx.Graph, effects_of: Callable[[str], Effects], escaped: frozenset[fx.Node]) -> None:
        self._effects_of = effects_of
        self._place: dict[fx.Node, int] = {node: i for i, node in enumerate(graph.nodes)}
        self._root: dict[fx.Node, fx.Node] = {node: node for node in graph.nodes}
        self._written: list[fx.Node] = [node for node in graph.nodes if self._writes(node)]
        for node in graph.nodes:
            for other in self._shared_with(node):
                self._root[self._class(node)] = self._class(other)
        self._escaped = escaped
        self.unsafe = frozenset(node for node in self._written if self._is_read_again(node))
        changed = {self._class(node) for node in self.unsafe}
        self.torn = frozenset(node for node in graph.nodes if self._class(node) in changed)

    @classmethod
    def of_values(cls) -> Memory:
        """As if every node were a value that nothing can change."""
        return cls(fx.Graph(), lambda path: Effects(), frozenset())

    def change_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """A node from ``first`` up to ``last`` that may change the tensor of ``source`` in place."""
        for node in self._written:
            within = self._place[first] <= self._place[node] < self._place[last]
            if within and self._class(node) is self._class(source):
                return node
        return None

    def of_inputs(self) -> Effects:
        """What the whole graph does to its inputs."""
        inputs = {self._class(node) for node in self._place if node.op == "placeholder"}
        outputs = {self._class(n) for node in self._place if node.op == "output" for n in node.all_input_nodes}
        return Effects(bool(inputs & {self._class(node) for node in self._written}), bool(inputs & outputs))

    def _class(self, node: fx.Node) -> fx.Node:
        while self._root[node] is not node:
            node = self._root[node]
        return node

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(node.all_input_nodes) and self._effects_of(str(node.target)).writes
        return node.op.startswith("call") and _is_in_place(node)

    def _shared_with(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that the outcome of a node may share memory with."""
        if node.op == "call_module":
            effects = self._effects_of(str(node.target))
            return node.all_input_nodes if effects.shares or effects.writes else []
        if not node.op.startswith("call"):
            return []
        if node in self._written and "out" not in node.kwargs:
            return [n for n in node.args[:1] if isinstance(n, fx.Node)]
        return [] if _is_fresh(node) and node not in self._written else node.all_input_nodes

    def _is_read_again(self, write: fx.Node) -> bool:
        """Whether what a node changes is known under an older name to something that runs later, or outside."""
        place = self._place[write]
        older = [n for n in self._place if self._place[n] < place and self._class(n) is self._class(write)]
        outside = any(node.op in ("placeholder", "get_attr") or node in self._escaped for node in older)
        return outside or any(self._place[user] > place for node in older for user in node.users)


def _function(node: fx.Node) -> Any:
    return getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target


def _is_fresh(node: fx.Node) -> bool:
    """Whether the outcome is known to be a new tensor: that of a function of the algebra that computes something."""
    handler = HANDLERS.get(_function(node))
    return handler is not None and handler not in _SHARING


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(_function(node), "__name__", str(node.target))
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or _function(node) in _OPERATORS or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
