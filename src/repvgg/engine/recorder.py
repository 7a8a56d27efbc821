"""Records which torch functions a model calls on its images, without a change to anything outside of this thread.

The model's own ``forward`` runs on a structural copy, with meta tensors for everything that depends on the images: they
have shapes but no values. A ``TorchFunctionMode`` sees each call; such modes belong to one thread. (The tracer of
torch.fx patches ``nn.Module`` for the whole process while it runs.)
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repvgg.engine.graph import ConvGeometry, Shape, pair
from repvgg.engine.image_size import as_sizes
from repvgg.engine.nested import map_arguments, tensors
from repvgg.errors import UnsupportedError
from repvgg.symbolic import shadow_of

MAX_CALLS = 50_000  # a forward that loops over pixels would not end

#: Torch functions and methods by name; a name stands for the function, the method and their aliases in all namespaces.
_NAMES = (
    *("conv2d", "conv_transpose2d", "linear", "batch_norm", "layer_norm", "softmax", "prelu", "interpolate", "pad"),
    "pixel_shuffle",
    *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "relu6", "hardtanh", "hardtanh_", "leaky_relu"),
    *("leaky_relu_", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "elu_"),
    *("mul", "mul_", "multiply", "multiply_", "add", "add_", "sub", "sub_", "div", "div_", "true_divide"),
    *("mean", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "dropout", "dropout2d"),
    *("flatten", "view", "reshape", "squeeze", "unsqueeze", "view_as", "reshape_as", "permute", "transpose"),
    *("__getitem__", "chunk", "split", "cat", "stack", "contiguous", "to", "cpu", "float", "type_as", "detach"),
    *("clone", "alias"),
)
_FUNCTIONS = {
    getattr(namespace, name): name for namespace in (torch, F, Tensor) for name in _NAMES if hasattr(namespace, name)
}
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of conv2d and of linear
# The parameters of functions whose results have known shapes.
_PARAMETERS = {
    **dict.fromkeys(("conv2d", "linear"), ARGUMENTS),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "mean": ("input", "dim", "keepdim"),
    "interpolate": ("input", "size", "scale_factor", "mode"),
    **dict.fromkeys(("mul", "multiply", "add"), ("input", "other")),
    **dict.fromkeys(("relu", "relu_", "sigmoid", "sigmoid_", "silu", "hardswish"), ("input", "inplace")),
    **dict.fromkeys(("batch_norm", "add_", "mul_", "multiply_", "gelu"), ("input",)),
    **dict.fromkeys(("dropout", "dropout2d"), ("input", "p", "training", "inplace")),
}
#: Positions of "inplace" in functions that are not among :data:`_PARAMETERS`.
_INPLACE = {"relu6": 1, "hardsigmoid": 1, "mish": 1, "hardtanh": 3, "leaky_relu": 2, "elu": 2, "celu": 2, "selu": 1}
_SIZES = (Tensor.shape.__get__, Tensor.size, Tensor.__len__)  # type: ignore[attr-defined]
_DEVICE = Tensor.device.__get__
_CONVERSIONS = ("__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__contains__")
_VALUES = frozenset(("item", "tolist", "numpy", "nonzero", "is_nonzero", "equal", "allclose", *_CONVERSIONS))
_CPU = torch.device("cpu")


@final
@dataclass(eq=False)
class Call:
    """One call of a torch function on tensors that depend on the images.

    Attributes:
        function: name of the function; "input" for the images, "item" for one of several tensors that a call returned.
        args: the arguments, with calls in place of the tensors that they returned.
        kwargs: the same.
        name: path of the torch module that made the call, or a unique name of the function, for messages.
        what: class of that module, or the name of the function, for messages.
        shape: of the tensor that it returned; () if it returned something else.
        dtype: of that tensor, or None.
        callee: the torch function itself, to call it again.
    """

    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str
    what: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    callee: Callable[..., Any] | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name; ``names`` are those of the positional ones."""
        return dict(zip(names, self.args, strict=False)) | dict(self.kwargs)


class Recording(NamedTuple):
    """The calls of one run; they are linked by their arguments and users.

    Attributes:
        inputs: the first calls, whose values are the inputs.
        calls: all others, in execution order, without that of the output.
        output: what the model returned, with calls in place of tensors; None if it raised.
        error: what the model raised, or None.
        computed: ids of tensors that the model computed from something else than the images.
    """

    inputs: tuple[Call, ...]
    calls: Sequence[Call]
    output: Any
    error: Exception | None
    computed: Mapping[int, object]


Forward: TypeAlias = Callable[..., Any]


