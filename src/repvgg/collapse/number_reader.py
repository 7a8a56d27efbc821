"""Numbers that a recorded forward reads from its tensors, and its decisions on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx

from repvgg.collapse.graph_builder import (
    GraphBuilder,
    NeedsValuesError,
    called_by_user_code,
    is_user_code,
    user_code,
)
from repvgg.collapse.recording import Decision, is_number
from repvgg.collapse.tracked import Unknown, UnknownValueError, tracked

# Tensor methods that return numbers: sizes, which every tensor has, and elements, which only real ones have.
SIZES = {"size", "dim", "ndimension", "numel", "nelement", "__len__"}
ELEMENTS = {"item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "tolist", "numpy", "__array__"}


class NumberReader:
    """Records the numbers of one run; it is what a tracked number reports to.

    Args:
        builder: the graph.
        forced: which way the first decisions shall go.

    Attributes:
        decisions: see :attr:`repvgg.collapse.recording.Recording.decisions`.
        own_devices: see :attr:`repvgg.collapse.recording.Recording.own_devices`.
        stop_at_unknown: whether the first branch on an unknown value ends the run.
    """

    def __init__(self, builder: GraphBuilder, forced: Sequence[bool]) -> None:
        self.builder, self.forced = builder, forced
        self.stop_at_unknown = False
        self.decisions: list[Decision] = []
        self.own_devices: dict[torch.device, list[str]] = {}
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}

    def read(self, func: Any, value: Tensor) -> Any:
        """Read a property of a tensor."""
        builder, path = self.builder, self.builder.copy.path_of(value)
        name = getattr(func.__self__, "__name__", "") or getattr(func.__self__.fget, "__name__", "")
        result = builder.without_recording(func, value)
        if isinstance(result, Tensor):  # such as x.T and x.data
            node = builder.add("call_function", getattr, (builder.node_of(value), name), {})
            builder.tensors.bind(result, node)
        elif name in ("shape", "ndim") and path is None:
            return self.number(result, self.number_node(getattr, value, name))
        elif name == "requires_grad" and path is None:
            return self.ask(result)
        elif name in ("device", "dtype") and path is None:
            builder.names[result] = self.number_node(getattr, value, name)
        elif name == "device" and path is not None:
            self.own_devices.setdefault(result, []).append(path)
        return result

    def size(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Read a size by one of the methods :data:`SIZES`."""
        result = self.builder.without_recording(func, *args, **kwargs)
        # The size of a parameter is that of the model, and len() must return an ordinary integer.
        if name == "__len__" or self.builder.copy.path_of(args[0]) is not None:
            return result
        if name == "size":
            where = args[1] if len(args) > 1 else kwargs.get("dim")
            node = self.number_node(getattr, args[0], "shape")
            node = node if where is None else self.number_node(operator.getitem, node, where)
        elif name in ("dim", "ndimension"):
            node = self.number_node(getattr, args[0], "ndim")
        else:
            node = self.number_node(Tensor.numel, args[0])
        return self.number(result, node)

    def element(self, name: str, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Read an element by one of the methods :data:`ELEMENTS`."""
        builder, frame = self.builder, self.builder.frame
        builder.read_values = True
        node = builder.node_of(args[0])
        if builder.copy.path_of(args[0]) is not None and node.op == "get_attr":
            frame.caveats.append("computes with the values of its parameters")
            original = operator.attrgetter(str(node.target))(builder.copy.original)
            if original.is_meta:
                raise NeedsValuesError("it reads a parameter without a value")
            return builder.without_recording(func, original.detach(), *args[1:])
        if builder.on_meta:
            raise NeedsValuesError("it reads elements of a tensor")
        builder.require_values()
        result = builder.without_recording(func, *args)
        where, _ = user_code()
        number = builder.add("call_method", "item", (node,), {})
        if name == "__bool__":
            return self.decide(result, number)
        if name == "item":
            return self.number(result, number)
        frame.decisions.append(Decision(True, where, known=False))
        frame.caveats.append(f"turns a tensor into a number at {where}")
        return result

    def number(self, value: Any, node: fx.Node) -> Any:
        """Return ``value`` as a tracked number that ``node`` computes."""
        node.meta["value"] = value
        return value if self.builder.paused else tracked(value, node, self)

    def number_node(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Return a node that applies ``function`` to numbers."""
        given = self.builder.nodes_of(args)
        key = (id(self.builder.frame), function, *map(repr, given))
        if key not in self._nodes:
            node = self._nodes[key] = self.builder.add("call_function", function, given, {})
            node.meta["number"] = True
            if any(isinstance(arg, Unknown) for arg in args):
                node.meta["unknown"] = True
        return self._nodes[key]

    def decide(self, outcome: bool, node: fx.Node | None, *, unchecked: bool = False) -> bool:
        """Record that the code branches on a number, and return which way it shall go."""
        if self.builder.paused:
            return outcome
        frame = self.builder.frame
        is_unknown = node is not None and bool(node.meta.get("unknown"))
        can_be_forced = is_unknown or frame is self.builder.root
        if can_be_forced and len(self.decisions) < len(self.forced):
            outcome = self.forced[len(self.decisions)]
        decision = Decision(outcome, user_code()[0], unknown=is_unknown, unchecked=unchecked)
        frame.decisions.append(decision)
        if can_be_forced:
            self.decisions.append(decision)
        if is_unknown and self.stop_at_unknown:
            raise UnknownValueError("an unknown value selects what is computed")
        return outcome

    def ask(self, outcome: bool) -> bool:
        """Record that code of the model asks for a property of a tensor that other calls may change."""
        return self.decide(outcome, None, unchecked=True) if called_by_user_code() else outcome

    def asks_for_class(self, frame: FrameType) -> bool:
        """Whether code of the model runs in a Python frame, and asks for the class of a value.

        PyTorch asks for classes as well, from the frame of the code that calls it.
        """
        code = frame.f_code
        return not self.builder.paused and is_user_code(code.co_filename) and "isinstance" in code.co_names

    def drop_unused(self) -> None:
        """Remove sizes that were read and not used: they would count as users of their tensors."""
        for node in reversed(list(self.builder.graph.nodes)):
            if is_number(node) and not node.users:
                self.builder.frame_of.pop(node).items.remove(node)
                self.builder.graph.erase_node(node)
