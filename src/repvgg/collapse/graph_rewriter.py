"""Give a module a new forward: a graph module in which regions are single convolutions.

Everything that the graph does not mention is copied: hooks, attributes, and parts that other code uses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import chain, count
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from repvgg.collapse.capture import Capture, join
from repvgg.collapse.inline import InlinedGraph, inline
from repvgg.collapse.insertion import InsertionPoint
from repvgg.collapse.symbolic_eval import get_attribute
from repvgg.errors import ReparamError
from repvgg.symbolic import things_in

Copied = TypeVar("Copied")


def copies_of_computed_tensors(model: nn.Module) -> dict[int, Any]:
    """Return copies of tensors in attributes that were computed with gradients, by id, as a memo for ``deepcopy``.

    ``deepcopy`` raises on such tensors. They exist where a forward stored features or computed weights.
    """
    things = (value for part in model.modules() for value in things_in(vars(part).values()))
    return {id(v): v.detach().clone() for v in things if isinstance(v, Tensor) and not v.is_leaf}


def deep_copy(value: Copied, memo: dict[int, Any], module: nn.Module, path: str = "") -> Copied:
    """Copy a value in ``module`` at ``path``; raise ReparamError, which names it, if an attribute cannot be copied."""
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        reason = f"{_find_culprit(module, path)} ({type(error).__name__}: {error})"
        raise ReparamError(
            f"The model cannot be copied{reason}: remove what cannot be copied, or give its class a __deepcopy__."
        ) from error


def _find_culprit(module: nn.Module, path: str) -> str:
    # Copied one attribute at a time: deepcopy itself does not say where it failed.
    memo = copies_of_computed_tensors(module)
    for inner, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                copy.deepcopy(None if name == "_modules" else value, memo)
            except Exception:
                return f", because of the attribute {name!r} of {join(path, inner) or 'the model'}"
    return ""


class RewrittenModule(fx.GraphModule):
    """A graph module whose copies, unlike those of its base class, keep what its graph does not mention."""

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        # torch copies only what the graph names, into a new class with a generic name.
        own: Any = super().__deepcopy__(memo)
        type(own).__name__ = type(self).__name__
        vars(own).update({name: copy.deepcopy(value, memo) for name, value in _module_state(vars(self))})
        return own  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self).__name__, *super().__reduce__()[1])


def _unpickle(name: str, body: dict[str, Any], imports: str) -> RewrittenModule:
    inner: Any = reduce_graph_module(body, imports)
    own = RewrittenModule(inner, inner.graph, class_name=name)
    vars(own).update(_module_state(body))
    return own


def _module_state(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that any module may have, without those that only graph modules have."""
    internal = vars(fx.GraphModule(nn.Module(), fx.Graph())).keys() - vars(nn.Module()).keys()
    return ((name, value) for name, value in state.items() if name not in internal)


