"""What a recorded call changed besides its result: attributes, the data of parameters, the tensors of leaf modules.

What every call computes anew from parameters alone is a constant, and may be folded like one. Everything else stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from repvgg._calls import Call
from repvgg.collapse.modules import join
from repvgg.collapse.recording import Frame, is_constant, leaves, map_values
from repvgg.collapse.tracked import UNKNOWN
from repvgg.symbolic.shadow import own_state


class Run(Protocol):
    """What is needed of a recorder after its call.

    Attributes:
        model: the model.
        shadow: the copy that was called.
        graph: the nodes.
        frame_of: the frame whose code ran a node.
        attributes: nodes of the parameters, buffers and attributes that were read, by path.
        known: by object id, tensors and the nodes that computed them.
        assigned: see :attr:`Recording.assigned`; "" for tensors that are no parameters.
        opaque: nodes that must stay, with the reason.
        tensors_of: parameters and buffers of each leaf module before the call.
        forced: decisions that were forced.
        on_meta: whether there were no values.
    """

    model: nn.Module
    shadow: nn.Module
    graph: fx.Graph
    frame_of: dict[fx.Node, Frame]
    attributes: dict[str, fx.Node]
    known: dict[int, tuple[Any, fx.Node]]
    assigned: dict[fx.Node, str]
    opaque: dict[fx.Node, str]
    tensors_of: dict[nn.Module, list[Tensor | None]]
    forced: list[bool]
    on_meta: bool


def tensors_of_leaf(leaf: nn.Module) -> list[Tensor | None]:
    """Return the parameters and buffers of a module without children."""
    return [*leaf._parameters.values(), *leaf._buffers.values()]


class Effects:
    """Examine what a call left behind, and mark what must stay for it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def changed(self, before: Mapping[str, object]) -> tuple[set[str], set[str]]:
        """Return the paths of modules that the call changed, and of those that only got constants.

        Args:
            before: the states of all modules before the call.
        """
        now = {path: own_state(self.run.shadow.get_submodule(path)) for path in before}
        found = {path for path in before if before[path] != now[path]}
        return found | self._check_leaves(), {path for path in found if self._stores_constants(path, before[path])}

    def _stores_constants(self, path: str, before: object) -> bool:
        """Whether all that a call changed in the attributes of a module are tensors that each call computes anew.

        They depend on parameters only, and nothing read the attributes before.
        """
        part = self.run.shadow.get_submodule(path)
        known = dict(before)  # type: ignore[call-overload]
        for name, state in own_state(part):  # type: ignore[attr-defined]
            if known.pop(name, None) == state:
                continue
            value = vars(part)[name]
            held, node = self.run.known.get(id(value), (lambda: None, None))
            if not isinstance(value, Tensor) or held() is not value or node is None or not is_constant(node):
                return False
            if join(path, name) in self.run.attributes:
                return False
        return not known  # nothing was deleted

    def _check_leaves(self) -> set[str]:
        """Return the paths of leaf modules that are left with other tensors; their calls stay as they are."""
        paths = {part: path for path, part in self.run.shadow.named_modules()}
        left = {
            paths[part]
            for part, before in self.run.tensors_of.items()
            if part in paths and list(map(id, tensors_of_leaf(part))) != list(map(id, before))
        }
        calls = [node for node in self.run.graph.nodes if left and node.op == "call_module" and node.target in left]
        self.run.opaque |= dict.fromkeys(calls, "a forward gives it other parameters")
        return left

    def check_assignments(self) -> None:
        """Refuse assignments of what is no constant, and to tensors whose old data something reads."""
        is_known = all(path and is_constant(node) for node, path in self.run.assigned.items())
        if (
            not is_known
            or self._calls_with_old_data()
            or any(path in self.run.attributes for path in self.run.assigned.values())
        ):
            self.refuse_assignments()

    def _calls_with_old_data(self) -> list[fx.Node]:
        """Return the calls of leaf modules before an assignment to their parameters."""
        targets = {id(operator.attrgetter(path)(self.run.model)) for path in self.run.assigned.values() if path}
        calls = [node for node in self.run.graph.nodes if targets and node.op == "call_module"]
        parts = [self.run.model.get_submodule(str(node.target)) for node in calls]
        owned = [{id(value) for value in (*part._parameters.values(), *part._buffers.values())} for part in parts]
        return [node for node, ids in zip(calls, owned, strict=True) if ids & targets]

    def refuse_assignments(self) -> None:
        """Let everything around assignments to the data of tensors stay as it is."""
        reason = "assigns to the data of a tensor"
        for node, path in self.run.assigned.items():
            node.meta["constant"] = False
            self.run.opaque[node] = f"its forward {reason}"
            for frame in self.run.frame_of[node].stack():
                frame.caveats.append(reason)
            if path in self.run.attributes:
                self.run.attributes[path].meta["constant"] = False
        self.run.opaque |= dict.fromkeys(self._calls_with_old_data(), f"a forward {reason} that it reads")
        for node in self.run.graph.nodes:
            if any(not n.meta.get("constant") for n in node.all_input_nodes):
                node.meta["constant"] = False

    def same_again(self, forward: Callable[..., Any], call: Call, output: Any) -> bool:
        """Whether another call of the copy, which the first one has changed, returns the same."""
        if self.run.on_meta:
            return False
        if self.run.forced or any(value is UNKNOWN for value in leaves((call.args, dict(call.kwargs)))):
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
