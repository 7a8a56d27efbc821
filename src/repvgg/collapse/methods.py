"""Methods and properties besides ``forward``: which of them would return something else once a region is merged.

A method that ran in the recorded call is known exactly. Of any other, only names are read from its bytecode: it may use
a part whose path consists of names that it reads. The plain model refuses such a call in one sentence.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from types import FunctionType
from typing import Any, cast

from torch import fx, nn

from repvgg.collapse.code import code_facts, function_in, is_method_call, own_attributes, reachable_code
from repvgg.collapse.insertion import Replacement
from repvgg.collapse.modules import is_inside, path_below
from repvgg.collapse.recording import Frame, Recording, constants_of
from repvgg.collapse.region import Region
from repvgg.errors import RefusedPropertyError, UsageError

_CHILDREN = {"children", "named_children", "_modules"}
_SPECIAL = ("__getitem__", "__iter__")  # methods with such names that users write for their parts
# What a convolution with a batch norm folded into it still says of itself, and a batch norm that is an identity now.
_DESCRIPTIONS = {
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "num_features", "eps"),
    *("device", "dtype"),
}
_DESCRIBED = {"weight", "bias", "running_mean", "running_var"}  # their device and dtype are descriptions


@dataclass(frozen=True)
class RefusedMethod:
    """Stands in the plain model for a method or a property that uses parts which are merged."""

    name: str
    part: str
    is_property: bool = False

    @property
    def is_of_class(self) -> bool:
        """Whether Python looks for it in the class, and not in the instance."""
        return self.is_property or self.name.endswith("__")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the call.

        Raises:
            UsageError: always; for a property, an AttributeError as well.
        """
        kind, verb = (RefusedPropertyError, "read") if self.is_property else (UsageError, "call")
        raise kind(f"The plain model has no {self}: {verb} that of the model that was collapsed.")

    def __str__(self) -> str:
        return f"{self.name}{'' if self.is_property else '()'}, which uses {self.part!r}, a part that is merged"


def refused_methods(recording: Recording, done: Replacement) -> Iterator[tuple[str, RefusedMethod]]:
    """Yield the methods that would compute something else once a region is replaced, with the paths of their modules.

    Methods that ran in the recorded call and are part of a forward that stays keep their meaning: the region is only
    merged if they run all of it.
    """
    region = done.region
    used, owners = _parts(recording, done)
    for path in sorted({outer for part in used for outer in _paths_to(part)[:-1]}):
        module = recording.module.get_submodule(path)
        below = [part for part in used if is_inside(part, path) and part != path]
        # A region that is inside of a part does not change what a call of the part computes.
        changed = {
            part
            for one in below
            for part in _paths_to(one)
            if part != path and is_inside(part, path) and not all(is_inside(other, part) for other in (*used, *owners))
        }
        runs_all = _methods_that_run(region, recording, path)
        for name, code in _public_methods(cast("Any", type(module))).items() if changed else ():
            touched = sorted(part for part in changed if code.may_use(path_below(part, path)))
            all_touched = all(any(part in touched for part in _paths_to(one)) for one in below)
            in_order = not any(item.isdecimal() for part in below for item in path_below(part, path).split("."))
            keeps = done.insertion.kind == "chain" and (
                name in runs_all or code.only_describes or (all_touched and in_order and not code.is_property)
            )
            # A forward that stays calls it: the region is inside of a part that both call as a whole.
            keeps = keeps or (name in runs_all and path not in done.insertion.rewritten and not code.is_property)
            if touched and not keeps:
                yield path, RefusedMethod(f"{type(module).__name__}.{name}", touched[0], code.is_property)


def _parts(recording: Recording, done: Replacement) -> tuple[list[str], list[str]]:
    """Return the paths of the modules and tensors that a region uses, and of the modules that run its functions."""
    regions = [done.region, *(more.norm for more in done.absorbed)]
    steps = [step for one in regions for step in one.steps if step.computes]
    modules = [str(step.node.target) for step in steps if step.node.op == "call_module"]
    functions = [step.node for step in steps if step.node.op != "call_module"]
    tensors = {str(n.target) for node in functions for n in constants_of(node) if n.op == "get_attr"}
    return [*modules, *sorted(tensors)], [recording.owner(node) for node in functions]