class ForwardRewriter:
    """Build the new forward of one module of a scope, with the forwards that are inlined into it.

    Attributes:
        module: the result, complete after :meth:`finish`.
    """

    def __init__(self, inlined: InlinedGraph, host: str, inlined_paths: frozenset[str]) -> None:
        self.scope_graph = inlined
        self.host = host
        self.old = inlined.module.get_submodule(host)
        inner = [
            path
            for path in inlined.captures
            if path in inlined_paths and _host_of(inlined, path, inlined_paths) == host
        ]
        # Inlined modules become plain containers: they keep their parameters and children, and have no forward.
        self.parts: dict[str, nn.Module] = {path: nn.Module() for path in inner}
        self.own_graph = inline(self.old, inlined.captures[host], self._capture_callee)
        self.graph = self.own_graph.graph
        self.node_of = self._map_nodes()
        self.module = RewrittenModule(nn.Module(), fx.Graph(), class_name=type(self.old).__name__)
        self.new: dict[str, nn.Module] = {}
        self.removed: list[str] = []

    def _capture_callee(self, path: str, caller: Capture, target: str) -> Capture | None:
        inner = join(self.host, path, target)
        return self.scope_graph.captures[inner] if inner in self.parts else None

    def _map_nodes(self) -> dict[fx.Node, fx.Node]:
        """Map the nodes of the scope's graph to those of this forward, as far as they appear in it."""
        found: dict[fx.Node, fx.Node] = {}
        skip = len(self.host) + 1 if self.host else 0
        for (path, node), value in self.scope_graph.inlined.items():
            if path == self.host or path in self.parts:
                # An argument of an inlined forward may be a structure in one graph and a single node in the other.
                for theirs, own in _pairs(value, self.own_graph.inlined[path[skip:], node]):
                    found.setdefault(theirs, own)
        return found

    def copies(self) -> dict[nn.Module, nn.Module]:
        """Return what replaces the module and those that are inlined; still empty before :meth:`copy_state`."""
        get = self.scope_graph.module.get_submodule
        return {self.old: self.module} | {get(path): part for path, part in self.parts.items()}

    def copy_state(self, memo: dict[int, Any], path: str) -> None:
        """Copy everything that the modules have; ``path`` is that of the scope."""
        get = self.scope_graph.module.get_submodule
        for inner, new in {self.host: self.module, **self.parts}.items():
            old = get(inner)
            vars(new).update(deep_copy(dict(_module_state(vars(old))), memo, old, join(path, inner)))

    def insert_call(self, conv: nn.Module, source: fx.Node, exit_node: fx.Node) -> str:
        """Replace ``exit_node`` of the scope's graph by a convolution of ``source``; return the convolution's path."""
        names = chain(("conv", "merged_conv"), (f"merged_conv{number}" for number in count(2)))
        name = next(name for name in names if not hasattr(self.old, name) and name not in self.new)
        self.new[name] = conv
        old = self.node_of[exit_node]
        with self.graph.inserting_before(old):
            node = self.graph.call_module(name, (self.node_of[source],))
        old.replace_all_uses_with(node)
        self._erase(old)
        self.node_of[exit_node] = node
        return join(self.host, name)

    def remove(self, node: fx.Node, before: fx.Node) -> None:
        """Remove a node of the scope's graph; its remaining users, which read metadata only, get ``before``."""
        old = self.node_of[node]
        old.replace_all_uses_with(self.node_of[before])
        self._erase(old)
        self.node_of[node] = self.node_of[before]

    def _erase(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        if node.op in ("call_module", "get_attr"):
            self.removed.append(str(node.target))
        # A folded scale or bias would otherwise remain as an unused parameter.
        for constant in inputs:
            if not constant.users and _is_constant(constant):
                self._erase(constant)

    def finish(self) -> None:
        """Complete the new module."""
        # Other nodes may still use what a removed node used.
        named = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for path in self.removed:
            if path not in named:
                _delete(self.module, path)
        for name, conv in self.new.items():
            self.module.register_module(name, conv)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._register_constant(node)
        for new in (self.module, *self.parts.values()):
            if "running_mean" not in new._buffers:  # the counter of a batch norm whose statistics were folded
                new._buffers.pop("num_batches_tracked", None)
        self.module.graph = self.graph

    def _register_constant(self, node: fx.Node) -> None:
        # torch.fx stores tensors that a forward creates on the traced root; they become buffers here.
        owner, _, name = str(node.target).rpartition(".")
        module = self.module.get_submodule(owner)
        if name.startswith("_tensor_constant") and not hasattr(module, name):
            value = get_attribute(*self.own_graph.constants[node])
            module.register_buffer(name, value.clone(), persistent=False)


def _host_of(inlined: InlinedGraph, path: str, inlined_paths: frozenset[str]) -> str:
    return next(outer for outer in inlined.call_stack(path) if outer not in inlined_paths)


def rewriters_for(inlined: InlinedGraph, points: Iterable[InsertionPoint]) -> dict[str, ForwardRewriter]:
    """Return, by path below the scope, the rewriter that every module to be rewritten is part of."""
    points = list(points)
    inlined_paths = frozenset[str]().union(*(point.inlined for point in points))
    rewritten = frozenset[str]().union(*(point.rewritten for point in points))
    hosts = {path: _host_of(inlined, path, inlined_paths) for path in rewritten}
    rewriters = {host: ForwardRewriter(inlined, host, inlined_paths) for host in sorted(set(hosts.values()))}
    return {path: rewriters[host] for path, host in hosts.items()}


def _pairs(theirs: Any, own: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield the nodes at the same places of two structures, as far as they have the same shape."""
    if isinstance(theirs, fx.Node) and isinstance(own, fx.Node):
        yield theirs, own
    elif isinstance(theirs, (tuple, list)) and isinstance(own, (tuple, list)):
        for a, b in zip(theirs, own, strict=True):
            yield from _pairs(a, b)
    elif isinstance(theirs, dict) and isinstance(own, dict):
        for name, a in theirs.items():
            yield from _pairs(a, own[name])


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op != "placeholder" and all(map(_is_constant, node.all_input_nodes)))


def _delete(root: nn.Module, path: str) -> None:
    """Delete a submodule or tensor, and the containers that are empty without it."""
    prefix, _, name = path.rpartition(".")
    try:
        owner = root.get_submodule(prefix)
    except AttributeError:  # its owner was deleted already
        return
    for entries in (owner._modules, owner._parameters, owner._buffers):
        entries.pop(name, None)
    vars(owner).pop(name, None)
    if prefix and not any((owner._modules, owner._parameters, owner._buffers)):
        _delete(root, prefix)
