"""What a recorded call changed besides its result: attributes, the data of parameters, the tensors of leaf modules.

What every call computes anew from parameters alone is a constant, and may be folded like one. Everything else stays.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from repvgg._calls import Call
from repvgg.collapse.graph_builder import GraphBuilder
from repvgg.collapse.instrument import tensors_of_leaf
from repvgg.collapse.modules import is_scripted, join
from repvgg.collapse.recording import is_constant, leaves, map_values
from repvgg.collapse.tracked import UNKNOWN
from repvgg.symbolic import things_in
from repvgg.symbolic.shadow import STANDARD, own_state


class Effects:
    """Examines what a call leaves behind, and marks what must stay for it; made before the call."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder, self.copy = builder, builder.copy
        self._parts = {path: part for path, part in self.copy.module.named_modules() if not is_scripted(part)}
        self.before = {path: own_state(part) for path, part in self._parts.items()}
        self._known = dict(self.before)  # after the last call of the module itself
        self._changed_by_others: set[str] = set()

    def enter(self, path: str) -> None:
        """Note that the module at ``path`` is about to run: what has changed its attributes since was other code."""
        if own_state(self._parts[path]) != self._known[path]:
            self._changed_by_others.add(path)

    def leave(self, path: str) -> None:
        """Note that the module at ``path`` has run."""
        self._known[path] = own_state(self._parts[path])

    def changed(self) -> tuple[set[str], set[str], set[str]]:
        """Return the paths of modules that the call changed, that code outside of them changed, that got constants."""
        found = {path for path, state in self.before.items() if own_state(self._parts[path]) != state}
        for path in found:
            self.enter(path)
        leaves_changed = self._check_leaves()
        constant = {path for path in found if self._stores_constants(path)}
        return found | leaves_changed, self._changed_by_others | leaves_changed, constant

    def _stores_constants(self, path: str) -> bool:
        """Whether all that a call changed in the attributes of a module are tensors that each call computes anew.

        They depend on parameters only, and nothing read the attributes before.
        """
        part = self._parts[path]
        known = dict(self.before[path])  # type: ignore[call-overload]
        for name, state in own_state(part):  # type: ignore[attr-defined]
            if known.pop(name, None) == state:
                continue
            node = self.builder.tensors.get(vars(part)[name])
            if node is None or not is_constant(node) or join(path, name) in self.builder.attributes:
                return False
        return not known  # nothing was deleted

    def _check_leaves(self) -> set[str]:
        """Return the paths of leaf modules that are left with other tensors; their calls stay as they are."""
        paths = {part: path for path, part in self.copy.module.named_modules()}
        left = {
            paths[part]
            for part, before in self.copy.tensors_of.items()
            if part in paths and list(map(id, tensors_of_leaf(part))) != list(map(id, before))
        }
        calls = [node for node in self.builder.graph.nodes if left and node.op == "call_module" and node.target in left]
        self.builder.opaque |= dict.fromkeys(calls, "a forward gives it other parameters")
        return left

    def check_assignments(self) -> None:
        """Refuse assignments of what is no constant, and to tensors whose old data something reads."""
        is_known = all(path and is_constant(node) for node, path in self.builder.assigned.items())
        if (
            not is_known
            or self._calls_with_old_data()
            or any(path in self.builder.attributes for path in self.builder.assigned.values())
        ):
            self.refuse_assignments()

    def _calls_with_old_data(self) -> list[fx.Node]:
        """Return the calls of leaf modules before an assignment to their parameters."""
        targets = {id(operator.attrgetter(path)(self.copy.original)) for path in self.builder.assigned.values() if path}
        calls = [node for node in self.builder.graph.nodes if targets and node.op == "call_module"]
        get = self.copy.original.get_submodule
        return [n for n in calls if not targets.isdisjoint(map(id, tensors_of_leaf(get(str(n.target)))))]

    def refuse_assignments(self) -> None:
        """Let everything around assignments to the data of tensors stay as it is."""
        reason = "assigns to the data of a tensor"
        for node, path in self.builder.assigned.items():
            node.meta["constant"] = False
            self.builder.opaque[node] = f"its forward {reason}"
            for frame in self.builder.frame_of[node].stack():
                frame.caveats.append(reason)
            if path in self.builder.attributes:
                self.builder.attributes[path].meta["constant"] = False
        self.builder.opaque |= dict.fromkeys(self._calls_with_old_data(), f"a forward {reason} that it reads")
        for node in self.builder.graph.nodes:
            if any(not n.meta.get("constant") for n in node.all_input_nodes):
                node.meta["constant"] = False

    def same_again(self, forward: Callable[..., Any], call: Call, output: Any, is_forced: bool) -> bool:
        """Whether another call of the copy, which the first one has changed, returns the same."""
        if self.builder.on_meta:
            return False
        if is_forced or any(value is UNKNOWN for value in leaves((call.args, dict(call.kwargs)))):
            return True  # only compared with a call that is not forced

        def copied(value: Any) -> Any:
            return value.detach().clone() if isinstance(value, Tensor) else value

        try:
            again = forward(*map_values(copied, call.args), **map_values(copied, dict(call.kwargs)))
        except Exception:
            return False
        pairs = zip(leaves(output), leaves(again), strict=False)
        return len(leaves(output)) == len(leaves(again)) and all(
            torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
            for one, other in pairs
            if isinstance(one, Tensor) and isinstance(other, Tensor)
        )

    def find_stored(self) -> None:
        """Find the tensors that the forwards left where other code can read them."""
        escaped = self.builder.escaped
        for path, part in self.copy.module.named_modules():
            if is_scripted(part):
                continue
            own = (value for name, value in vars(part).items() if name not in STANDARD and name != "forward")
            for value in things_in((part._parameters, part._buffers, *own)):
                node = self.builder.tensors.get(value)
                if node is not None and not _is_of_model(node):
                    escaped[node] = f"its output is stored in an attribute of {path or 'the model'}"
        for generation in (1, 2):  # a tensor in a reference cycle is garbage; nearly all of them are young
            if not self._alive() - escaped.keys():
                return
            gc.collect(generation)
        for node in self._alive():
            escaped.setdefault(node, "its output is stored where other code can read it")

    def _alive(self) -> set[fx.Node]:
        """Return the nodes whose tensors something still holds, inputs and parameters aside."""
        alive = self.builder.tensors.alive()
        return {node for node in alive if node.op != "placeholder" and not _is_of_model(node)}


def _is_of_model(node: fx.Node) -> bool:
    """Whether a node's tensor is a parameter, buffer or attribute of the model, as it was before the call."""
    return node.op == "get_attr" or "own" in node.meta