def _paths_to(path: str) -> list[str]:
    """Return "", "a", "a.b", … up to a path."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(len(names) + 1)]


def _methods_that_run(region: Region, recording: Recording, path: str) -> set[str]:
    """Return the methods of the module at ``path`` that run all steps of a region."""
    steps = [step.node for step in region.steps if step.computes]
    run = [methods_around(recording, node, path) for node in steps]
    return set.intersection(*run) if run else set()


def methods_around(recording: Recording, node: fx.Node, path: str) -> set[str]:
    """Return the functions in the code of the module at ``path`` that led to a node."""
    item = item_of(recording, node, path)
    return set() if item is None else set(item.methods if isinstance(item, Frame) else item.meta["methods"])


def item_of(recording: Recording, node: fx.Node, path: str) -> fx.Node | Frame | None:
    """Return what the code of the module at ``path`` ran that a node is part of: the node, or the call around it."""
    item: fx.Node | Frame = node
    for frame in recording.frame_of[node].stack():
        if frame.path == path:
            return item
        item = frame
    return None


def separating_method(region: Region, recording: Recording, path: str, *, others: bool) -> str | None:
    """Return a method of the module at ``path`` that runs some steps of a region and not all.

    With ``others``, methods that did not run in the recorded call count as well, by the parts that they call.
    """
    facts = code_facts(recording.module.get_submodule(path))
    steps = [step.node for step in region.steps if step.computes]
    items = [item for node in steps if (item := item_of(recording, node, path)) is not None]
    public = {name for name in facts.methods if not name.startswith("_")}  # only these can be called from outside
    run = [set(item.methods if isinstance(item, Frame) else item.meta["methods"]) & public for item in items]
    executed = set[str]().union(*run)
    partial = next((name for name in executed if not all(name in methods for methods in run)), None)
    if partial is not None or not others:
        return partial
    names = {
        path_below(item.path if isinstance(item, Frame) else str(item.target), path).partition(".")[0]
        for item in items
        if isinstance(item, Frame) or item.op == "call_module"
    }
    called = ((name, facts.calls[name] & names) for name in public - executed)
    return next((name for name, parts in called if parts and parts != names), None)


@dataclass(frozen=True, eq=False)
class _Code:
    """Names that a method, and those that it calls, may read.

    Attributes:
        names: all.
        read: those that are not only called.
        repeated: those that one call may read more than once, such as in ``self.head.head``.
        is_property: whether it is a property.
        only_describes: whether a property reads nothing of a part but what describes it.
    """

    names: frozenset[str]
    read: frozenset[str]
    repeated: frozenset[str]
    is_property: bool = False
    only_describes: bool = False

    def may_use(self, path: str) -> bool:
        """Whether the code may use the part at ``path`` below its module by itself."""
        names = path.split(".")
        if any(names.count(name) > 1 and name not in self.repeated for name in names):
            return False
        first = names[0] in self.names or bool(_CHILDREN & self.names)
        for before, name in pairwise(names):
            if not (before in self.read if name.isdecimal() and not before.isdecimal() else name in self.names):
                return False
        return first


@lru_cache(maxsize=1024)
def _public_methods(kind: Any) -> dict[str, _Code]:
    """Return the public methods and properties of a class, those of PyTorch excepted."""
    properties = (property, cached_property)
    own = {
        name: (function, isinstance(value, properties))
        for name, value in sorted(own_attributes(kind).items())
        if isinstance(value, (FunctionType, *properties)) and (name in _SPECIAL or not name.startswith("__"))
        if (function := function_in(value)) is not None
    }
    functions = {name: function for name, (function, _) in own.items()}
    public = [name for name in own if name in _SPECIAL or not (name.startswith("_") or hasattr(nn.Module, name))]
    return {name: _code_of(name, functions, is_property=own[name][1]) for name in public}


def _code_of(name: str, functions: dict[str, FunctionType], *, is_property: bool) -> _Code:
    names, read, repeated = set[str](), set[str](), set[str]()
    runs = False
    for current, code in reachable_code(functions, name):
        steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
        # Only a function that is called once, without loops, reads each name once.
        is_once = current == name and code.co_name == name and not any("BACKWARD" in s.opname for s in steps)
        for step, after in pairwise(steps):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                is_described = after.opname == "LOAD_ATTR" and after.argval in ("device", "dtype")
                if step.argval in _DESCRIBED and is_described:
                    continue
                repeated |= {step.argval} if step.argval in names or not is_once else set()
                names.add(step.argval)
                read |= set() if is_method_call(step) else {step.argval}
                runs = runs or is_method_call(step)
            runs = runs or step.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "FOR_ITER")
        texts = {text for text in code.co_consts if isinstance(text, str)}  # for getattr
        names |= texts
        read |= texts
        repeated |= texts
    values = names & (_DESCRIBED | _CHILDREN | {"data", "parameters", "buffers", "state_dict"})
    only_describes = is_property and not runs and not values and not names.isdisjoint(_DESCRIPTIONS)
    return _Code(frozenset(names), frozenset(read), frozenset(repeated), is_property, only_describes)