def record(
    forward: Forward, shapes: Sequence[Shape], paths: ModulePaths | None = None, *, sizes_vary: bool = True
) -> Recording:
    """Run ``forward`` on images of these shapes that have no values, and return its calls.

    Args:
        forward: a function of the images. It must not refer to modules whose state it changes; see :func:`copy_of`.
        shapes: (N, C, H, W) of each argument.
        paths: the modules of :func:`copy_of`, to name the calls.
        sizes_vary: whether the recording is for images of any height and width, so that no branch may depend on them.
    """
    recorder = _Recorder(paths or ModulePaths(), sizes_vary)
    images = [_floats(shape) for shape in shapes]
    inputs = tuple(recorder.add("input", (), {}, each) for each in images)
    recorder.calls.clear()
    output, error = None, None
    try:
        with torch.no_grad(), recorder:
            output = forward(*images)
    except Exception as raised:  # a user's forward may raise anything
        error = raised
    else:
        output = map_arguments(recorder.as_call, output)
    return Recording(inputs, recorder.calls, output, error, recorder.computed)


@final
class ModulePaths:
    """The stack of modules that are running."""

    def __init__(self) -> None:
        self._running: list[tuple[str, nn.Module]] = []

    def watch(self, path: str, module: nn.Module) -> None:
        """Let a module of a copy report when it runs."""
        module.register_forward_pre_hook(lambda *_: self._running.append((path, module)))
        module.register_forward_hook(self._leave)

    def reset(self) -> None:
        """Forget modules that were left by an exception."""
        self._running.clear()

    def _leave(self, *_: object) -> None:
        self._running.pop()

    def name_of_call(self, function: str, taken: Counter[str]) -> tuple[str, str]:
        """Return a name and a description: of the torch module that is running, else of the function."""
        path, module = self._running[-1] if self._running else ("", None)
        if module is not None and runs_code_of_torch(module):
            return path, type(module).__name__
        name = f"{path}.{function}" if path else function
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name] - 1}", function


def runs_code_of_torch(module: nn.Module) -> bool:
    """Whether the forward of a module is one of PyTorch's own."""
    return "forward" not in vars(module) and type(module).forward.__module__.startswith("torch.")


def copy_of(model: nn.Module) -> tuple[nn.Module, ModulePaths]:
    """Return a copy in eval mode that shares the parameters of ``model``, for :func:`record`.

    Raises:
        UnsupportedError: a module has hooks or is compiled by TorchScript.
    """
    for name, module in model.named_modules():
        subject = repr(name) if name else "The model"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{subject} is compiled by TorchScript, which the engine cannot look into: pass the nn.Module "
                "that it was made from."
            )
        if any(map(nn.parameter.is_lazy, module._parameters.values())):
            raise UnsupportedError(f"{subject} has no weights yet: run the model once, on real images.")
        if module._forward_hooks or not all(map(_only_checks, module._forward_pre_hooks.values())):
            raise UnsupportedError(f"{subject} has forward hooks, which the engine would not call: remove them first.")
    # Buffers need another identity, or shadow_of would read and copy their memory.
    copied = shadow_of(
        model, lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.detach(), training=False
    )
    paths = ModulePaths()
    for (path, module), original in zip(copied.named_modules(), model.modules(), strict=True):
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), original._forward_pre_hooks.copy()
        if "forward" in vars(original):
            _copy_forward(module, original)
        paths.watch(path.replace("_orig_mod.", ""), module)  # without what torch.compile adds
    return copied, paths


def _only_checks(hook: Any) -> bool:
    """Whether a hook only refuses calls, like those of a collapsed network."""
    return getattr(hook, "only_checks", False)


