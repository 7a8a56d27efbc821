"""A module as a new graph module in which regions are single convolutions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module

from repvgg.collapse.copies import copied
from repvgg.collapse.plan import Rewrite
from repvgg.collapse.regions import Region


class Grafted(fx.GraphModule):
    """A graph module whose copies keep what its graph does not mention: hooks, attributes, parts that others use."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Grafted:
        """A copy of the graph and of everything beside it."""
        own: Any = super().__deepcopy__(memo)
        type(own).__name__ = type(self).__name__
        vars(own).update({name: copy.deepcopy(value, memo) for name, value in _beside_graph(vars(self))})
        return own  # type: ignore[no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        """As any graph module, and one of this kind again afterwards."""
        return _unpickled, (type(self).__name__, *super().__reduce__()[1])


def _unpickled(name: str, body: dict[str, Any], imports: str) -> Grafted:
    inner: Any = reduce_graph_module(body, imports)
    own = Grafted(inner, inner.graph, class_name=name)
    vars(own).update(_beside_graph(body))
    return own


def _beside_graph(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The attributes that any module may have, and not those of graph modules."""
    internal = vars(fx.GraphModule(nn.Module(), fx.Graph())).keys() - vars(nn.Module()).keys()
    return ((name, value) for name, value in state.items() if name not in internal)


class Graft:
    """A new graph of one module, from a copy of the old one.

    Attributes:
        module: the outcome, complete once :meth:`finish` was called.
    """

    def __init__(self, rewrite: Rewrite, memo: dict[int, Any]) -> None:
        self.rewrite = rewrite
        self.graph = fx.Graph()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(rewrite.captured.graph, self.nodes))
        self.module = Grafted(nn.Module(), fx.Graph(), class_name=type(rewrite.module).__name__)
        self.new: dict[str, nn.Module] = {}
        self.gone: list[str] = []
        self._copy_state(memo)

    def _copy_state(self, memo: dict[int, Any]) -> None:
        """Everything that the module has, except for the parts that are replaced."""
        old = self.rewrite.module
        memo[id(old)] = self.module
        regions = [region for region in self.rewrite.regions.found if not region.is_chain]
        inside = {id(part): nn.Identity() for region in regions for part in region.modules(old)}
        memo.update(inside)
        vars(self.module).update(copied(dict(_beside_graph(vars(old))), memo, old, self.rewrite.path))
        for part in inside:
            del memo[part]

    def replace(self, region: Region, conv: nn.Module) -> str:
        """Put a convolution in the place of a region; the outcome is its name."""
        name = next(name for name in _names() if not hasattr(self.rewrite.module, name) and name not in self.new)
        self.new[name] = conv
        exit_node = self.nodes[region.exit]
        with self.graph.inserting_before(exit_node):
            node = self.graph.call_module(name, (self.nodes[region.source],))
        exit_node.replace_all_uses_with(node)
        for step in reversed(region.steps):
            self._erase(self.nodes[step.node])
        return name

    def _erase(self, node: fx.Node) -> None:
        """Take out a node, and the constants that only it used."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        if node.op in ("call_module", "get_attr"):
            self.gone.append(str(node.target))
        for constant in inputs:
            if not constant.users and _is_constant(constant):
                self._erase(constant)

    def finish(self) -> nn.Module:
        """The new module."""
        named = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for path in self.gone:
            if path not in named:
                _delete(self.module, path)
        for name, conv in self.new.items():
            self.module.register_module(name, conv)
        root = self.rewrite.captured.root
        for name in sorted(named):
            if name.startswith("_tensor_constant") and not hasattr(self.module, name):
                self.module.register_buffer(name, getattr(root, name).clone(), persistent=False)
        self.module.graph = self.graph
        return self.module


def _is_constant(node: fx.Node) -> bool:
    """Whether a node depends on no input."""
    return node.op == "get_attr" or (node.op != "placeholder" and all(map(_is_constant, node.all_input_nodes)))


def _delete(root: nn.Module, path: str) -> None:
    """Take a submodule or tensor out, and the containers that are empty without it."""
    prefix, _, name = path.rpartition(".")
    try:
        owner = root.get_submodule(prefix)
    except AttributeError:  # what it was in is gone as well
        return
    for entries in (owner._modules, owner._parameters, owner._buffers):
        entries.pop(name, None)
    vars(owner).pop(name, None)
    if prefix and not any((owner._modules, owner._parameters, owner._buffers)):
        _delete(root, prefix)


def _names() -> Iterator[str]:
    yield "conv"
    yield "merged_conv"
    yield from (f"merged_conv{number}" for number in count(2))
