"""Which nodes of a recording may share memory, and which of them are modified in place while they are still read.

Merging a region moves its computation: all of it then runs where its convolution is called. That is only correct if no
in-place operation changes the region's input, or a tensor inside the region, between the two places.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from repvgg.collapse.recording import Recording

# What these return shares memory with their input or not, depending on strides, dtype or mode. Whether any other
# function returns a view does not depend on the input, so the recorded memory addresses tell.
_MAY_SHARE = {
    *("contiguous", "reshape", "reshape_as", "flatten", "unflatten", "to", "type", "type_as", "ravel"),
    *("float", "double", "half", "bfloat16", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"),
    *("alpha_dropout", "feature_alpha_dropout", "expand_as", "cpu", "cuda"),
}


class AliasAnalysis:
    """Partition the nodes of a recording into classes that may share memory.

    Attributes:
        unsafe_writes: nodes that modify in place a tensor that is later read under an older name, in the graph or
            outside of it.
        clobbered: all nodes that may share memory with what an unsafe write modifies. Each must remain a separate
            tensor, as in the original forward.
    """

    def __init__(self, recording: Recording) -> None:
        nodes = list(recording.graph.nodes)
        self._order: dict[fx.Node, int] = {node: i for i, node in enumerate(nodes)}
        self._parent: dict[fx.Node, fx.Node] = {node: node for node in nodes}  # union-find forest
        self._writes: list[fx.Node] = [node for node in nodes if node.meta.get("writes")]
        first: dict[int, fx.Node] = {}
        for node in nodes:
            storage = node.meta.get("storage")
            if storage is not None:
                self._join(node, first.setdefault(storage, node))
            if _may_share(node):
                for other in node.all_input_nodes[:1]:
                    self._join(node, other)
        self._escaped = frozenset(recording.escaped)
        members = self._members = dict[fx.Node, list[fx.Node]]()
        if self._writes:
            for node in nodes:
                members.setdefault(self._class(node), []).append(node)
        self.unsafe_writes = frozenset(w for w in self._writes if self._is_read_again(w, members[self._class(w)]))
        changed = {self._class(node) for node in self.unsafe_writes}
        self.clobbered = frozenset(node for root in changed for node in members[root])

    def write_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> fx.Node | None:
        """Return a node from ``first`` up to, not including, ``last`` that may modify the tensor of ``source``."""
        for node in self._writes:
            within = self._order[first] <= self._order[node] < self._order[last]
            if within and self._class(node) is self._class(source):
                return node
        return None

    def is_seen(self, write: fx.Node, read: Collection[fx.Node]) -> bool:
        """Whether a tensor that ``write`` may modify is among those that are ``read``, or is known outside."""
        return any(
            node in read or node in self._escaped or node.op in ("placeholder", "get_attr")
            for node in self._members[self._class(write)]
        )

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        self._parent[self._class(one)] = self._class(other)

    def _class(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent[node]) is not node:
            self._parent[node] = self._parent[parent]
            node = parent
        return node

    def _is_read_again(self, write: fx.Node, members: list[fx.Node]) -> bool:
        """Whether an older name of what ``write`` modifies is read later, or from outside of the graph."""
        position = self._order[write]
        older = [node for node in members if self._order[node] < position]
        # Callers hold inputs, modules hold parameters, and attributes hold what escaped.
        outside = any(node.op in ("placeholder", "get_attr") or node in self._escaped for node in older)
        return outside or any(self._order[user] > position for node in older for user in node.users)


def _may_share(node: fx.Node) -> bool:
    if node.op == "call_module":
        return False
    return getattr(node.target, "__name__", str(node.target)) in _MAY_SHARE
