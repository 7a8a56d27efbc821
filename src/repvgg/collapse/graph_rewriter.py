"""Deep copies of models, also of those that hold what cannot be copied as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from repvgg.collapse.capture import Capture, join
from repvgg.collapse.inline import Flat, flatten
from repvgg.collapse.regions import Placing
from repvgg.collapse.symbolic_eval import attribute
from repvgg.errors import ReparamError
from repvgg.symbolic import things_in

Value = TypeVar("Value")


def copies_of_results(model: nn.Module) -> dict[int, Any]:
    """Copies of the tensors in attributes that were computed with gradients: a deep copy refuses to make them.

    A forward leaves such tensors behind where it keeps features or computes weights.
    """
    things = (value for part in model.modules() for value in things_in(vars(part).values()))
    return {id(v): v.detach().clone() for v in things if isinstance(v, Tensor) and not v.is_leaf}


def copied(value: Value, memo: dict[int, Any], module: nn.Module, path: str = "") -> Value:
    """A deep copy of something in ``module``, itself at ``path``, in which what ``memo`` holds is found copied already.

    Raises:
        ReparamError: an attribute cannot be copied; the text names it.
    """
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        reason = f"{_culprit(module, path)} ({type(error).__name__}: {error})"
        raise ReparamError(
            f"The model cannot be copied{reason}: take off what cannot be copied, or give its class a __deepcopy__."
        ) from error


def _culprit(module: nn.Module, path: str) -> str:
    memo = copies_of_results(module)
    for inner, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                copy.deepcopy(None if name == "_modules" else value, memo)
            except Exception:
                return f", because of the attribute {name!r} of {join(path, inner) or 'the model'}"
    return ""


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
    """A new forward for one module of a unit, with what is written out in it, from a copy of the old ones.

    Attributes:
        module: the outcome, complete once :meth:`finish` was called.
    """

    def __init__(self, flat: Flat, host: str, inlined: frozenset[str]) -> None:
        self.old = flat.module.get_submodule(host)
        self.host = host
        self.inner = [path for path in flat.captures if path in inlined and _host_of(flat, path, inlined) == host]
        self.parts: dict[str, nn.Module] = {path: nn.Module() for path in self.inner}
        self.flat = flat
        own = flatten(self.old, flat.captures[host], self._look_into)
        self.own, self.graph = own, own.graph
        self.node = self._nodes()
        self.module = Grafted(nn.Module(), fx.Graph(), class_name=type(self.old).__name__)
        self.new: dict[str, nn.Module] = {}
        self.gone: list[str] = []

    def _look_into(self, path: str, caller: Capture, target: str) -> Capture | None:
        inner = join(self.host, path, target)
        return self.flat.captures[inner] if inner in self.parts else None

    def _nodes(self) -> dict[fx.Node, fx.Node]:
        """For nodes of the unit's graph that are known in this forward, the node of this graph."""
        found: dict[fx.Node, fx.Node] = {}
        skip = len(self.host) + 1 if self.host else 0
        for (path, node), value in self.flat.value.items():
            if path == self.host or path in self.parts:
                for theirs, own in _pairs(value, self.own.value[path[skip:], node]):
                    found.setdefault(theirs, own)
        return found

    def copies(self) -> dict[int, nn.Module]:
        """What stands in the copy, still empty, for the module and for those that are written out."""
        get = self.flat.module.get_submodule
        return {id(self.old): self.module} | {id(get(path)): part for path, part in self.parts.items()}

    def copy_state(self, memo: dict[int, Any], path: str) -> None:
        """Take over everything that the modules have, as copies; ``path`` is that of the unit."""
        get = self.flat.module.get_submodule
        for inner, new in {self.host: self.module, **self.parts}.items():
            old = get(inner)
            vars(new).update(copied(dict(_beside_graph(vars(old))), memo, old, join(path, inner)))

    def call(self, conv: nn.Module, source: fx.Node, exit_node: fx.Node) -> str:
        """Let ``exit_node``, of the unit's graph, be a convolution of ``source``; the outcome is its path."""
        name = next(name for name in _names() if not hasattr(self.old, name) and name not in self.new)
        self.new[name] = conv
        old = self.node[exit_node]
        with self.graph.inserting_before(old):
            node = self.graph.call_module(name, (self.node[source],))
        old.replace_all_uses_with(node)
        self._erase(old)
        self.node[exit_node] = node
        return join(self.host, name)

    def take_out(self, node: fx.Node, before: fx.Node) -> None:
        """Take out a node of the unit's graph; what still asks for it gets what was ``before`` it."""
        old = self.node[node]
        old.replace_all_uses_with(self.node[before])
        self._erase(old)
        self.node[node] = self.node[before]

    def _erase(self, node: fx.Node) -> None:
        """Take out a node, and the constants that only it used."""
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        if node.op in ("call_module", "get_attr"):
            self.gone.append(str(node.target))
        for constant in inputs:
            if not constant.users and _is_constant(constant):
                self._erase(constant)

    def finish(self) -> None:
        """Complete the new module."""
        named = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for path in self.gone:
            if path not in named:
                _delete(self.module, path)
        for name, conv in self.new.items():
            self.module.register_module(name, conv)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._keep_constant(node)
        for new in (self.module, *self.parts.values()):
            if "running_mean" not in new._buffers:  # what counts batches for nothing
                new._buffers.pop("num_batches_tracked", None)
        self.module.graph = self.graph

    def _keep_constant(self, node: fx.Node) -> None:
        """Tensors that a forward made while it was captured become buffers."""
        owner, _, name = str(node.target).rpartition(".")
        module = self.module.get_submodule(owner)
        if name.startswith("_tensor_constant") and not hasattr(module, name):
            module.register_buffer(name, attribute(*self.own.constants[node]).clone(), persistent=False)


def _host_of(flat: Flat, path: str, inlined: frozenset[str]) -> str:
    return next(outer for outer in flat.lineage(path) if outer not in inlined)


def grafts_of(flat: Flat, placings: Iterable[Placing]) -> dict[str, Graft]:
    """For every module that is to be rewritten the graft that it is part of, by its path below the unit."""
    placings = list(placings)
    inlined = frozenset[str]().union(*(placing.inlined for placing in placings))
    rewritten = frozenset[str]().union(*(placing.rewritten for placing in placings))
    hosts = {path: _host_of(flat, path, inlined) for path in rewritten}
    grafts = {host: Graft(flat, host, inlined) for host in sorted(set(hosts.values()))}
    return {path: grafts[host] for path, host in hosts.items()}


def _pairs(theirs: Any, own: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The nodes at the same places of two structures, as far as they are the same."""
    if isinstance(theirs, fx.Node) and isinstance(own, fx.Node):
        yield theirs, own
    elif isinstance(theirs, (tuple, list)) and isinstance(own, (tuple, list)):
        for a, b in zip(theirs, own, strict=True):
            yield from _pairs(a, b)
    elif isinstance(theirs, dict) and isinstance(own, dict):
        for name, a in theirs.items():
            yield from _pairs(a, own[name])


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
