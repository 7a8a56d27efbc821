"""Give a module a new forward, in which regions are single convolutions.

The module stays what it is: its class, attributes, hooks, methods and the parts that other code uses. Only ``forward``
is written anew, from the recorded operations.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from itertools import chain, count
from typing import Any, TypeAlias, TypeVar, cast

from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.nn.modules.batchnorm import _BatchNorm
from torch.package.importer import sys_importer

from repvgg.collapse.emit import emit
from repvgg.collapse.insertion import InsertionPoint
from repvgg.collapse.methods import RefusedMethod
from repvgg.collapse.modules import is_computed_attribute, is_inside, is_leaf, join, path_below
from repvgg.collapse.recording import Recording, is_constant
from repvgg.errors import ReparamError
from repvgg.symbolic import things_in

Copied = TypeVar("Copied")
_Refused: TypeAlias = tuple[tuple[str, RefusedMethod], ...]  # by name

# A compiled call would run the old code; the others are what graph modules have besides the attributes of a module.
_NOT_COPIED = {"_compiled_call_impl"} | (
    vars(fx.GraphModule(nn.Module(), fx.Graph())).keys() - vars(nn.Module()).keys()
)


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


class NewForward:
    """Mixin of classes that are derived from those of a model: they are copied and pickled as what they derive from.

    Attributes:
        graph: of the new forward, if there is one.
    """

    graph: fx.Graph
    _source: tuple[type[nn.Module], str, str, str, _Refused]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_instance, type(self)._source, vars(self)


def give_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Replace the forward of a module by the code of a graph; its class becomes a subclass of its own."""
    code = graph.python_code("self")
    base: type[nn.Module] = type(module)
    name = base.__name__
    refused: _Refused = ()
    if issubclass(base, NewForward):  # of an earlier pass
        base, _, _, _, refused = base._source
    if issubclass(base, fx.GraphModule) or (issubclass(base, _BatchNorm) and "running_mean" not in module._buffers):
        base = nn.Module  # what is left of it has no graph of its own, or does not normalize
    vars(module).pop("forward", None)
    imports = _format_import_block(code.globals, sys_importer)
    module.__class__ = _derived_class(cast("Any", base), name, code.src, imports, refused)
    type(module).graph = graph  # type: ignore[attr-defined]


def refuse_attributes(module: nn.Module, refused: dict[str, RefusedMethod]) -> None:
    """Refuse properties and special methods of a module by their names; its class becomes a subclass of its own."""
    kind: Any = type(module)
    base, name, source, imports, before = (
        kind._source if issubclass(kind, NewForward) else (kind, kind.__name__, "", "", ())
    )
    module.__class__ = _derived_class(base, name, source, imports, tuple(sorted((dict(before) | refused).items())))
    if source:
        type(module).graph = kind.graph  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _derived_class(base: Any, name: str, source: str, imports: str, refused: _Refused) -> Any:
    namespace: dict[str, Any] = {"__name__": base.__module__}  # warnings read the name of their caller's module
    attributes: dict[str, Any] = {"_source": (base, name, source, imports, refused), "__module__": base.__module__}
    if source:
        exec(imports, namespace)
        attributes["forward"] = _forward_from_src(source, namespace)
    for attribute, method in refused:
        old = inspect.getattr_static(base, attribute, None)
        setters = (old.fset, old.fdel) if isinstance(old, property) else ()
        attributes[attribute] = property(_refused_property, *setters) if method.is_property else method
    if refused:
        attributes["__getattr__"] = _getattr_of(base, dict(refused))
    return type(name, (NewForward, base), attributes)


def _refused_property(module: nn.Module) -> Any:
    raise AttributeError  # then Python calls __getattr__, which knows the name


def _getattr_of(base: Any, refused: Mapping[str, RefusedMethod]) -> Callable[[nn.Module, str], Any]:
    def getattr_or_refuse(self: nn.Module, name: str) -> Any:
        if name in refused:
            refused[name]()
        return base.__getattr__(self, name)

    return getattr_or_refuse


def _empty_instance(base: type[nn.Module], name: str, source: str, imports: str, refused: _Refused = ()) -> nn.Module:
    return object.__new__(_derived_class(cast("Any", base), name, source, imports, refused))  # type: ignore[no-any-return]


