"""Whether two recordings compute the same: as a whole, or as far as a region goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import fx

from repvgg.collapse.modules import is_inside, join
from repvgg.collapse.recording import Frame, Recording, constants_of, is_constant, is_number, leaves
from repvgg.collapse.region import Region

_Key: TypeAlias = tuple[str, Any, Any, frozenset[Any]]


def canonical_form(frame: Frame, prefix: str = "") -> list[Any]:
    """Return what the code of a frame itself does, in a form that is equal for frames that do the same.

    The modules that it calls are part of it, but not what they do inside. ``prefix`` is the path of the recorded module
    in the model.
    """
    names: dict[fx.Node, Any] = {}
    for node in leaves((frame.args, frame.kwargs)):
        if isinstance(node, fx.Node):
            names.setdefault(node, len(names))
    found: list[Any] = []
    for item in frame.items:
        given = (_key(item.args, names, prefix), _key(item.kwargs, names, prefix))
        if isinstance(item, Frame):
            found.append(("call", join(prefix, item.path), *given))
            results = [leaf for leaf in leaves(item.output) if isinstance(leaf, fx.Node)]
        else:
            found.append((item.op, _target(item, prefix), *given))
            results = [item]
        for node in results:
            names.setdefault(node, len(names))
    found.append(_key(frame.output, names, prefix))
    return found


def runs_the_same(one: Recording, other: Recording) -> bool:
    """Whether two recordings of a model run the same forwards, and each does the same."""
    pairs = zip_longest(one.root.frames(), other.root.frames())
    return all(a and b and a.path == b.path and canonical_form(a) == canonical_form(b) for a, b in pairs)


def _target(node: fx.Node, prefix: str) -> Any:
    return join(prefix, str(node.target)) if node.op in ("call_module", "get_attr") else node.target


def _key(value: Any, names: Mapping[fx.Node, Any], prefix: str) -> Any:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            return ("attribute", _target(value, prefix))
        return ("node", names.get(value, "outside"))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_key(item, names, prefix) for item in value))
    if isinstance(value, dict):
        return tuple((key, _key(item, names, prefix)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_key(item, names, prefix) for item in (value.start, value.stop, value.step)))
    if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        return (type(value).__name__, value)
    inside = leaves(value)
    if inside and any(item is not value for item in inside):
        return (type(value).__name__, *(_key(item, names, prefix) for item in inside))
    return (type(value).__name__, id(value) if not isinstance(value, torch.memory_format) else str(value))


def is_same_region(
    region: Region,
    other: Recording,
    path: str = "",
    frame: Frame | None = None,
    unchanged: Collection[str] = (),
) -> bool:
    """Whether another recording runs a region as it is, any number of times, and no part of it on its own.

    Args:
        region: of a recording of the model.
        other: the other recording.
        path: of the module in the model that ``other`` is a recording of; only the steps inside count.
        frame: only look at this call in ``other``; only the steps inside of its module count.
        unchanged: paths of modules of the region that stay as they are for other callers.
    """
    within = frame.path if frame is not None else path
    steps = [step.node for step in region.steps if is_inside(region.recording.owner(step.node), within)]
    prefix = "" if frame is not None else path
    return _Match(steps, region.exit, prefix, unchanged).holds(_index_of(frame or other.root, prefix))


@dataclass(frozen=True, eq=False)
class _Index:
    """The nodes that ran during a call, by what they compute, and by the modules and parameters that they use."""

    by_key: Mapping[_Key, list[fx.Node]]
    by_name: Mapping[Any, list[fx.Node]]


def _index_of(frame: Frame, prefix: str) -> _Index:
    """Return the index of a call, made once: every region of a model is compared with the same calls."""
    index: _Index | None = frame.indexes.get(prefix)
    if index is None:
        index = frame.indexes[prefix] = _Index(defaultdict(list), defaultdict(list))
        for node in frame.nodes():
            if node.op not in ("placeholder", "get_attr"):
                key = _step_key(node, prefix)
                index.by_key[key].append(node)
                for name in _names(key):
                    index.by_name[name].append(node)
    return index


class _Match:
    """Finds the steps of a region in another recording.

    Args:
        steps: the steps to find.
        end: the end of the region, whose output may have any reader.
        prefix: the path of the other recording's module in the model.
        unchanged: see :func:`is_same_region`.
    """

    def __init__(self, steps: list[fx.Node], end: fx.Node, prefix: str, unchanged: Collection[str]) -> None:
        self.steps, self.inside, self.prefix, self.unchanged = steps, set(steps), prefix, unchanged
        # Steps that are read outside, by a part of the region that is not to be found here, may have other readers.
        self.ends = {end, *(n for n in steps if any(u not in self.inside and not is_number(u) for u in n.users))}
        self.keys = {node: _step_key(node, "") for node in steps}
        computed = {n for node in steps for n in constants_of(node) if n.op != "get_attr"}
        self.constants = {_step_key(n, "") for n in computed}

    def holds(self, index: _Index) -> bool:
        """Whether a call runs all of the steps together, any number of times."""
        anchors = {node for node, key in self.keys.items() if _names(key)}
        if not anchors:
            return True
        owned = set[Any]().union(*(_names(self.keys[node]) for node in anchors))
        owned -= {("module", path) for path in self.unchanged}
        touching = {node for name in owned for node in index.by_name.get(name, ())}
        # What the kernels of the region are computed from.
        touching -= {node for key in self.constants for node in index.by_key.get(key, ()) if is_constant(node)}
        first = next(node for node in self.steps if node in anchors)
        found: set[fx.Node] = set()
        for start in index.by_key.get(self.keys[first], ()):
            occurrence = self._occurrence(first, start)
            if occurrence is None:
                if not _names(self.keys[first]) & owned:
                    continue
                return False
            found |= occurrence
        return touching <= found

    def _occurrence(self, first: fx.Node, start: fx.Node) -> set[fx.Node] | None:
        """Find all steps around ``start``, which is the step ``first``; None if they are not all there."""
        image: dict[fx.Node, fx.Node] = {}
        if not self._bind(first, start, image):
            return None
        missing = [node for node in self.steps if node not in image]
        while missing:
            reachable = ((node, next((n for n in node.all_input_nodes if n in image), None)) for node in missing)
            # The inputs of some are found only once something after them is.
            node, read = next((found for found in reachable if found[1] is not None), (None, None))
            if node is None or read is None or not any(self._bind(node, user, image) for user in image[read].users):
                return None
            missing = [other for other in missing if other not in image]
        theirs = {image[node] for node in self.steps}
        for node in self.steps:
            if node not in self.ends and any(user not in theirs and not is_number(user) for user in image[node].users):
                return None
        return theirs

    def _bind(self, mine: fx.Node, theirs: Any, image: dict[fx.Node, fx.Node]) -> bool:
        """Map a node and, through its arguments, all that it depends on inside the region."""
        if mine in image:
            return image[mine] is theirs
        if not isinstance(theirs, fx.Node):
            return False
        if mine in self.inside:
            if self.keys[mine] != _step_key(theirs, self.prefix):
                return False
            image[mine] = theirs
            mine_inputs, their_inputs = _node_arguments(mine), _node_arguments(theirs)
            pairs = zip(mine_inputs, their_inputs, strict=False)
            return len(mine_inputs) == len(their_inputs) and all(self._bind(a, b, image) for a, b in pairs)
        image[mine] = theirs
        return True


def _names(key: _Key) -> frozenset[Any]:
    """Return the modules and parameters in the key of a step."""
    op, target, _, reads = key
    return frozenset((("module", target),)) if op == "call_module" else reads


def _node_arguments(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node) and leaf.op != "get_attr"]


def _step_key(node: fx.Node, prefix: str) -> _Key:
    """Return operation, target, constants and parameters of a node."""
    keys: dict[str, _Key] = node.meta.setdefault("step_keys", {})
    if prefix not in keys:
        reads = frozenset(
            ("attribute", _target(leaf, prefix)) for leaf in leaves((node.args, node.kwargs))
            if isinstance(leaf, fx.Node) and leaf.op == "get_attr"
        )  # fmt: skip
        constants = (_key(node.args, {}, prefix), _key(node.kwargs, {}, prefix))
        keys[prefix] = node.op, _target(node, prefix), constants, reads
    return keys[prefix]
