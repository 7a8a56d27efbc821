"""The graph of a recording while the model runs: its nodes, and which of them computed each tensor."""

from __future__ import annotations

import operator
import os
import sys
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from repvgg.collapse.instrument import InstrumentedCopy
from repvgg.collapse.modules import storage_of
from repvgg.collapse.recording import Frame, as_fx_arguments, is_constant, is_number, leaves, map_values, unrecorded
from repvgg.collapse.tracked import Unknown, is_tracked, untracked
from repvgg.errors import ReparamError

_PACKAGE = Path(__file__).parents[1]
_RECORDER = str(_PACKAGE / "collapse") + os.sep
# Folders end with a separator: torchvision, whose path starts like that of torch, is code of a model.
_NOT_OF_THE_MODEL = (
    torch.__path__[0] + os.sep,
    *(str(_PACKAGE / name) for name in ("_structure.py", "_calls.py")),
    *(str(_PACKAGE / name) + os.sep for name in ("collapse", "symbolic")),
)


class NeedsValuesError(ReparamError):
    """The code reads an element of a tensor that has no values."""


class TensorNodes:
    """Which node computed each tensor, and which tensors share memory; no tensor is kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], fx.Node]] = {}
        self._seen: list[tuple[weakref.ref[Any], fx.Node]] = []
        self._memories: dict[int, tuple[int, list[weakref.ref[Any]]]] = {}
        self._numbers = count()

    def bind(self, value: Tensor, node: fx.Node) -> None:
        """Let ``value`` be the tensor of ``node`` from here on."""
        self._known[id(value)] = (weakref.ref(value), node)
        self._seen.append((weakref.ref(value), node))
        node.meta.update(shape=tuple(value.shape), dtype=value.dtype, storage=self._memory_of(value))
        node.meta["stride"] = value.stride() if value.layout is torch.strided else None

    def get(self, value: object) -> fx.Node | None:
        """Return the node of a tensor, or None."""
        held, node = self._known.get(id(value), (None, None))
        return node if held is not None and held() is value else None

    def alive(self) -> set[fx.Node]:
        """Return the nodes whose tensors something still holds."""
        return {node for held, node in self._seen if held() is not None}

    def clear(self) -> None:
        """Forget all tensors."""
        self._known.clear()
        self._seen.clear()
        self._memories.clear()

    def _memory_of(self, value: Tensor) -> int | None:
        """Return a number that is the same for tensors which share memory, and for no others."""
        address = storage_of(value)
        if address is None:
            return None
        number, holders = self._memories.get(address, (0, []))
        if all(holder() is None for holder in holders):  # the address was freed, and is used anew
            number, holders = next(self._numbers), []
            self._memories[address] = number, holders
        holders.append(weakref.ref(value))
        return number


class GraphBuilder:
    """Adds nodes to a graph, in the frame of the module whose code runs.

    Args:
        copy: what runs.
        on_meta: whether it runs on meta tensors.

    Attributes:
        graph, root, frame_of, escaped, opaque, assigned: see :class:`repvgg.collapse.recording.Recording`. A tensor
            that was assigned to and is no parameter has the path "".
        frame: the frame of the code that runs.
        attributes: nodes of the parameters, buffers and attributes that were read, by path.
        tensors: the nodes of all other tensors.
        names: nodes of devices and dtypes that were read from a tensor.
        modes: those of autograd and autocast in which the run started.
        paused: whether nothing is recorded.
        left_out: whether a layer returned memory that nothing has written to in place of its output.
        needs_values: whether something depends on such an output.
        read_values: see :class:`repvgg.collapse.recording.Recording`.
    """

    def __init__(self, copy: InstrumentedCopy, on_meta: bool) -> None:
        self.copy, self.on_meta = copy, on_meta
        self.graph = fx.Graph()
        self.root = self.frame = Frame("", None)
        self.frame_of: dict[fx.Node, Frame] = {}
        self.escaped: dict[fx.Node, str] = {}
        self.opaque: dict[fx.Node, str] = {}
        self.assigned: dict[fx.Node, str] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.tensors = TensorNodes()
        self.names: dict[Any, fx.Node] = {}
        self.modes: tuple[bool, ...] = ()
        self.paused = self.left_out = self.needs_values = self.read_values = False

    def start(self) -> None:
        """Take the modes of this moment as those that the code does not switch."""
        self.modes = current_modes()

    def add(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Add a node that the code of the current frame runs."""
        node = self.graph.create_node(op, target, as_fx_arguments(args), as_fx_arguments(kwargs))
        self.frame_of[node] = self.frame
        self.frame.items.append(node)
        node.meta["where"], node.meta["methods"] = user_code()
        if current_modes() != self.modes:
            self.frame.caveats.append("switches autograd or autocast")
        return node

    def bind_result(self, result: Any, node: fx.Node) -> None:
        """Let the tensors in a result be those of ``node`` or, in a structure, of nodes that read them from it."""
        if isinstance(result, Tensor):
            self.tensors.bind(result, node)
        elif isinstance(result, (tuple, list, dict)):
            is_dict = isinstance(result, dict)
            for key, value in result.items() if is_dict else enumerate(result):  # type: ignore[union-attr]
                if is_dict or isinstance(value, (Tensor, tuple, list)):
                    self.bind_result(value, self.add("call_function", operator.getitem, (node, key), {}))

    def node_of(self, value: Tensor) -> fx.Node:
        """Return the node that computed a tensor, or names it."""
        if (node := self.tensors.get(value)) is not None:
            return node
        path = self.copy.path_of(value)
        if path is not None:
            if path not in self.attributes:
                node = self.attributes[path] = self.graph.get_attr(path)
                self.frame_of[node] = self.root
                self.tensors.bind(value, node)
            return self.attributes[path]
        if self.on_meta and not value.is_meta and value.dim():
            raise NeedsValuesError("it uses a tensor that is no parameter, buffer or attribute of a module")
        return self._unseen(value)

    def nodes_of(self, value: Any) -> Any:
        """Return arguments with tensors and tracked numbers replaced by their nodes."""
        return map_values(self._named, value)

    def without_recording(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function without recording what it does."""
        paused, self.paused = self.paused, True
        try:
            return func(*args, **kwargs)
        finally:
            self.paused = paused

    def require_values(self, of_constants: bool = False) -> None:
        """Stop a run without values if something depends on them, other than on those of constants."""
        if self.left_out and not of_constants:
            self.needs_values = True
            raise NeedsValuesError("it depends on the values of a tensor")

    def _named(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if is_tracked(value) or isinstance(value, Unknown):
            return value.node if value.node.graph is self.graph else untracked(value)
        if isinstance(value, (torch.device, torch.dtype)) and value in self.names:
            return self.names[value]
        return value

    def _unseen(self, value: Tensor) -> fx.Node:
        """Return a node for a tensor in a container, or one that code computed in a way that cannot be recorded."""
        holder = self.copy.holder_of(value)
        if holder is None:
            self.require_values()
        node = self.add("call_function", unrecorded, (), {})
        self.tensors.bind(value, node)
        if holder is not None:
            self.opaque[node] = f"{holder or 'the model'} keeps it in a container"
            for frame in self.frame.stack():
                frame.caveats.append("uses a tensor in a container")
                if frame.path == holder:  # its callers do not see it
                    break
            return node
        reason = f"{node.meta['where']} uses a tensor that comes from code which cannot be recorded"
        self.opaque[node] = reason
        # Such code may have read any tensor that was reachable when it ran.
        for frame in self.frame.stack():
            frame.caveats.append("uses tensors from code that cannot be recorded")
            seen: list[Any] = [frame.args, frame.kwargs]
            seen += [item.output if isinstance(item, Frame) else item for item in frame.items]
            self.escaped |= {n: reason for n in leaves(seen) if isinstance(n, fx.Node)}
        return node


def are_constants(given: Any) -> bool:
    """Whether all nodes in arguments are constants or numbers."""
    return all(is_constant(leaf) or is_number(leaf) for leaf in leaves(given) if isinstance(leaf, fx.Node))


def current_modes() -> tuple[bool, ...]:
    """Return the modes of autograd and autocast."""
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def is_user_code(filename: str) -> bool:
    """Whether a file contains code of a model: neither PyTorch's nor that of the recorder."""
    return not filename.startswith(_NOT_OF_THE_MODEL)


def called_by_user_code() -> bool:
    """Whether code of a model, and not PyTorch's own, has called the function that the recorder sees."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_RECORDER):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and is_user_code(frame.f_code.co_filename)


def user_code() -> tuple[str, tuple[str, ...]]:
    """Return file and line of the user's code that is running, and its functions up to the forward."""
    frame = sys._getframe(1)
    where, names = "", []
    while frame is not None:
        code = frame.f_code
        if is_user_code(code.co_filename):
            where = where or f"{code.co_filename}:{frame.f_lineno}"
            names.append(code.co_name)
        elif names and code.co_name in ("_call", "run"):  # the recorder's
            break
        frame = frame.f_back  # type: ignore[assignment]
    return where, tuple(names)
