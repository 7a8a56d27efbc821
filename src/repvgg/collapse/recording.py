"""What one call of a model did: a flat graph, and the calls of modules in it."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from repvgg import _structure
from repvgg.collapse.modules import is_inside, paths_around
from repvgg.collapse.tracked import UNKNOWN, Unknown, is_tracked
from repvgg.errors import NotLinearError

_SCALARS = {int, float, bool, str, bytes, complex, type(None), torch.memory_format}
RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *("multinomial", "poisson", "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "log_normal_"),
    *("cauchy_", "geometric_", "trunc_normal_"),
}


#: The caveat of a frame whose own code may do something else in each call.
DRAWS_OUTSIDE_PYTORCH = "draws random numbers from Python's or NumPy's generator"


@dataclass(frozen=True)
class Decision:
    """A place where the code branched on something that another call may change.

    Attributes:
        outcome: which way it went.
        where: file and line.
        known: whether the other way can be tried.
        unknown: whether it was on an unknown value.
        unchecked: whether it was on something that the plain model does not check, such as the layout of a tensor.
    """

    outcome: bool
    where: str
    known: bool = True
    unknown: bool = False
    unchecked: bool = False


@dataclass(eq=False, repr=False)
class Frame:
    """One call of a module that has a Python forward.

    Attributes:
        path: of the module.
        parent: the frame of the caller; None for the root.
        args: positional arguments: nodes for tensors and for numbers read from tensors, in the caller's structure.
        kwargs: the same for keyword arguments.
        output: the same for what it returned.
        items: the nodes that its own code ran and the frames of the modules that it called, in execution order.
        decisions: on which numbers its own code branched.
        caveats: effects of its own code that the graph does not show, in words.
        methods: functions of the caller's code that led to the call, innermost first.
        indexes: of its nodes, by the path of the recorded module, for :mod:`repvgg.collapse.variants`.
    """

    path: str
    parent: Frame | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    items: list[fx.Node | Frame] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    methods: tuple[str, ...] = ()
    indexes: dict[str, Any] = field(default_factory=dict)

    def frames(self) -> Iterator[Frame]:
        """Yield this frame and all below it, callers first."""
        yield self
        for item in self.items:
            if isinstance(item, Frame):
                yield from item.frames()

    def stack(self) -> Iterator[Frame]:
        """Yield this frame and those around it, innermost first."""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.parent

    def calls(self) -> Iterator[tuple[str, fx.Node | Frame]]:
        """Yield the calls of modules by its own code: the path, and the frame or, for a leaf, the node."""
        for item in self.items:
            if isinstance(item, Frame):
                yield item.path, item
            elif item.op == "call_module":
                yield str(item.target), item

    def nodes(self) -> Iterator[fx.Node]:
        """Yield all nodes that ran during the call."""
        for item in self.items:
            if isinstance(item, Frame):
                yield from item.nodes()
            else:
                yield item


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """What one call of a model did.

    Attributes:
        module: the model.
        graph: all nodes in execution order. Calls of torch's own leaf modules are ``call_module`` nodes, parameters
            and buffers are ``get_attr`` nodes; all else are functions, methods and placeholders.
        root: the frame of the model.
        frame_of: the frame whose code ran a node.
        escaped: nodes whose tensors code may read that the recording does not show, with the reason.
        opaque: nodes that must stay as they are, with the reason.
        changed: paths of the modules whose attributes the call changed, other than to constants.
        decisions: those that another call can force: of the root's own code, or on an unknown argument.
        own_devices: for a device, the paths of the parameters and buffers that a forward read it from.
        on_meta: whether it ran on meta tensors.
        assigned: nodes whose tensor the forward assigned to ``.data`` of a parameter, with its path. It is a constant,
            and read under this name from there on; or the node is opaque.
        writes_parameters: whether the forward writes to the memory of parameters.
        read_values: whether the run may depend on elements of tensors.
        changed_by_others: those in ``changed`` that other code changed than the module's forward and what it calls.
    """

    module: nn.Module
    graph: fx.Graph
    root: Frame
    frame_of: dict[fx.Node, Frame]
    escaped: dict[fx.Node, str]
    opaque: dict[fx.Node, str]
    changed: frozenset[str]
    decisions: tuple[Decision, ...]
    own_devices: dict[torch.device, list[str]]
    on_meta: bool
    assigned: dict[fx.Node, str] = field(default_factory=dict)
    writes_parameters: bool = False
    read_values: bool = False
    changed_by_others: frozenset[str] = frozenset()

    def all_calls(self) -> Iterator[tuple[Frame, str, fx.Node | Frame]]:
        """Yield the calls of all modules, each with the frame of the caller; see :meth:`Frame.calls`."""
        return ((frame, path, call) for frame in self.root.frames() for path, call in frame.calls())

    @cached_property
    def first_calls(self) -> Mapping[str, Frame]:
        """The first call of each module that has a Python forward, by its path."""
        found: dict[str, Frame] = {}
        for frame in self.root.frames():
            found.setdefault(frame.path, frame)
        return found

    def owner(self, node: fx.Node) -> str:
        """Return the path of the module whose forward ran ``node``."""
        return self.frame_of.get(node, self.root).path

    def calls(self) -> Iterator[tuple[fx.Node, str]]:
        """Yield the nodes that call a module, with its path."""
        return ((node, str(node.target)) for node in self.graph.nodes if node.op == "call_module")

    def called_paths(self) -> set[str]:
        """Return the paths of all modules that ran."""
        return {path for _, path in self.calls()} | {frame.path for frame in self.root.frames()}

    @cached_property
    def users(self) -> Mapping[str, set[str]]:
        """For each path, the modules whose code reads a tensor there or below, or calls a leaf module there."""
        found: dict[str, set[str]] = defaultdict(set)
        for node in self.graph.nodes:
            if node.op == "get_attr":
                readers = {self.owner(user) for user in node.users if user.op != "output"}
                for path in paths_around([str(node.target)]):
                    found[path] |= readers
            elif node.op == "call_module":
                found[str(node.target)].add(self.owner(node))
        return found

    def is_used_outside(self, path: str, *, except_by: Collection[str] = ()) -> bool:
        """Whether code of modules that are not inside ``path`` reads a tensor there, or calls a leaf module there."""
        users = self.users.get(path, set[str]()).difference(except_by)
        return any(not is_inside(user, path) for user in users)

    def constant(self, node: fx.Node) -> Any:
        """Return the parameter, buffer or attribute that a ``get_attr`` node names."""
        return operator.attrgetter(str(node.target))(self.module)


def mark_constants(graph: fx.Graph) -> None:
    """Find all constants of a graph, in execution order, so that :func:`is_constant` need not recur deeply."""
    for node in graph.nodes:
        is_constant(node)


def is_constant(node: fx.Node) -> bool:
    """Whether a node depends on parameters and numbers only, and is the same in each call."""
    if "constant" not in node.meta:
        node.meta["constant"] = node.op == "get_attr" or (
            node.op.startswith("call") and node.target is not unrecorded and all(map(is_constant, node.all_input_nodes))
        )
    return bool(node.meta["constant"])


def is_number(node: fx.Node) -> bool:
    """Whether a node is a number that was read from a tensor."""
    return bool(node.meta.get("number"))


def constants_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the constants that a node is computed from, itself excepted."""
    waiting = [n for n in node.all_input_nodes if is_constant(n)]
    found: set[fx.Node] = set()
    while waiting:
        constant = waiting.pop()
        if constant not in found:
            found.add(constant)
            waiting += constant.all_input_nodes
            yield constant


