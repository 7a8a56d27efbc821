"""The graph of a module with the forwards of its submodules inlined, as far as they can be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx, nn

from repvgg.collapse.capture import Capture, join

Origin: TypeAlias = tuple[str, fx.Node]  # path of a module below the scope, and a node in the capture of its forward
CaptureCallee: TypeAlias = Callable[[str, Capture, str], Capture | None]


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
        # A node that escapes in an inlined forward may be a structure there; its items are nodes of their own.
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
    """Inline the forwards below ``module`` into one graph.

    Args:
        module: the scope.
        captured: its capture.
        capture_callee: called with the path of a caller below the scope, its capture, and the callee's path below the
            caller; returns the callee's capture, or None to leave the call a single node.
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
