"""Write the recorded operations of one module as the graph of a new forward with the signature of the old one."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from repvgg._calls import signature_of
from repvgg.collapse.modules import is_inside, join, path_below
from repvgg.collapse.recording import Frame, Recording, leaves, mark_constants
from repvgg.errors import ReparamError
from repvgg.symbolic import assign_item

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.memory_format, torch.layout)


@dataclass(frozen=True, eq=False, repr=False)
class Emission:
    """The graph of a new forward.

    Attributes:
        graph: the graph.
        node_of: for recorded nodes, the new nodes with their tensors.
        statements: for recorded item assignments, the new nodes that run them.
    """

    graph: fx.Graph
    node_of: dict[fx.Node, fx.Node]
    statements: dict[fx.Node, fx.Node]


def why_not_emitted(recording: Recording, path: str, inlined: Collection[str]) -> str | None:
    """Return why the recorded operations of a module cannot be written as a forward, a clause, or None."""
    try:
        emit(recording, path, inlined)
    except ReparamError as error:
        return str(error)
    return None


def emit(recording: Recording, path: str, inlined: Collection[str]) -> Emission:
    """Return the graph of the module at ``path``, with the forwards of ``inlined`` modules inside.

    Raises:
        ReparamError: the recording does not show all that the forward does; the text is a clause about the forward.
    """
    emitter = _Emitter(recording, path, inlined)
    frame = recording.first_calls[path]
    emitter.bind_arguments(frame)
    emitter.copy(frame)
    emitter.graph.output(emitter.mapped(frame.output))
    _drop_unused(emitter.graph)
    mark_constants(emitter.graph)
    node_of = {old: new for old, new in emitter.names.items() if isinstance(new, fx.Node)}
    return Emission(emitter.graph, node_of, emitter.statements)


class _Emitter:
    def __init__(self, recording: Recording, path: str, inlined: Collection[str]) -> None:
        self.recording, self.path, self.inlined = recording, path, inlined
        self.graph = fx.Graph()
        self.names: dict[fx.Node, Any] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.statements: dict[fx.Node, fx.Node] = {}

    def bind_arguments(self, frame: Frame) -> None:
        """Create the parameters of the forward, and name the tensors in them."""
        signature = signature_of(self.recording.module.get_submodule(self.path))
        if signature is None:
            raise ReparamError("has no signature")
        bound = signature.bind(*frame.args, **frame.kwargs).arguments
        for name, parameter in signature.parameters.items():
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            stars = "**" if parameter.kind is parameter.VAR_KEYWORD else stars
            if stars:
                if bound.get(name):
                    raise ReparamError(f"is called with {stars}{name}")
                self.graph.placeholder(stars + name)
                continue
            default = parameter.default
            if default is not inspect.Parameter.empty and not isinstance(default, _PLAIN):
                raise ReparamError(f"has a default for {name!r} that cannot be written down")
            # The defaults of a placeholder use the same marker for none as those of a parameter.
            node = self.graph.placeholder(name, default_value=default)
            self._name_leaves(bound.get(name), node)

    def _name_leaves(self, value: Any, node: fx.Node) -> None:
        """Name the nodes in a structure that ``node`` is, by expressions that read them from it."""
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                self.names.setdefault(value, node)
        elif isinstance(value, (tuple, list, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if _holds_new_node(item, self.names):
                    self._name_leaves(item, self.graph.call_function(operator.getitem, (node, key)))
        elif _holds_new_node(value, self.names):
            raise ReparamError(f"takes or returns a {type(value).__name__}")

    def copy(self, frame: Frame) -> None:
        """Copy what a frame ran."""
        for item in frame.items:
            if isinstance(item, fx.Node):
                self._copy_node(item)
            elif item.path in self.inlined:
                self.copy(item)
            else:
                self._call(item)

    def _call(self, frame: Frame) -> None:
        """Call a module whose forward stays."""
        kwargs = {name: self.mapped(value) for name, value in frame.kwargs.items()}
        node = self.graph.call_module(self._inner(frame.path), self.mapped(frame.args), kwargs)
        self._name_leaves(frame.output, node)

    def _copy_node(self, node: fx.Node) -> None:
        if node in self.recording.opaque and node.op != "call_module":
            raise ReparamError(self.recording.opaque[node])
        if node in self.recording.assigned:
            own = {self.path, *self.inlined}
            if any(self.recording.owner(user) not in own for user in node.users):
                raise ReparamError("writes into a parameter that another forward reads")
        args, kwargs = self.mapped(node.args), self.mapped(node.kwargs)
        if node.target is assign_item:
            self.statements[node] = self.graph.call_function(operator.setitem, args, kwargs)
            self.names[node] = args[0]
            return
        if node.op == "call_module":
            new = self.graph.call_module(self._inner(str(node.target)), args, kwargs)
        elif node.target is Tensor.numel:
            new = self.graph.call_method("numel", args, kwargs)
        else:
            new = self.graph.create_node(node.op, node.target, args, kwargs)
        self.names[node] = new

    def mapped(self, value: Any) -> Any:
        """Return arguments of recorded nodes as arguments of new ones."""
        if isinstance(value, fx.Node):
            return self._attribute(str(value.target)) if value.op == "get_attr" else self._named(value)
        if isinstance(value, dict):
            return {key: self.mapped(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self.mapped(item) for item in value]
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, slice):
            return slice(*(self.mapped(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device):
            return self._device(value)
        if any(isinstance(leaf, fx.Node) for leaf in leaves(value)):
            raise ReparamError(f"passes on a {type(value).__name__}")
        if not isinstance(value, (*_PLAIN, complex, type(...))) and not callable(value):
            raise ReparamError(f"uses a {type(value).__name__} that cannot be written down")
        return value

    def _device(self, device: torch.device) -> fx.Node:
        """Read a device from the parameter or buffer that the forward read it from, so that the module can move."""
        paths = self.recording.own_devices.get(device, [])
        inside = [path for path in paths if is_inside(path, self.path)]
        if not inside:
            raise ReparamError("creates tensors on a device that it does not read from a tensor")
        return self.graph.call_function(getattr, (self._attribute(inside[-1]), "device"))

    def _named(self, node: fx.Node) -> Any:
        if node not in self.names:
            raise ReparamError("gets a tensor in another way than as an argument or a result")
        return self.names[node]

    def _attribute(self, target: str) -> fx.Node:
        name = self._inner(target)
        if name not in self.attributes:
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    def _inner(self, path: str) -> str:
        if is_inside(path, self.path) and path != self.path:
            return path_below(path, self.path)
        # The recording names a module or tensor that is held in several places by the first of them.
        wanted = operator.attrgetter(path)(self.recording.module)
        host = self.recording.module.get_submodule(self.path)
        for alias, part in host.named_modules(remove_duplicate=False):
            if part is wanted and alias:
                return str(alias)
            for name, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is wanted:
                    return join(alias, name)
        raise ReparamError(f"uses {path!r}, which is outside of it")


def _holds_new_node(value: Any, names: dict[fx.Node, Any]) -> bool:
    return any(isinstance(leaf, fx.Node) and leaf not in names for leaf in leaves(value))


def _drop_unused(graph: fx.Graph) -> None:
    """Remove numbers and parts of structures that nothing reads."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in (operator.getitem, getattr) and not node.users:
            graph.erase_node(node)
