"""Record what a model does when it is called: one flat graph of the functions and torch modules that ran.

The model is run on a structural copy that shares its parameters, under a torch function mode of this thread. So the
Python code in between may be anything, and neither the model nor another thread notices. A recording holds for the call
that was recorded; :mod:`repvgg.collapse.variants` examines what else it holds for.
"""

from __future__ import annotations

import gc
import operator
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from repvgg._calls import Call
from repvgg.collapse.effects import Effects, tensors_of_leaf
from repvgg.collapse.modules import (
    is_leaf,
    is_scripted,
    is_torch_utility,
    join,
    preserved_random_state,
    storage_of,
    submodule_or_none,
)
from repvgg.collapse.recording import (
    RANDOM,
    Decision,
    Frame,
    Recording,
    as_fx_arguments,
    is_constant,
    leaves,
    map_values,
    mark_constants,
    unrecorded,
)
from repvgg.collapse.shape_inference import meta_shortcut, output_without_values, shapes_suffice
from repvgg.collapse.tracked import UNKNOWN, Unknown, is_tracked, tracked, untracked
from repvgg.errors import ReparamError
from repvgg.symbolic import assign_item, shadow_of, things_in
from repvgg.symbolic.shadow import own_state
from repvgg.verify.execution import parameter_of

_TORCH = (torch.__path__[0], __file__, sys.modules[tracked.__module__].__file__ or "")
_PACKAGE = Path(__file__).parents[1]
_OWN_CODE = tuple(str(_PACKAGE / name) for name in ("_structure.py", "_calls.py", "collapse", "symbolic"))
_META = torch.device("meta")

# Tensor methods that return numbers: sizes, which every tensor has, and elements, which only real ones have.
_SIZES = {"size", "dim", "ndimension", "numel", "nelement", "__len__"}
_ELEMENTS = {"item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "tolist", "numpy", "__array__"}
_MODE_SWITCHES = {"_set_grad_enabled", "set_autocast_enabled", "_enter_autocast", "_exit_autocast"}
_OPERATORS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "matmul", "neg", "__getitem__")},
    "div": operator.truediv,
    "__rpow__": operator.pow,
    "pow": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "add_": operator.iadd,
    "sub_": operator.isub,
    "mul_": operator.imul,
    "div_": operator.itruediv,
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rmatmul__": operator.matmul,
}
_WRITING = {assign_item.__name__, *(_OPERATORS[name].__name__ for name in ("add_", "sub_", "mul_", "div_"))}


class NeedsValuesError(ReparamError):
    """The code reads an element of a tensor that has no values."""


def record(
    model: nn.Module,
    call: Call,
    *,
    forced: Sequence[bool] = (),
    mode: Mapping[str, bool] | None = None,
    attributes: Mapping[str, Any] | None = None,
    on_meta: bool = False,
) -> Recording:
    """Call a model and record what it does.

    Args:
        model: the model; neither it nor the inputs change.
        call: the arguments of the call.
        forced: which way its first decisions shall go, whatever the numbers say; see :attr:`Recording.decisions`.
        mode: paths of modules with a training flag other than that of eval mode.
        attributes: other values of attributes of the model itself, such as ``UNKNOWN``.
        on_meta: run on meta tensors of the same shapes: for models without values.

    Raises:
        NeedsValuesError: the code reads elements of tensors, and this is a run on meta tensors.
        Exception: whatever the code itself raises.
    """
    guard: Any = nullcontext if on_meta else preserved_random_state
    values = copy_parameters = False
    while True:
        recorder = _Recorder(model, on_meta, forced, mode or {}, values, copy_parameters)
        vars(recorder.shadow).update({name: recorder._inputs(value) for name, value in (attributes or {}).items()})
        with guard(), torch.inference_mode(False), torch.no_grad():
            recorder.modes = _modes()
            try:
                recording = recorder.run(call)
            except Exception:
                if not (recorder.left_out or recorder.writes_parameter):
                    raise
            else:
                # The code may have caught the errors that say so.
                if not (recorder.needs_values or recorder.writes_parameter):
                    return recording
            finally:
                recorder.release()
        if recorder.writes_parameter:
            copy_parameters = True
        else:
            values = True