def _copy_forward(module: Any, original: nn.Module) -> None:
    """Let a copy of a module whose forward was replaced on the instance run the same code."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # not imported: a compiled model has done so
    if dynamo is not None and isinstance(original, dynamo.OptimizedModule):
        vars(module)["forward"] = module._modules["_orig_mod"].__call__
    elif getattr(vars(original)["forward"], "__self__", None) is not original:
        vars(module)["forward"] = vars(original)["forward"]


@final
class _Recorder(TorchFunctionMode):
    def __init__(self, paths: ModulePaths, sizes_vary: bool) -> None:
        super().__init__()
        self._paths, self._sizes_vary = paths, sizes_vary
        self.calls: list[Call] = []
        paths.reset()
        # By id(), with the tensors, so that no new tensor gets the same id. A tensor that is written to is returned by
        # several calls: the last one counts.
        self._calls: dict[int, tuple[Call, Tensor]] = {}
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self.computed: dict[int, Tensor] = {}
        self._names: Counter[str] = Counter()
        self._outdated: dict[int, str] = {}  # by id(): tensors whose memory was changed through another one

    def add(self, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Call:
        """Add a call; ``result`` is what it returned."""
        name, what = self._paths.name_of_call(function, self._names)
        call = Call(function, map_arguments(self.as_call, args), map_arguments(self.as_call, dict(kwargs)), name, what)
        self.calls.append(call)
        if isinstance(result, Tensor):
            self._bind(call, result)
        else:
            for index, tensor in enumerate(tensors(result)):
                item = Call("item", (call, index), {}, name, what)
                self.calls.append(item)
                self._bind(item, tensor)
        return call

    def _bind(self, call: Call, tensor: Tensor) -> None:
        call.shape, call.dtype = tuple(tensor.shape), tensor.dtype
        self._calls[id(tensor)] = call, tensor

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(tensor) in self._calls for tensor in tensors((args, kwargs))):
            return self._without_images(func, args, kwargs)
        if func == _DEVICE:
            return _CPU
        if func in _SIZES:
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            return as_sizes(func(*args, **kwargs), axis, sizes_vary=self._sizes_vary)
        function = _name_of(func)
        if function in _VALUES:
            raise UnsupportedError(
                f"The forward cannot be traced, because it reads values that depend on the images, by {function}: "
                "remove control flow that depends on values."
            )
        for tensor in tensors((args, kwargs)):
            if id(tensor) in self._outdated:
                raise UnsupportedError(
                    f"The forward changes a part of a tensor in place, by {self._outdated[id(tensor)]}, and then uses "
                    "the whole: combine the parts with torch.cat."
                )
        if self._reads_dtype_only(function, args):
            return self._constant(function, args, kwargs)
        result = self._run(func, function, args, kwargs)
        # What returns None may write to its arguments, as x[0] = 1 does.
        if result is None or any(True for _ in tensors(result)):
            if len(self.calls) > MAX_CALLS:
                raise UnsupportedError(f"The model calls more than {MAX_CALLS:,} functions: remove loops over pixels.")
            self.add(function, args, kwargs, result).callee = func
            if writes_in_place(function, args, kwargs):
                self._outdate(function, args[0] if args else kwargs["input"])
        return result

    def _reads_dtype_only(self, function: str, args: tuple[Any, ...]) -> bool:
        """Whether a call asks images for their dtype only, as those of grids of coordinates do."""
        if function in ("type_as", "to"):
            return isinstance(args[0], Tensor) and id(args[0]) not in self._calls
        return function in ("new_zeros", "new_ones", "new_full", "new_tensor", "new_empty")

    def _constant(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return a tensor that does not depend on the images."""
        if function in ("type_as", "to"):
            result: Tensor = args[0].to(torch.float32)  # images are float32
        else:
            like = torch.empty(0, dtype=args[0].dtype)
            result = getattr(like, function)(*args[1:], **{key: one for key, one in kwargs.items() if key != "device"})
        self.computed[id(result)] = result
        return result

    def _outdate(self, function: str, written: Tensor) -> None:
        """Forbid the use of tensors that share memory with one that is written to."""
        memory = _memory_of(written)
        for tensor in [tensor for _, tensor in self._calls.values()]:
            if tensor is not written and _memory_of(tensor) == memory:
                self._outdated[id(tensor)] = function
        if function == "__setitem__":  # it writes to a part, and the value of the whole is unknown
            self._outdated[id(written)] = function

    def _run(self, func: Any, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function with tensors that have no values."""
        args, kwargs = map_arguments(self._stand_in, args), map_arguments(self._stand_in, kwargs)
        if function == "cpu":
            return args[0]
        if function == "to":
            args, kwargs = map_arguments(_not_on_cpu, args), map_arguments(_not_on_cpu, kwargs)
        result = _own_result(function, args, kwargs)
        return func(*args, **kwargs) if result is None else result

    def _without_images(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = list(tensors((args, kwargs)))
        name = str(getattr(func, "__name__", ""))
        writes = (
            (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__") or "out" in kwargs
        )
        if writes and any(id(tensor) not in self.computed for tensor in inputs):
            raise UnsupportedError(f"The forward changes tensors of the model by {_name_of(func)}: remove that first.")
        result = func(*args, **kwargs)
        known = set(map(id, inputs))  # weight.to(dtype) may return the weight itself
        self.computed.update((id(tensor), tensor) for tensor in tensors(result) if id(tensor) not in known)
        return result

    def as_call(self, value: Any) -> Any:
        return self._calls[id(value)][0] if id(value) in self._calls else value

    def _stand_in(self, value: Any) -> Any:
        """Return a tensor without values in place of a weight."""
        if not isinstance(value, Tensor) or id(value) in self._calls:
            return value
        if id(value) not in self._stand_ins:
            self._stand_ins[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="meta"), value
        return self._stand_ins[id(value)][0]


def _name_of(func: Any) -> str:
    name = str(getattr(func, "__name__", type(func).__name__))
    # The name of a property is that of its descriptor.
    return _FUNCTIONS.get(func) or (str(getattr(func.__self__, "__name__", name)) if name == "__get__" else name)


def _not_on_cpu(value: Any) -> Any:
    return torch.device("meta") if isinstance(value, (str, torch.device)) and str(value) == "cpu" else value


def _own_result(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return a tensor of the shape that a function returns, or None if PyTorch shall find the shape.

    PyTorch's meta kernels of these functions are in Python and import SymPy and Dynamo: that takes two seconds.
    """
    if function not in _PARAMETERS:
        return None
    given = dict(zip(_PARAMETERS[function], args, strict=False)) | kwargs
    x = given.get("input")
    if not isinstance(x, Tensor) or x.dtype is not torch.float32:
        return None
    if function == "conv2d":
        return _floats((len(x), *_conv2d_shape(x.shape, given))) if x.ndim == 4 else None
    if function == "linear":
        return _floats((*x.shape[:-1], given["weight"].shape[0]))
    if function == "adaptive_avg_pool2d":
        wanted = given["output_size"]
        wanted = wanted if isinstance(wanted, (tuple, list)) else (wanted, wanted)
        sizes = (before if after is None else after for before, after in zip(x.shape[2:], wanted, strict=True))
        return _floats((*x.shape[:2], *sizes)) if x.ndim == 4 else None
    if function == "mean":
        return _floats(_mean_shape(x.shape, given)) if given.get("dtype") in (None, torch.float32) else None
    if function == "interpolate":
        return _interpolated(x, given)
    if function in ("mul", "multiply", "add"):
        other = given.get("other")
        if isinstance(other, Tensor) and other.dtype is torch.float32:
            return _floats(np.broadcast_shapes(x.shape, other.shape))
        return _floats(x.shape) if isinstance(other, (int, float)) else None
    return x if function.endswith("_") or given.get("inplace") else _floats(x.shape)


def _conv2d_shape(shape: Sequence[int], given: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the output. The input channels need not fit: the inference of shapes names the layer then."""
    outputs, _, *kernel = given["weight"].shape
    padding = given.get("padding", 0)
    if padding == "same":
        return outputs, shape[2], shape[3]
    pairs = given.get("stride", 1), 0 if padding == "valid" else padding, given.get("dilation", 1)
    stride, padding, dilation = map(pair, pairs)
    return outputs, *ConvGeometry(pair(kernel), stride, padding, dilation).output_size((shape[2], shape[3]))


def _interpolated(x: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    size, scale = given.get("size"), given.get("scale_factor")
    if x.ndim != 4 or given.get("mode", "nearest") not in ("nearest", "bilinear"):
        return None
    if size is None:
        scales = scale if isinstance(scale, (tuple, list)) else (scale, scale)
        size = [int(length * float(factor)) for length, factor in zip(x.shape[2:], scales, strict=True)]
    return _floats((*x.shape[:2], *pair(size)))


def _mean_shape(shape: Sequence[int], given: Mapping[str, Any]) -> list[int]:
    reduced = given.get("dim", given.get("axis"))
    reduced = range(len(shape)) if reduced is None else [reduced] if isinstance(reduced, int) else reduced
    places = {range(len(shape))[axis] for axis in reduced}  # raises for an axis that does not exist
    keeps = given.get("keepdim", False)
    return [1 if place in places else size for place, size in enumerate(shape) if keeps or place not in places]


def _floats(shape: Iterable[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device="meta")


# Memory


def writes_in_place(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes to its first argument."""
    if function.endswith("_") and not function.endswith("__"):
        return True
    parameters = _PARAMETERS.get(function, ())
    place = parameters.index("inplace") if "inplace" in parameters else _INPLACE.get(function, len(args))
    return function == "__setitem__" or bool(kwargs.get("inplace")) or (place < len(args) and args[place] is True)


def _memory_of(tensor: Tensor) -> int:
    """Return a number that tensors of the same memory share; meta tensors have no address."""
    return id(tensor if tensor._base is None else tensor._base)