def unrecorded() -> Any:
    """Stand for code that computed a tensor and could not be recorded.

    Raises:
        NotLinearError: always.
    """
    raise NotLinearError("it comes from code that cannot be recorded")


def map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to the leaves of arguments; a slice is a container here."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is tuple:
        return tuple([map_values(function, item) for item in value])
    if kind is list or kind is immutable_list:
        return [map_values(function, item) for item in value]
    if kind is dict or kind is immutable_dict:
        return {key: map_values(function, item) for key, item in value.items()}
    if kind is slice:
        return slice(*(map_values(function, item) for item in (value.start, value.stop, value.step)))
    if isinstance(value, (Tensor, fx.Node, nn.Module)) or is_tracked(value) or kind is Unknown or value is UNKNOWN:
        return function(value)
    return _structure.map_leaves(function, value)


def leaves(value: Any) -> list[Any]:
    """Return the leaves of arguments, in order."""
    found: list[Any] = []

    def visit(leaf: Any) -> Any:
        found.append(leaf)
        return leaf  # containers are built anew, and may refuse anything else

    map_values(visit, value)
    return found


def as_fx_arguments(value: Any) -> Any:
    """Return arguments as fx stores them: in its own kinds of containers."""
    kind = type(value)
    if kind in _SCALARS or isinstance(value, (fx.Node, slice)):
        return value
    if isinstance(value, dict):
        return {key: as_fx_arguments(item) for key, item in value.items()}
    if isinstance(value, tuple):  # the iterator of a tracked shape would record each size
        return tuple([as_fx_arguments(item) for item in tuple.__iter__(value)])
    if isinstance(value, list):
        return [as_fx_arguments(item) for item in value]
    inside = leaves(value)
    return tuple(inside) if any(isinstance(leaf, fx.Node) for leaf in inside) and inside != [value] else value
