"""The graph of a module with the forwards of its submodules inlined, and which of its nodes share memory.

Merging a region moves its computation: all of it then runs where its convolution is called. That is only correct if no
in-place operation changes the region's input, or a tensor inside the region, between the two places.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from repvgg.collapse.capture import Capture, join
from repvgg.symbolic import HANDLERS, VIEWS

Origin: TypeAlias = tuple[str, fx.Node]  # path of a module below the scope, and a node in the capture of its forward
CaptureCallee: TypeAlias = Callable[[str, Capture, str], Capture | None]

# operator.iadd and its like, recognized by their dunder twins, and ``x[i] = y``.
_IN_PLACE_OPERATORS = {
    function for name, function in vars(operator).items() if name[:1] == "i" and f"__{name[1:]}__" in vars(operator)
} | {operator.setitem}


@dataclass(frozen=True, eq=False, repr=False)
class InlinedGraph:
    """The graph of a module, the *scope*, into which graphs of modules below it are inlined.

    Attributes:
        module: the scope.
        graph: nodes in execution order. Modules and tensors are named by their paths below the scope.
        captures: the inlined captures by the path of their module below the scope; the scope's own is under "".
        origin: the module path and the captured node that each node of ``graph`` comes from.
        inlined: the reverse: what a captured node became, a node or a structure of nodes.
        callers: for the path of an inlined module, the path of the module whose forward calls it.
        constants: for nodes that name a tensor, the module that holds it and its name there.
    """

    module: nn.Module
    graph: fx.Graph
    captures: dict[str, Capture]
    origin: dict[fx.Node, Origin] = field(default_factory=dict)
    inlined: dict[Origin, Any] = field(default_factory=dict)
    callers: dict[str, str] = field(default_factory=dict)
    constants: dict[fx.Node, tuple[nn.Module, str]] = field(default_factory=dict)

    @property
    def escaped(self) -> frozenset[fx.Node]:
        """Nodes whose tensors a forward stores where other code can read them."""
        # A node that escapes in an inlined forward may be a structure there; its items are separate nodes.
        found = (self.inlined.get((path, n)) for path, capture in self.captures.items() for n in capture.escaped)
        return frozenset(n for n in found if isinstance(n, fx.Node))

    def owner(self, node: fx.Node) -> str:
        """Return the path of the module whose forward contains ``node``."""
        return self.origin[node][0]

    def call_stack(self, path: str) -> tuple[str, ...]:
        """Return ``path`` and the paths of its callers, innermost first, up to the scope."""
        found = [path]
        while found[-1]:
            found.append(self.callers[found[-1]])
        return tuple(found)

    def calls(self) -> Iterator[tuple[fx.Node, str]]:
        """Yield the nodes that call a module, with its path."""
        return ((node, str(node.target)) for node in self.graph.nodes if node.op == "call_module")


def inline(module: nn.Module, captured: Capture, capture_callee: CaptureCallee) -> InlinedGraph:
    """Inline the forwards below ``module``, whose capture is ``captured``, into one graph.

    ``capture_callee`` is called with the path of a caller below the scope, its capture, and the callee's path below the
    caller; it returns the callee's capture, or None to leave the call a single node.
    """
    inlined = InlinedGraph(module, fx.Graph(), {"": captured})
    inputs = [inlined.graph.placeholder(str(n.target)) for n in captured.graph.nodes if n.op == "placeholder"]
    inlined.graph.output(_Inliner(inlined, capture_callee).copy("", captured, inputs))
    return inlined


class _Inliner:
    """Copy the nodes of captures into the inlined graph, call by call."""

    def __init__(self, inlined: InlinedGraph, capture_callee: CaptureCallee) -> None:
        self.out = inlined
        self.capture_callee = capture_callee

    def copy(self, path: str, captured: Capture, inputs: list[Any]) -> Any:
        """Copy one forward, applied to ``inputs``, and return what it returns."""
        values = iter(inputs)
        result: Any = None
        for node in captured.graph.nodes:
            if node.op == "output":
                result = self._mapped(path, node.args[0])
                continue
            value = next(values) if node.op == "placeholder" else self._copy_node(path, captured, node)
            self.out.inlined[path, node] = value
            if isinstance(value, fx.Node):
                # setdefault: an argument that is passed on keeps the forward in which it was computed.
                self.out.origin.setdefault(value, (path, node))
        return result

    def _mapped(self, path: str, arguments: Any) -> Any:
        return fx.map_arg(arguments, lambda n: self.out.inlined[path, n])

    def _copy_node(self, path: str, captured: Capture, node: fx.Node) -> Any:
        args, kwargs = self._mapped(path, node.args), self._mapped(path, node.kwargs)
        # An inlined forward may return a Python structure, whose items are known nodes.
        if _is_getitem(node) and isinstance(args[0], (tuple, list, dict)):
            return args[0][args[1]]
        if node.op == "call_module":
            target = join(path, str(node.target))
            # A second call of the same module stays a call: a path stands for one copy of its forward.
            again = target in self.out.captures
            callee = None if again else self.capture_callee(path, captured, str(node.target))
            if callee is not None and binds_inputs(callee, args, kwargs):
                self.out.captures[target] = callee
                self.out.callers[target] = path
                return self.copy(target, callee, [*args, *kwargs.values()])
            return self.out.graph.create_node("call_module", target, args, kwargs)
        if node.op == "get_attr":
            new = self.out.graph.create_node("get_attr", join(path, str(node.target)))
            self.out.constants[new] = (captured.root, str(node.target))
            return new
        return self.out.graph.create_node(node.op, node.target, args, kwargs, name=node.name)


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and len(node.args) == 2


def binds_inputs(captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call binds exactly the inputs of a captured forward, in order, and no optional argument."""
    names = [str(node.target) for node in captured.graph.nodes if node.op == "placeholder"]
    # Inputs by keyword in another order, or values for optional arguments, need another graph.
    given = [*names[: len(args)], *kwargs]
    return len(args) <= len(names) and given == names and not any(name.startswith("*") for name in names)


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
        clobbered: all nodes that may share memory with what an unsafe write modifies. Each must remain a separate
            tensor, as in the original forward.
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
    return handler is not None and handler not in VIEWS


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(_function(node), "__name__", str(node.target))
    # torch's naming convention; dunder names are not in place.
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or _function(node) in _IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
