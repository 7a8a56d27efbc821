"""Record what a model does when it is called: one flat graph of the functions and torch modules that ran.

The model is run on a structural copy that shares its parameters, under a torch function mode of this thread. So the
Python code in between may be anything, and neither the model nor another thread notices. A recording holds for the call
that was recorded; :mod:`repvgg.collapse.variants` examines what else it holds for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repvgg._calls import Call
from repvgg.collapse.effects import Effects
from repvgg.collapse.graph_builder import GraphBuilder, NeedsValuesError, are_constants, user_code
from repvgg.collapse.instrument import META, InstrumentedCopy, tensors_of_leaf
from repvgg.collapse.modules import (
    is_leaf,
    is_scripted,
    is_torch_utility,
    preserved_random_state,
    state_outside_pytorch,
    storage_of,
)
from repvgg.collapse.number_reader import ELEMENTS, SIZES, NumberReader
from repvgg.collapse.recording import (
    DRAWS_OUTSIDE_PYTORCH,
    RANDOM,
    Frame,
    Recording,
    is_constant,
    leaves,
    map_values,
    mark_constants,
)
from repvgg.collapse.shape_inference import ARITHMETIC, COSTLY, function_of, output_without_values, shapes_suffice
from repvgg.collapse.tracked import UNKNOWN, Unknown, UnknownValueError, untracked
from repvgg.errors import ReparamError
from repvgg.symbolic import assign_item, first_float

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


def record(
    model: nn.Module,
    call: Call,
    *,
    forced: Sequence[bool] = (),
    mode: Mapping[str, bool] | None = None,
    attributes: Mapping[str, Any] | None = None,
    on_meta: bool = False,
    stop_at_unknown: bool = False,
) -> Recording:
    """Call a model and record what it does.

    Args:
        model: the model; neither it nor the inputs change.
        call: the arguments of the call. Meta tensors stand for tensors of any values on the device of the model.
        forced: which way its first decisions shall go, whatever the numbers say; see :attr:`Recording.decisions`.
        mode: paths of modules with a training flag other than that of eval mode.
        attributes: other values of attributes of the model itself, such as ``UNKNOWN``.
        on_meta: run on meta tensors of the same shapes: for models without values.
        stop_at_unknown: end at the first branch on an unknown value.

    Raises:
        NeedsValuesError: the code reads elements of tensors, and this is a run on meta tensors.
        UnknownValueError: an unknown value selects what is computed.
        Exception: whatever the code itself raises.
    """
    guard: Any = nullcontext if on_meta else preserved_random_state
    values = copy_parameters = watch_draws = False
    while True:
        recorder = _Recorder(model, on_meta, forced, mode or {}, values, copy_parameters, watch_draws)
        builder = recorder.builder
        recorder.numbers.stop_at_unknown = stop_at_unknown
        with guard(), torch.inference_mode(False), torch.no_grad():
            try:
                recording = recorder.run(call, attributes or {})
            except Exception as error:
                if isinstance(error, UnknownValueError) or error is recorder.error_of_shapes:
                    raise  # no value of a tensor changes that
                if not (recorder.layers_left_out or builder.needs_values or recorder.writes_parameter):
                    raise
            else:
                # The code may have caught the errors that say so.
                if not (builder.needs_values or recorder.writes_parameter or recorder.has_drawn):
                    return recording
            finally:
                recorder.release()
        if recorder.writes_parameter:
            copy_parameters = True
        elif recorder.has_drawn:
            watch_draws = True
        else:
            values = True


class _WritesParameterError(Exception):
    """The code is about to write to the memory of a parameter of the model."""


class _Recorder(TorchFunctionMode):
    """Runs a structural copy of a model, and adds what it does to a graph.

    Args:
        model, on_meta, forced, mode: see :func:`record`.
        values: whether layers are computed, or only their shapes.
        copy_parameters: whether the code may write to parameters.
        watch_draws: whether to look in each call of a module for draws of random numbers that the graph does not show.
    """

    def __init__(
        self,
        model: nn.Module,
        on_meta: bool,
        forced: Sequence[bool],
        mode: Mapping[str, bool],
        values: bool,
        copy_parameters: bool,
        watch_draws: bool,
    ) -> None:
        super().__init__()
        self.copy = InstrumentedCopy(
            model, on_meta=on_meta, copy_parameters=copy_parameters, mode=mode, call=self._call, call_leaf=self._leaf
        )
        self.builder = GraphBuilder(self.copy, on_meta)
        self.builder.read_values = values
        self.numbers = NumberReader(self.builder, forced)
        self.model, self.on_meta, self.copy_parameters = model, on_meta, copy_parameters
        like = first_float(model)
        self.device = torch.device("cpu") if like is None else like.device
        self.values = values
        self.watch_draws = watch_draws
        self.writes_parameter = self.has_drawn = self.layers_left_out = False
        self.failed_in = ""
        self.error_of_shapes: Exception | None = None
        self.state_outside_pytorch = state_outside_pytorch()

    def run(self, call: Call, attributes: Mapping[str, Any]) -> Recording:
        """Run the call and return its recording."""
        builder, copy = self.builder, self.copy
        builder.start()
        call = Call(*map_values(self._on_device, (call.args, dict(call.kwargs))))
        vars(copy.module).update({name: self._input(value) for name, value in attributes.items()})
        args, kwargs = map_values(self._input, call.args), map_values(self._input, dict(call.kwargs))
        builder.root.args, builder.root.kwargs = builder.nodes_of(args), builder.nodes_of(kwargs)
        if is_scripted(copy.module) or is_leaf(self.model):
            raise ReparamError("there is no Python forward to record")
        self.effects = effects = Effects(builder)
        forward = copy.forward
        try:
            with self:
                output = forward(*args, **kwargs)
                self._note_draws(at_end=True)
        except Exception as error:
            error.decisions = tuple(self.numbers.decisions)  # type: ignore[attr-defined]  # what led to it
            error.frame_path = self.failed_in  # type: ignore[attr-defined]
            error.read_values = builder.read_values  # type: ignore[attr-defined]
            raise
        builder.root.output = builder.nodes_of(output)
        builder.paused = True
        mark_constants(builder.graph)
        changed, changed_by_others, constant = effects.changed()
        effects.check_assignments()
        if constant or builder.assigned:
            if builder.left_out:
                builder.needs_values = True  # to compare with another call
            elif not effects.same_again(forward, call, output, is_forced=bool(self.numbers.forced)):
                constant = set()
                effects.refuse_assignments()
        del args, kwargs, output
        effects.find_stored()
        builder.graph.output(leaves(builder.root.output))
        self.numbers.drop_unused()
        mark_constants(builder.graph)
        return Recording(
            module=self.model,
            graph=builder.graph,
            root=builder.root,
            frame_of=builder.frame_of,
            escaped=builder.escaped,
            opaque=builder.opaque,
            changed=frozenset(changed - constant),
            changed_by_others=frozenset(changed_by_others - constant),
            assigned=dict(builder.assigned),
            decisions=tuple(self.numbers.decisions),
            own_devices=self.numbers.own_devices,
            on_meta=self.on_meta,
            writes_parameters=self.copy_parameters,
            read_values=builder.read_values,
        )

    def release(self) -> None:
        """Release the copy and all tensors of the run, which are in reference cycles with the recorder."""
        self.copy.release()
        self.builder.tensors.clear()

    def _on_device(self, value: Any) -> Any:
        """Return an argument on the device of the model; with random values if it has none and they are needed."""
        if not isinstance(value, Tensor) or self.on_meta or (value.is_meta and not self.values):
            return value
        if not value.is_meta:
            return value.to(self.device)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(value.shape, generator=generator).to(device=self.device, dtype=value.dtype)

    def _input(self, value: Any) -> Any:
        """Return an argument to run on, with a placeholder if it is a tensor or unknown."""
        if isinstance(value, Tensor):
            own = value.detach()
            if self.on_meta:
                own = torch.empty_like(own, device=META)
            elif own.is_meta:
                own = torch.empty_like(own, device=self.device)
                self.builder.left_out = True
            else:
                own = own.clone()
            self.builder.tensors.bind(own, self.builder.graph.placeholder(f"input_{len(self.builder.graph.nodes)}"))
            return own
        if value is UNKNOWN:
            node = self.builder.graph.placeholder(f"unknown_{len(self.builder.graph.nodes)}")
            node.meta["unknown"] = True
            return Unknown(self.numbers, node)
        return value

    # Calls of modules

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        builder = self.builder
        if builder.paused:
            return forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # for what we do ourselves
            frame = Frame(path, builder.frame, builder.nodes_of(args), builder.nodes_of(kwargs))
            frame.methods = user_code()[1]
            self._note_draws()
            self.effects.enter(path)
        builder.frame.items.append(frame)
        builder.frame = frame
        try:
            output = forward(*args, **kwargs)
            self._note_draws()
        except Exception:
            self.failed_in = self.failed_in or path
            raise
        finally:
            builder.frame = frame.parent or builder.root
        with torch._C.DisableTorchFunction():
            frame.output = builder.nodes_of(output)
            self.effects.leave(path)
        return output

    def _leaf(self, part: nn.Module, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.builder.paused:
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
            return any(self.copy.path_of(value) is not None for value in vars(part).values())
        now, before, builder = tensors_of_leaf(part), self.copy.tensors_of.get(part, []), self.builder
        return len(now) != len(before) or any(
            value is not old or (builder.assigned and builder.tensors.get(value) in builder.assigned)
            for value, old in zip(now, before, strict=True)
        )

    def _note_draws(self, *, at_end: bool = False) -> None:
        """Note that the code of this frame drew random numbers that the graph does not show.

        Reading the states takes longer than a call of a small module, so this is done in each only if any drew some.
        """
        if not (self.watch_draws or at_end):
            return
        state = state_outside_pytorch()
        if state != self.state_outside_pytorch:
            self.has_drawn = not self.watch_draws
            self.builder.frame.caveats.append(DRAWS_OUTSIDE_PYTORCH)
            self.state_outside_pytorch = state

    # Functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        kwargs = kwargs or {}
        if self.builder.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self.numbers.read(func, args[0])
        if name == "__set__" and func.__self__ is Tensor.data:  # type: ignore[attr-defined]
            return self._assign_data(*args)
        if name in _MODE_SWITCHES:
            self.builder.frame.caveats.append("switches autograd or autocast")
            return func(*args, **kwargs)
        is_method = getattr(Tensor, name, None) is func
        if is_method and name in SIZES and isinstance(args[0], Tensor):
            return self.numbers.size(name, func, args, kwargs)
        if is_method and name == "is_contiguous":
            return self.numbers.ask(self.builder.without_recording(func, *args, **kwargs))
        if is_method and name in ELEMENTS and isinstance(args[0], Tensor):
            return self.numbers.element(name, func, args)
        if not is_method:
            return self._run("call_function", func, func, args, kwargs)
        if name == "__setitem__":
            return self._run("call_function", assign_item, assign_item, args, kwargs)
        if name in _OPERATORS and not kwargs:
            args = args[::-1] if name.startswith("__r") else args
            return self._run("call_function", _OPERATORS[name], _OPERATORS[name], args, kwargs)
        return self._run("call_method", name, func, args, kwargs)

    def _run(self, op: str, target: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a function or a leaf module, and record it as a node."""
        builder = self.builder
        given = builder.nodes_of(args), builder.nodes_of(kwargs)
        flat = leaves((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        versions = [None if value.is_inference() else value._version for value in tensors]
        name = getattr(target, "__name__", str(target))
        of_constants = are_constants(given)
        if tensors and not (self.copy_parameters or self.on_meta) and _writes(name, kwargs):
            written_to, memory = kwargs.get("out", tensors[0]), self.copy.parameter_memory
            if any(isinstance(value, Tensor) and storage_of(value) in memory for value in leaves(written_to)):
                self.writes_parameter = True
                raise _WritesParameterError
        if any(isinstance(value, Unknown) for value in flat):
            node = builder.add(op, target, *given)
            node.meta["unknown"] = True
            return Unknown(self.numbers, node)
        if builder.left_out and op != "call_module" and not shapes_suffice(name, tensors):
            builder.require_values(of_constants)
        generator_before = torch.default_generator.get_state() if of_constants else None
        args, kwargs = map_values(untracked, args), map_values(untracked, kwargs)
        try:
            # What is computed from parameters may be stored.
            leaves_out = not of_constants and (self.on_meta or not self.values)
            result = self._left_out(op, name, func, args, kwargs) if leaves_out else None
            if result is None:
                result = builder.without_recording(func, *args, **kwargs)
        except Exception as error:
            # No kernel for meta tensors, or the shape of the result depends on elements.
            if self.on_meta and isinstance(error, NotImplementedError):
                raise NeedsValuesError(str(error)) from error
            if op == "call_function" and name in ARITHMETIC:
                self.error_of_shapes = error
            raise
        node = builder.add(op, target, *given)
        # Meta tensors draw nothing, and a GPU has its own generator. Dropout of feature maps may stay in a new forward.
        named = op != "call_module" and name in RANDOM
        drawn = generator_before is not None and not generator_before.equal(torch.default_generator.get_state())
        if named or (drawn and all(map(is_constant, node.all_input_nodes))):
            node.meta["constant"] = False
            builder.opaque[node] = f"{name} draws random numbers"
        if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            builder.opaque[node] = "it runs under autocast"
        changed = [v for v, old in zip(tensors, versions, strict=True) if old is not None and v._version != old]
        if written := _written(changed, args, kwargs):
            node.meta["writes"] = [builder.node_of(value) for value in written]
            for value in written:
                # From here on the written tensor is known under its new name.
                builder.tensors.bind(value, node)
        elif isinstance(result, Tensor) and self.copy.path_of(result) is not None:  # as a buffer that is on the device
            node.meta["own"] = True
        builder.bind_result(result, node)
        return result

    def _assign_data(self, target: Tensor, value: Tensor) -> None:
        """Assign to ``target.data``: from here on, the tensor is that of ``value``."""
        builder = self.builder
        node = builder.add("call_function", getattr, (builder.node_of(value), "data"), {})
        builder.without_recording(setattr, target, "data", value)
        builder.tensors.bind(target, node)
        builder.assigned[node] = self.copy.path_of(target) or ""

    def _left_out(self, op: str, name: str, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Return the output of a layer or function without its values; None if it has to be computed."""
        builder = self.builder
        if op == "call_module":
            layer = getattr(func, "__self__", None)  # none of a compiled script
            found = None if kwargs or len(args) != 1 else builder.without_recording(function_of, layer, *args)
            if found is None:
                return None
            name, args, kwargs = found
        # PyTorch's own kernels for meta tensors are slow, as they are written in Python.
        if not (builder.left_out or self.on_meta or name in COSTLY):
            return None
        result: Tensor | None = builder.without_recording(output_without_values, name, args, kwargs)
        if result is not None and not self.on_meta:
            builder.left_out = self.layers_left_out = True
        return result


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


def _written(changed: list[Tensor], args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a function wrote to, of the arguments whose version it changed.

    Views of a tensor share its version. Of those with the same memory, the first argument, or ``out``, was written to.
    """
    first = kwargs.get("out") if kwargs.get("out") is not None else args[0] if args else next(iter(changed), None)
    targets = {id(value) for value in leaves(first)}
    memory = {storage_of(value) for value in changed if id(value) in targets}
    return [value for value in changed if id(value) in targets or storage_of(value) not in memory]