class ForwardRewriter:
    """Build the new forward of one module of a recording, with the forwards that are inlined into it.

    Attributes:
        module: the result, complete after :meth:`finish`.
    """

    def __init__(self, recording: Recording, host: str, inlined: Collection[str]) -> None:
        self.recording, self.host = recording, host
        self.old = recording.module.get_submodule(host)
        # Inlined modules become plain containers: they keep their parameters and children, and have no forward.
        self.parts: dict[str, nn.Module] = {path: nn.Module() for path in inlined}
        emission = emit(recording, host, self.parts.keys())
        self.graph, self.node_of, self.statements = emission.graph, emission.node_of, emission.statements
        self.module: nn.Module = object.__new__(type(self.old))
        self.new: dict[str, nn.Module] = {}
        self.removed: list[str] = []

    def copies(self) -> dict[nn.Module, nn.Module]:
        """Return what replaces the module and those that are inlined; still empty before :meth:`copy_state`."""
        get = self.recording.module.get_submodule
        return {self.old: self.module} | {get(path): part for path, part in self.parts.items()}

    def copy_state(self, memo: dict[int, Any], path: str) -> None:
        """Copy everything that the modules have; ``path`` is that of the recorded module in the model."""
        get = self.recording.module.get_submodule
        for inner, new in {self.host: self.module, **self.parts}.items():
            state = {name: value for name, value in vars(get(inner)).items() if name not in _NOT_COPIED}
            vars(new).update(deep_copy(state, memo, get(inner), join(path, inner)))

    def insert_call(self, conv: nn.Module, source: fx.Node, exit_node: fx.Node) -> str:
        """Replace the recorded ``exit_node`` by a convolution of ``source``; return the convolution's path."""
        names = chain(("conv", "merged_conv"), (f"merged_conv{number}" for number in count(2)))
        name = next(name for name in names if not hasattr(self.old, name) and name not in self.new)
        self.new[name] = conv
        if exit_node in self.statements:  # its tensor is that of the node that it writes to
            self.graph.erase_node(self.statements[exit_node])
        old = self.node_of[exit_node]
        with self.graph.inserting_before(old):
            node = self.graph.call_module(name, (self.node_of[source],))
        old.replace_all_uses_with(node)
        self._erase(old)
        self.node_of[exit_node] = node
        return join(self.host, name)

    def remove(self, node: fx.Node, before: fx.Node) -> None:
        """Remove a recorded node; its remaining users, which read metadata only, get ``before``."""
        if node in self.statements:
            self.graph.erase_node(self.statements[node])
        else:
            old = self.node_of[node]
            if not old._erased:
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
            if not constant._erased and not constant.users and is_constant(constant):
                self._erase(constant)

    def finish(self) -> None:
        """Complete the new module."""
        self._drop_unused_constants()
        # Other nodes may still use what a removed node used.
        named = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        for path in self.removed:
            if path not in named and not self._is_read_elsewhere(join(self.host, path)):
                owner = path.rpartition(".")[0]
                # If PyTorch's hooks compute it, the module that holds what they read has no caller left: it goes too.
                is_computed = owner and is_computed_attribute(self.recording.module, join(self.host, path))
                if is_computed and owner not in named and not self._is_read_elsewhere(join(self.host, owner)):
                    path = owner
                _delete(self.module, path, named)
        for name, conv in self.new.items():
            self.module.register_module(name, conv)
        for new in (self.module, *self.parts.values()):
            if "running_mean" not in new._buffers:  # the counter of a batch norm whose statistics were folded
                new._buffers.pop("num_batches_tracked", None)
        give_forward(self.module, self.graph)

    def _drop_unused_constants(self) -> None:
        """Remove what only computed kernels that are folded now."""
        live = {node for node in self.graph.nodes if not is_constant(node)}
        waiting = list(live)
        while waiting:
            node = waiting.pop()
            # An assignment belongs to the tensor that it writes to.
            assignments = [user for user in node.users if user.target is operator.setitem and user.args[0] is node]
            found = {*node.all_input_nodes, *assignments} - live
            live |= found
            waiting += found
        for node in reversed(list(self.graph.nodes)):
            if node not in live:
                self.graph.erase_node(node)
                if node.op in ("get_attr", "call_module"):
                    self.removed.append(str(node.target))
        for path in self.parts:  # what a caller put other tensors in place of
            part = self.recording.module.get_submodule(path)
            if is_leaf(part) and not self._is_read_elsewhere(path):
                self.removed += [
                    join(path_below(path, self.host), name) for name in (*part._parameters, *part._buffers)
                ]
        for node, path in self.recording.assigned.items():  # nothing but the assignment names the parameter
            is_own = self.recording.owner(node) in (self.host, *self.parts) and is_inside(path, self.host)
            if is_own and self.node_of[node] not in live:
                self.removed.append(path_below(path, self.host))

    def _is_read_elsewhere(self, path: str) -> bool:
        """Whether code that stays reads a parameter, or calls a module."""
        return self.recording.is_used_outside(path, except_by=(self.host, *self.parts))


def rewriters_for(recording: Recording, points: Iterable[InsertionPoint]) -> dict[str, ForwardRewriter]:
    """Return, by path below the recorded module, the rewriter that every module to be rewritten is part of."""
    points = list(points)
    inlined = frozenset[str]().union(*(point.inlined for point in points))
    rewritten = frozenset[str]().union(*(point.rewritten for point in points))
    hosts = {path: _host_of(recording, path, inlined) for path in rewritten}
    rewriters = {
        host: ForwardRewriter(recording, host, [path for path in hosts if path != host and hosts[path] == host])
        for host in sorted(set(hosts.values()))
    }
    return {path: rewriters[host] for path, host in hosts.items()}


def _host_of(recording: Recording, path: str, inlined: Collection[str]) -> str:
    return next(outer.path for outer in recording.first_calls[path].stack() if outer.path not in inlined)


def _delete(root: nn.Module, path: str, called: Collection[str]) -> None:
    """Delete a submodule or tensor, and the containers that are empty without it and not ``called``."""
    prefix, _, name = path.rpartition(".")
    try:
        owner = root.get_submodule(prefix)
    except AttributeError:  # its owner was deleted already
        return
    for entries in (owner._modules, owner._parameters, owner._buffers):
        entries.pop(name, None)
    vars(owner).pop(name, None)
    if prefix not in ("", *called) and not any((owner._modules, owner._parameters, owner._buffers)):
        _delete(root, prefix, called)