class _WritesParameterError(Exception):
    """The code is about to write to the memory of a parameter of the model."""


class _Recorder(TorchFunctionMode):
    """Runs a structural copy of a model and records its functions."""

    def __init__(
        self,
        model: nn.Module,
        on_meta: bool,
        forced: Sequence[bool],
        mode: Mapping[str, bool],
        values: bool,
        copy_parameters: bool,
    ) -> None:
        super().__init__()
        self.values = values or on_meta  # whether convolutions are computed
        self.left_out = self.needs_values = self.writes_parameter = False
        self.model, self.on_meta, self.forced = model, on_meta, list(forced)
        self.graph = fx.Graph()
        self.frame_of: dict[fx.Node, Frame] = {}
        self.escaped: dict[fx.Node, str] = {}
        self.opaque: dict[fx.Node, str] = {}
        self.root = self.frame = Frame("", None)
        self.decisions: list[Decision] = []
        self.modes = _modes()
        self.failed_in = ""
        self.paused = False
        self.attributes: dict[str, fx.Node] = {}
        self.known: dict[int, tuple[Any, fx.Node]] = {}
        self.seen: list[tuple[Any, fx.Node]] = []
        self.memories: dict[int, tuple[int, list[Any]]] = {}
        self.memory_numbers = count()
        self.numbers: dict[tuple[Any, ...], fx.Node] = {}
        self.device_of: dict[Any, fx.Node] = {}
        self.own_devices: dict[torch.device, list[str]] = {}
        self.assigned: dict[fx.Node, str] = {}
        self.tensors_of: dict[nn.Module, list[Tensor | None]] = {}
        self.copy_parameters = copy_parameters
        self.shadow = self._make_shadow(mode)

    # The structural copy

    def _make_shadow(self, mode: Mapping[str, bool]) -> nn.Module:
        shadow = shadow_of(self.model, self._own_tensor, training=False)
        self.parameter_memory = {storage_of(parameter) for parameter in self.model.parameters()} - {None}
        self.paths: dict[int, tuple[Any, str]] = {}
        originals = dict(self.model.named_modules())
        for path, part in list(shadow.named_modules()):
            if is_scripted(part):
                self._enclose(shadow, path, part)
                continue
            if path in mode:
                part.training = mode[path]
            self._wrap(path, part, originals[path])
            stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
            for store in stores:
                for name, value in list(store.items()):
                    if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
                        if self.on_meta and not value.is_meta:  # integers, which shadows share
                            value = store[name] = value.to(_META)
                        self.paths.setdefault(id(value), (value, join(path, name)))
            if is_leaf(originals[path]):
                self.tensors_of[part] = tensors_of_leaf(part)
        return shadow

    def _own_tensor(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the copy: a parameter shares its memory, but may be given other data."""
        if self.on_meta:
            return tensor.to(_META)
        if not isinstance(tensor, nn.Parameter):
            return tensor
        data = tensor.detach().clone() if self.copy_parameters else tensor.detach()
        return parameter_of(data, tensor)

    def _wrap(self, path: str, part: nn.Module, original: nn.Module) -> None:
        # The hooks of users would see our inputs; those of torch's own utilities compute weights.
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = {key: hook for key, hook in vars(part)[name].items() if is_torch_utility(hook)}
            vars(part)[name] = type(vars(part)[name])(hooks)
        for name in ("_backward_hooks", "_backward_pre_hooks"):
            vars(part)[name] = type(vars(part)[name])()
        # A forward that was replaced on the instance is a function of the user's, on the original.
        forward = vars(original).get("forward")
        if forward is None or getattr(forward, "__self__", None) is original:
            forward = vars(part).get("forward") or MethodType(type(part).forward, part)
        record_call = partial(self._leaf, part) if is_leaf(original) else self._call
        vars(part)["forward"] = partial(record_call, path, forward)

    def _enclose(self, shadow: nn.Module, path: str, scripted: nn.Module) -> None:
        """Let calls of a compiled script be recorded as those of a leaf."""
        owner_path, _, name = path.rpartition(".")
        owner = submodule_or_none(shadow, owner_path)
        if path and owner is not None and not isinstance(owner, _Scripted) and not is_scripted(owner):
            own = owner._modules[name] = _Scripted(scripted)
            vars(own)["forward"] = partial(self._leaf, own, path, scripted)

    def run(self, call: Call) -> Recording:
        """Run the call and return its recording."""
        module = self.shadow
        args, kwargs = map_values(self._inputs, call.args), map_values(self._inputs, dict(call.kwargs))
        self.root.args, self.root.kwargs = self._nodes_of(args), self._nodes_of(kwargs)
        if is_scripted(module) or is_leaf(self.model):
            raise ReparamError("there is no Python forward to record")
        parts = [(p, part) for p, part in self.shadow.named_modules() if not is_scripted(part)]
        before = {path: own_state(part) for path, part in parts}
        original = vars(module)["forward"].args[-1]
        try:
            with self:
                output = original(*args, **kwargs)
        except Exception as error:
            error.decisions = tuple(self.decisions)  # type: ignore[attr-defined]  # what led to it
            error.frame_path = self.failed_in  # type: ignore[attr-defined]
            raise
        self.root.output = self._nodes_of(output)
        self.paused = True
        mark_constants(self.graph)
        effects = Effects(self)
        changed, constant = effects.changed(before)
        effects.check_assignments()
        if (constant or self.assigned) and self.left_out:
            self.needs_values = True  # to compare with another call
        elif (constant or self.assigned) and not effects.same_again(original, call, output):
            constant = set()
            effects.refuse_assignments()
        del args, kwargs, output
        self._find_stored()
        self.graph.output(leaves(self.root.output))
        self._drop_unused_numbers()
        mark_constants(self.graph)
        return Recording(
            module=self.model,
            graph=self.graph,
            root=self.root,
            frame_of=self.frame_of,
            escaped=self.escaped,
            opaque=self.opaque,
            changed=frozenset(changed - constant),
            assigned=dict(self.assigned),
            decisions=tuple(self.decisions),
            own_devices=self.own_devices,
            on_meta=self.on_meta,
            writes_parameters=self.copy_parameters,
        )

    def release(self) -> None:
        """Release the copy and all tensors of the run, which are in reference cycles with the recorder."""
        for part in self.shadow.modules():
            vars(part).pop("forward", None)
        self.known.clear()
        self.seen.clear()
        self.memories.clear()
        self.paths.clear()

    def _inputs(self, value: Any) -> Any:
        """Return the arguments to run on, with a placeholder for each tensor."""
        if isinstance(value, Tensor):
            own = value.detach()
            own = torch.empty_like(own, device=_META) if self.on_meta else own.clone()
            self._bind(own, self.graph.placeholder(f"input_{len(self.known)}"))
            return own
        if value is UNKNOWN:
            node = self.graph.placeholder(f"unknown_{len(self.graph.nodes)}")
            node.meta["unknown"] = True
            return Unknown(self, node)
        return value

    # Calls of modules

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.paused:
            return forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # for what we do ourselves
            frame = Frame(path, self.frame, self._nodes_of(args), self._nodes_of(kwargs))
            frame.methods = _user_code()[1]
        self.frame.items.append(frame)
        self.frame = frame
        try:
            output = forward(*args, **kwargs)
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            self.frame = frame.parent or self.root
        with torch._C.DisableTorchFunction():
            frame.output = self._nodes_of(output)
        return output

    def _leaf(self, part: nn.Module, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.paused:
            return forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if not self._has_other_tensors(part):
                return self._run("call_module", path, forward, args, kwargs)
        if type(part) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and part.running_mean is not None:
            forward = partial(_normalize, part)
        return self._call(path, forward, *args, **kwargs)

    def _has_other_tensors(self, part: nn.Module) -> bool:
        """Whether a leaf computes with other tensors than a call of the original by itself would."""
        if any(is_torch_utility(hook) for hook in part._forward_pre_hooks.values()):
            # They compute a weight; a direct call of forward reads the one of the last call.
            return any(isinstance(value, Tensor) and self._is_own(value) for value in vars(part).values())
        now, before = tensors_of_leaf(part), self.tensors_of.get(part, [])
        return len(now) != len(before) or any(
            value is not old or (self.assigned and self._is_assigned(value))
            for value, old in zip(now, before, strict=True)
        )

    def _is_assigned(self, value: Tensor | None) -> bool:
        held, node = self.known.get(id(value), (lambda: None, None))
        return node in self.assigned and held() is value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._read(func, args[0])
        if name == "__set__" and func.__self__ is Tensor.data:  # type: ignore[attr-defined]
            return self._assign_data(*args)
        if name in _MODE_SWITCHES:
            self.frame.caveats.append("switches autograd or autocast")
            return func(*args, **kwargs)
        is_method = getattr(Tensor, name, None) is func
        if is_method and name in _SIZES and isinstance(args[0], Tensor):
            return self._size(name, func, args, kwargs)
        if is_method and name in _ELEMENTS and isinstance(args[0], Tensor):
            return self._element(name, func, args)
        if not is_method:
            return self._run("call_function", func, func, args, kwargs)
        if name == "__setitem__":
            return self._run("call_function", assign_item, assign_item, args, kwargs)
        if name in _OPERATORS and not kwargs:
            args = args[::-1] if name.startswith("__r") else args
            return self._run("call_function", _OPERATORS[name], _OPERATORS[name], args, kwargs)
        return self._run("call_method", name, func, args, kwargs)

    def _without_recording(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function without recording what it does."""
        paused, self.paused = self.paused, True
        try:
            return func(*args, **kwargs)
        finally:
            self.paused = paused

    def _run(self, op: str, target: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a function or a leaf module, and record it as a node."""
        given = self._nodes_of(args), self._nodes_of(kwargs)
        tensors = [value for value in leaves((args, kwargs)) if isinstance(value, Tensor)]
        versions = [None if value.is_inference() else value._version for value in tensors]
        name = getattr(target, "__name__", str(target))
        if tensors and not (self.copy_parameters or self.on_meta) and _writes(name, kwargs):
            written_to = kwargs.get("out", tensors[0])
            if any(isinstance(v, Tensor) and storage_of(v) in self.parameter_memory for v in leaves(written_to)):
                self.writes_parameter = True
                raise _WritesParameterError
        if any(isinstance(value, Unknown) for value in leaves((args, kwargs))):
            node = self._node(op, target, *given)
            node.meta["unknown"] = True
            return Unknown(self, node)
        if self.left_out and op != "call_module" and not shapes_suffice(name, tensors):
            self._require_values(given)
        run = (self.on_meta and op == "call_module" and meta_shortcut(self.model.get_submodule(target))) or func
        try:
            result = None if self.values or op != "call_module" else self._left_out(func, given, args, kwargs)
            if result is None:
                result = self._without_recording(run, *map_values(_plain, args), **map_values(_plain, kwargs))
        except NotImplementedError as error:
            if self.on_meta:  # no kernel for meta tensors, or the shape of the result depends on elements
                raise NeedsValuesError(str(error)) from error
            raise
        node = self._node(op, target, *given)
        if name in RANDOM and self._is_random(name, kwargs):
            self.opaque[node] = f"{name} draws random numbers"
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            self.opaque[node] = "it runs under autocast"
        written = [v for v, old in zip(tensors, versions, strict=True) if old is not None and v._version != old]
        if written:
            node.meta["writes"] = [self._node_of(value) for value in written]
            for value in written:
                # From here on the written tensor is known under its new name.
                self._bind(value, node)
        elif isinstance(result, Tensor) and self._is_own(result):  # such as a buffer that is on the device already
            node.meta["own"] = True
        self._bind_result(result, node)
        return result

    def _assign_data(self, target: Tensor, value: Tensor) -> None:
        """Assign to ``target.data``: from here on, the tensor is that of ``value``."""
        _, path = self.paths.get(id(target), (None, "")) if self._is_own(target) else (None, "")
        node = self._node("call_function", getattr, (self._node_of(value), "data"), {})
        self._without_recording(setattr, target, "data", value)
        self._bind(target, node)
        self.assigned[node] = path

    def _left_out(self, forward: Any, given: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return the output of a layer without its values; None if it has to be computed."""
        layer = getattr(forward, "__self__", None)  # none of a compiled script
        # What is computed from parameters may be stored.
        if layer is None or all(map(_is_constant_or_number, leaves(given))):
            return None
        result: Tensor | None = self._without_recording(output_without_values, layer, *args, **kwargs)
        self.left_out = self.left_out or result is not None
        return result

    def _require_values(self, given: Any = None) -> None:
        """Stop a run without values if something depends on them: other than the constants ``given``."""
        if self.left_out and not (given and all(map(_is_constant_or_number, leaves(given)))):
            self.needs_values = True
            raise NeedsValuesError("it depends on the values of a tensor")

    @staticmethod
    def _is_random(name: str, kwargs: Mapping[str, Any]) -> bool:
        return name != "rrelu" or bool(kwargs.get("training"))

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node(op, target, as_fx_arguments(args), as_fx_arguments(kwargs))
        self._own(node)
        return node

    def _own(self, node: fx.Node) -> None:
        self.frame_of[node] = self.frame
        self.frame.items.append(node)
        node.meta["where"], node.meta["methods"] = _user_code()
        modes = _modes()
        if modes != self.modes:
            self.frame.caveats.append("switches autograd or autocast")

    # Tensors

    def _bind(self, value: Tensor, node: fx.Node) -> None:
        self.known[id(value)] = (weakref.ref(value), node)
        self.seen.append((weakref.ref(value), node))
        node.meta.update(shape=tuple(value.shape), dtype=value.dtype, storage=self._memory_of(value))
        node.meta["stride"] = value.stride() if value.layout is torch.strided else None

    def _memory_of(self, value: Tensor) -> int | None:
        """Return a number that is the same for tensors which share memory, and for no others."""
        address = storage_of(value)
        if address is None:
            return None
        number, holders = self.memories.get(address, (0, []))
        if all(holder() is None for holder in holders):  # the address was freed, and is used anew
            number, holders = next(self.memory_numbers), []
            self.memories[address] = number, holders
        holders.append(weakref.ref(value))
        return number

    def _bind_result(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._bind(result, node)
        elif isinstance(result, (tuple, list)):
            for index, value in enumerate(result):
                if isinstance(value, (Tensor, tuple, list)):
                    self._bind_result(value, self._node("call_function", operator.getitem, (node, index), {}))
        elif isinstance(result, dict):
            for key, value in result.items():
                self._bind_result(value, self._node("call_function", operator.getitem, (node, key), {}))

    def _node_of(self, value: Tensor) -> fx.Node:
        """Return the node that computed a tensor, or names it."""
        held, node = self.known.get(id(value), (lambda: None, None))
        if node is not None and held() is value:
            return node
        owned, path = self.paths.get(id(value), (None, ""))
        if owned is value:
            if path not in self.attributes:
                node = self.attributes[path] = self.graph.get_attr(path)
                self.frame_of[node] = self.root
                self._bind(value, node)
            return self.attributes[path]
        if self.on_meta and not value.is_meta and value.dim():
            raise NeedsValuesError("it uses a tensor that is no parameter, buffer or attribute of a module")
        return self._unseen(value)

    def _unseen(self, value: Tensor) -> fx.Node:
        """Return a node for a tensor that code computed without torch functions that can be recorded."""
        self._require_values()
        node = self._node("call_function", unrecorded, (), {})
        self._bind(value, node)
        where = node.meta["where"]
        reason = f"{where} uses a tensor that comes from code which cannot be recorded"
        self.opaque[node] = reason
        # Such code may have read any tensor that was reachable when it ran.
        for frame in self.frame.stack():
            frame.caveats.append("uses tensors from code that cannot be recorded")
            seen: list[Any] = [frame.args, frame.kwargs]
            seen += [item.output if isinstance(item, Frame) else item for item in frame.items]
            self.escaped |= {n: reason for n in leaves(seen) if isinstance(n, fx.Node)}
        return node

    def _nodes_of(self, value: Any) -> Any:
        """Return arguments with tensors and tracked numbers replaced by their nodes."""
        return map_values(self._named, value)

    def _named(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node_of(value)
        if is_tracked(value) or isinstance(value, Unknown):
            return value.node if value.recorder is self else untracked(value)
        if isinstance(value, (torch.device, torch.dtype)) and value in self.device_of:
            return self.device_of[value]
        return value

    # Numbers

    def _read(self, func: Any, value: Tensor) -> Any:
        """Read a property of a tensor."""
        name = getattr(func.__self__, "__name__", "") or getattr(func.__self__.fget, "__name__", "")
        result = self._without_recording(func, value)
        if isinstance(result, Tensor):  # such as x.T and x.data
            node = self._node("call_function", getattr, (self._node_of(value), name), {})
            self._bind(result, node)
        elif name in ("shape", "ndim") and not self._is_own(value):
            return self.number(result, self.number_node(getattr, value, name))
        elif name in ("device", "dtype") and not self._is_own(value):
            self.device_of[result] = self.number_node(getattr, value, name)
        elif name == "device":
            self.own_devices.setdefault(result, []).append(self.paths[id(value)][1])
        return result

    def _size(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self._without_recording(func, *args, **kwargs)
        if name == "__len__" or self._is_own(args[0]):  # len() must return an ordinary integer
            return result
        where = args[1] if len(args) > 1 else kwargs.get("dim")
        if name == "size":
            shape = self.number_node(getattr, args[0], "shape")
            node = shape if where is None else self.number_node(operator.getitem, _Held(shape), where)
            return self.number(result, node)
        if name in ("dim", "ndimension"):
            return self.number(result, self.number_node(getattr, args[0], "ndim"))
        return self.number(result, self.number_node(Tensor.numel, args[0]))

    def _element(self, name: str, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Read an element of a tensor."""
        value = args[0]
        node = self._node_of(value)
        if self._is_own(value) and node.op == "get_attr":
            self.frame.caveats.append("computes with the values of its parameters")
            original = operator.attrgetter(str(node.target))(self.model)
            if original.is_meta:
                raise NeedsValuesError("it reads a parameter without a value")
            return self._without_recording(func, original.detach(), *args[1:])
        if self.on_meta:
            raise NeedsValuesError("it reads elements of a tensor")
        self._require_values()
        result = self._without_recording(func, *args)
        where, _ = _user_code()
        number = self._node("call_method", "item", (node,), {})
        if name == "__bool__":
            return self.decide(result, number)
        if name == "item":
            return self.number(result, number)
        self.frame.decisions.append(Decision(True, where, known=False))
        self.frame.caveats.append(f"turns a tensor into a number at {where}")
        return result

    def _is_own(self, value: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer, whose size is that of the model."""
        owned, _ = self.paths.get(id(value), (None, ""))
        return owned is value

    def number(self, value: Any, node: fx.Node) -> Any:
        """Return ``value`` as a tracked number that ``node`` computes."""
        node.meta["value"] = value
        return value if self.paused else tracked(value, node, self)

    def number_node(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Return a node that applies ``function`` to numbers."""
        given = tuple(arg.node if isinstance(arg, _Held) else self._nodes_of(arg) for arg in args)
        key = (id(self.frame), function, *map(repr, given))
        if key in self.numbers:
            return self.numbers[key]
        node = self._node("call_function", function, given, {})
        node.meta["number"] = True
        if any(isinstance(arg, Unknown) for arg in args):
            node.meta["unknown"] = True
        self.numbers[key] = node
        return node

    def decide(self, outcome: bool, node: fx.Node | None) -> bool:
        """Record that the code branches on a number, and return which way it shall go."""
        if self.paused:
            return outcome
        frame = self.frame
        can_be_forced = frame is self.root or (node is not None and node.meta.get("unknown"))
        if can_be_forced and len(self.decisions) < len(self.forced):
            outcome = self.forced[len(self.decisions)]
        decision = Decision(outcome, _user_code()[0], unknown=node is not None and bool(node.meta.get("unknown")))
        frame.decisions.append(decision)
        if can_be_forced:
            self.decisions.append(decision)
        return outcome

    def asks_for_class(self, frame: FrameType) -> bool:
        """Whether code of the model runs in a Python frame, and asks for the class of a value.

        PyTorch asks for classes as well, from the frame of the code that calls it.
        """
        code = frame.f_code
        own = code.co_filename.startswith((torch.__path__[0], *_OWN_CODE))
        return not self.paused and not own and "isinstance" in code.co_names

    # After the run

    def _find_stored(self) -> None:
        """Find the tensors that the forwards left where other code can read them."""
        for path, part in self.shadow.named_modules():
            if is_scripted(part):
                continue
            for value in things_in(v for key, v in vars(part).items() if key not in ("_modules", "forward")):
                held, node = self.known.get(id(value), (lambda: None, None))
                if node is not None and held() is value and not _is_own(node):
                    self.escaped[node] = f"its output is stored in an attribute of {path or 'the model'}"
        for generation in (1, 2):  # a tensor in a reference cycle is garbage; nearly all of them are young
            if not self._alive() - self.escaped.keys():
                return
            gc.collect(generation)
        reason = "its output is stored where other code can read it"
        self.escaped = dict.fromkeys(self._alive(), reason) | self.escaped

    def _alive(self) -> set[fx.Node]:
        """Return the nodes whose tensors something still holds, inputs and parameters aside."""
        alive = {node for held, node in self.seen if held() is not None}
        return {node for node in alive if node.op != "placeholder" and not _is_own(node)}

    def _drop_unused_numbers(self) -> None:
        """Remove sizes that were read and not used: they would count as users of their tensors."""
        for node in reversed(list(self.graph.nodes)):
            if node.meta.get("number") and not node.users:
                self.frame_of.pop(node).items.remove(node)
                self.graph.erase_node(node)


def _is_own(node: fx.Node) -> bool:
    """Whether a node's tensor is a parameter, buffer or attribute of the model, as it was before the call."""
    return node.op == "get_attr" or "own" in node.meta


def _normalize(norm: Any, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
    """Do what a batch norm with running statistics does in eval mode, without a branch on its input."""
    with torch._C.DisableTorchFunction():
        norm._check_input_dim(input)
    mean, variance, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return torch.nn.functional.batch_norm(input, mean, variance, weight, bias, False, 0.0, norm.eps)


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function writes to its first argument, or to ``out``, by its name."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING or kwargs.get("out") is not None


class _Scripted(nn.Module):
    """A compiled script in the structural copy."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        vars(self)["scripted"] = scripted

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["scripted"], name)


@dataclass(frozen=True)
class _Held:
    """A node as an argument of a number."""

    node: fx.Node


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _is_constant_or_number(value: Any) -> bool:
    return not isinstance(value, fx.Node) or is_constant(value) or bool(value.meta.get("number"))


def _plain(value: Any) -> Any:
    return untracked(value) if is_tracked(value) else value


def _user_code() -> tuple[str, tuple[str, ...]]:
    """Return file and line of the user's code that is running, and its functions up to the forward."""
    frame = sys._getframe(2)
    where, names = "", []
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_TORCH):
            where = where or f"{code.co_filename}:{frame.f_lineno}"
            names.append(code.co_name)
        elif names and code.co_name in ("_call", "run"):
            break
        frame = frame.f_back  # type: ignore[assignment]
    return where, tuple(names)
