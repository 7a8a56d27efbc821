"""A model as one graph: the forwards of its modules written out inside each other, down to what does one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx, nn

from repvgg.collapse.capture import Capture, join

Place: TypeAlias = tuple[str, fx.Node]
LookInto: TypeAlias = Callable[[str, Capture, str], Capture | None]


@dataclass(frozen=True, eq=False, repr=False)
class Flat:
    """The graph of a module, the *unit*, into which graphs of modules below it are written.

    Attributes:
        module: the unit.
        graph: nodes in the order of execution. Modules are called, and tensors named, by their paths below the unit.
        captures: what was written out: captures by the path of their module below the unit, the unit's own under "".
        place: for every node, the path of the module whose forward it stands in, and the node there.
        value: what each node of a written-out forward is in the flat graph: a node, or a structure of nodes.
        callers: for the path of what was written out, the path of the module whose forward calls it.
        constants: for nodes that name a tensor, the module and the name that it has there.
    """

    module: nn.Module
    graph: fx.Graph
    captures: dict[str, Capture]
    place: dict[fx.Node, Place] = field(default_factory=dict)
    value: dict[Place, Any] = field(default_factory=dict)
    callers: dict[str, str] = field(default_factory=dict)
    constants: dict[fx.Node, tuple[nn.Module, str]] = field(default_factory=dict)

    @property
    def escaped(self) -> frozenset[fx.Node]:
        """Nodes whose tensors a forward keeps for others to read."""
        found = (self.value.get((path, n)) for path, capture in self.captures.items() for n in capture.escaped)
        return frozenset(n for n in found if isinstance(n, fx.Node))

    def owner(self, node: fx.Node) -> str:
        """The path of the module whose forward ``node`` stands in."""
        return self.place[node][0]

    def lineage(self, path: str) -> tuple[str, ...]:
        """``path`` and the paths of what calls it, directly and further out, up to the unit."""
        found = [path]
        while found[-1]:
            found.append(self.callers[found[-1]])
        return tuple(found)

    def calls(self) -> Iterator[tuple[fx.Node, str]]:
        """Nodes that call a module, with its path."""
        return ((node, str(node.target)) for node in self.graph.nodes if node.op == "call_module")


def flatten(module: nn.Module, captured: Capture, look_into: LookInto) -> Flat:
    """Write the forwards of ``module`` and of what it calls into one graph.

    Args:
        module: the unit.
        captured: its capture.
        look_into: for a path below the unit, the capture of a forward that calls a module there, and its name for
            that module: the capture of the module that is called, or None where it is to stay one node.
    """
    flat = Flat(module, fx.Graph(), {"": captured})
    writer = _Writer(flat, look_into)
    inputs = [flat.graph.placeholder(str(n.target)) for n in captured.graph.nodes if n.op == "placeholder"]
    flat.graph.output(writer.write("", captured, inputs))
    return flat


class _Writer:
    """Copies nodes of captures into the flat graph, call by call."""

    def __init__(self, flat: Flat, look_into: LookInto) -> None:
        self.flat = flat
        self.look_into = look_into

    def write(self, path: str, captured: Capture, inputs: list[Any]) -> Any:
        """Write out one forward on ``inputs``, and return what it returns."""
        values = iter(inputs)
        outcome: Any = None
        for node in captured.graph.nodes:
            if node.op == "output":
                outcome = self._moved(path, node.args[0])
                continue
            value = next(values) if node.op == "placeholder" else self._node(path, captured, node)
            self.flat.value[path, node] = value
            if isinstance(value, fx.Node):
                self.flat.place.setdefault(value, (path, node))
        return outcome

    def _moved(self, path: str, arguments: Any) -> Any:
        return fx.map_arg(arguments, lambda n: self.flat.value[path, n])

    def _node(self, path: str, captured: Capture, node: fx.Node) -> Any:
        args, kwargs = self._moved(path, node.args), self._moved(path, node.kwargs)
        if _picks_an_item(node) and isinstance(args[0], (tuple, list, dict)):
            return args[0][args[1]]
        if node.op == "call_module":
            target = join(path, str(node.target))
            again = target in self.flat.captures
            inner = None if again else self.look_into(path, captured, str(node.target))
            if inner is not None and takes(inner, args, kwargs):
                self.flat.captures[target] = inner
                self.flat.callers[target] = path
                return self.write(target, inner, [*args, *kwargs.values()])
            return self.flat.graph.create_node("call_module", target, args, kwargs)
        if node.op == "get_attr":
            new = self.flat.graph.create_node("get_attr", join(path, str(node.target)))
            self.flat.constants[new] = (captured.root, str(node.target))
            return new
        return self.flat.graph.create_node(node.op, node.target, args, kwargs, name=node.name)


def _picks_an_item(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and len(node.args) == 2


def takes(captured: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call binds the inputs of a captured forward and leaves its optional arguments alone."""
    names = [str(node.target) for node in captured.graph.nodes if node.op == "placeholder"]
    given = [*names[: len(args)], *kwargs]
    return len(args) <= len(names) and given == names and not any(name.startswith("*") for name in names)
