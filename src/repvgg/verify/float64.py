"""Run a model in float64 without a copy of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repvgg._arguments import per_axis
from repvgg._calls import Call
from repvgg._structure import tensors
from repvgg.errors import UsageError, first_line
from repvgg.verify.execution import structural_copy

_FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.linspace, torch.rand, torch.randn)
_DEFAULT_DTYPE = frozenset((*_FACTORIES, torch.tensor, torch.as_tensor, torch.arange, torch.logspace))
_CASTS = frozenset((Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type))
_KERNELS = frozenset((torch.conv1d, torch.conv2d, torch.conv3d, F.linear))
_NUMBERS_PER_PART = 1 << 19  # 4 MiB of float64, which stay in the cache and need no new pages
_NEVER_CAST = frozenset((Tensor.__setitem__, Tensor.copy_))  # they convert to the dtype of the target themselves


class Float64Mode(TorchFunctionMode):
    """Inside, whatever depends on a float64 tensor is computed in float64; the mode is local to the thread.

    The inputs are float64 tensors. A torch function that gets one converts its other floating-point arguments, so a
    weight exists in float64 only while it is used. Requests for a coarser dtype (``x.float()``, ``dtype=float32``) are
    not obeyed then. What depends on weights and constants alone is computed as the model computes it, in its own
    dtype: a weight that is rounded to a grid in the forward is the same as outside.

    Args:
        dtype: of the model: constants that a forward makes without a dtype are float64 if it is float64, as they would
            be with ``torch.set_default_dtype``.
        noise: relative size of a random change of each weight and constant at its use, to see how sensitive a model is.
    """

    def __init__(self, dtype: torch.dtype, noise: float = 0.0) -> None:
        super().__init__()
        self.constants_in_float64 = dtype is torch.float64
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # an attribute, such as shape: by far the most frequent
            return func(*args, **kwargs)
        if func in _DEFAULT_DTYPE and self.constants_in_float64:
            return self._make_constant(func, args, kwargs)
        if func in _NEVER_CAST or not _any_float64((args, kwargs)):
            return func(*args, **kwargs)
        if func in _CASTS and func not in (Tensor.to, Tensor.type):
            return args[0].double()
        if func in _KERNELS and not kwargs:
            if (found := self._in_parts(func, *args)) is None and func is not F.linear:
                found = self._depthwise(*args)
            if found is not None:
                return found
        # In-place functions convert to the dtype of their target themselves, which must stay the same tensor.
        written = args[0] if args and _is_in_place(func) else None
        args, kwargs = self._cast(args, written), self._cast(kwargs, None)
        return func(*args, **kwargs)

    def _in_parts(
        self, func: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any
    ) -> Tensor | None:
        """Compute a convolution by a large kernel for some of its output channels at a time, else return None.

        Only the kernels of these are in float64 then.
        """
        parts = min(weight.numel() // _NUMBERS_PER_PART, len(weight))
        has_groups = len(geometry) > 3 and geometry[3] != 1
        if parts < 2 or has_groups or weight.dtype not in _WIDE or weight.dtype is torch.float64:
            return None
        kernels = weight.tensor_split(parts)
        biases = [None] * len(kernels) if bias is None else bias.tensor_split(parts)
        outputs = [
            func(x, self._cast_tensor(kernel), own if own is None else self._cast_tensor(own), *geometry)
            for kernel, own in zip(kernels, biases, strict=True)
        ]
        return torch.cat(outputs, 1 - weight.dim())

    def _depthwise(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """Compute a depthwise convolution as a sum over the taps of its kernel; return None for all others.

        On a CPU, PyTorch computes that of float64 tensors one channel at a time, which takes most of a proof.
        """
        axes = weight.dim() - 2
        is_depthwise = 1 < groups == len(weight) == x.shape[1] and weight.shape[1] == 1 and x.dim() == weight.dim()
        if not is_depthwise or x.device.type != "cpu" or isinstance(padding, str):
            return None
        strides, paddings, dilations = (per_axis(value, axes) for value in (stride, padding, dilation))
        x = F.pad(self._cast_tensor(x), [side for pad in reversed(paddings) for side in (pad, pad)])
        reaches = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=True)]
        stops = [size - reach for size, reach in zip(x.shape[2:], reaches, strict=True)]
        if min(stops) < 1:
            return None  # PyTorch says why
        kernel, out = self._cast_tensor(weight), torch.zeros((), dtype=torch.float64)
        for tap in product(*map(range, weight.shape[2:])):
            starts = [step * at for step, at in zip(dilations, tap, strict=True)]
            steps = zip(starts, stops, strides, strict=True)
            place: Any = (..., *(slice(start, start + stop, stride) for start, stop, stride in steps))
            weights: Any = (slice(None), 0, *tap)
            out = out + x[place] * kernel[weights].view(-1, *(1,) * axes)
        return out if bias is None else out + self._cast_tensor(bias).view(-1, *(1,) * axes)

    def _make_constant(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if kwargs.get("dtype") is None and torch.get_default_dtype() is not torch.float64:
            found = func(*args, **kwargs)  # integers and booleans have no default dtype
            if found.dtype is not torch.get_default_dtype() or tensors((args, kwargs)):
                return found
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)

    def _cast(self, value: Any, written: Any) -> Any:
        """Convert tensors, and floating-point dtypes that are asked for, in the arguments of a function."""
        if isinstance(value, Tensor):
            return value if value is written else self._cast_tensor(value)
        if isinstance(value, torch.dtype):
            return _WIDE.get(value, value)
        if isinstance(value, str):
            return _WIDE_NAMES.get(value, value)
        if type(value) in (list, tuple):
            return type(value)(self._cast(item, written) for item in value)
        if type(value) is dict:
            return {name: self._cast(item, written) for name, item in value.items()}
        return value

    def _cast_tensor(self, value: Tensor) -> Tensor:
        if value.dtype not in _WIDE or value.dtype is torch.float64:
            return value
        wide = value.to(_WIDE[value.dtype])
        if self.noise:
            # device="cpu": numbers that do not depend on the device, and no other generator is advanced.
            change = torch.rand(wide.shape, generator=self.generator, device="cpu", dtype=torch.float64)
            wide = wide * (1.0 + self.noise * (2.0 * change.to(wide.device) - 1.0))
        return wide


_WIDE = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float64)
_WIDE |= {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_WIDE_NAMES = {f"torch.{kind}Tensor": "torch.DoubleTensor" for kind in ("Float", "Half", "BFloat16")}
_WIDE_NAMES |= {f"torch.cuda.{kind}Tensor": "torch.cuda.DoubleTensor" for kind in ("Float", "Half", "BFloat16")}


def _any_float64(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype is torch.float64 or value.dtype is torch.complex128
    if type(value) in (list, tuple):
        return any(map(_any_float64, value))
    return type(value) is dict and any(map(_any_float64, value.values()))


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return name.endswith("_")


class Float64Runner:
    """A model as a function of a :class:`~repvgg._calls.Call`, computed in float64 and in eval mode.

    It runs under :class:`Float64Mode`, and shares its parameters with the model. A model whose parameters all are
    float64 runs as it is: what its forward computes in float32 on purpose is part of the function. A model that runs in
    neither way (a compiled script, an LSTM, a device without float64) is copied to float64 once; that needs memory for
    its weights in float64.

    Args:
        model: the model; it is not changed. Call the runner inside :func:`repvgg.verify.isolated_eval`.
        who: "the reference", for messages.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.original, self.model, self.who = model, structural_copy(model), who
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.dtype = torch.get_default_dtype() if first is None else first.dtype
        self.copy: nn.Module | None = None
        self.is_float64 = {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float64}
        if first is not None and first.device.type == "mps":  # Metal has no float64
            self.copy = _copied_or_error(model, who)

    @property
    def module(self) -> nn.Module:
        """What is run: the model, or its copy."""
        return self.copy or self.model

    def __call__(self, call: Call, noise: float = 0.0) -> Any:
        """Return the output for float64 inputs, on any device; ``noise`` is that of :class:`Float64Mode`.

        Raises:
            UsageError: the model cannot run in float64. What it raises on these inputs in its own dtype is raised as
                it is.
        """
        if self.is_float64:
            try:
                return on_device_of(self.model, call)(self.model)
            except Exception:  # such as constants in the default dtype, which then has to be float64
                self.is_float64 = False
        if self.copy is None:
            try:
                return self._run(self.model, call, noise)
            except Exception:  # of any kind: it is the model's own code that runs
                own = call.map_tensors(lambda x: x.to(self.dtype) if x.is_floating_point() else x)
                # The inputs may be at fault, and not the dtype.
                on_device_of(self.model, own)(structural_copy(self.original))
                self.copy = _copied_or_error(self.original, self.who)
        try:
            return self._run(self.copy, call, noise)
        except Exception as error:
            raise UsageError(
                f"{self.who[0].upper()}{self.who[1:]} cannot run in float64 on these inputs ({first_line(error)}): "
                "wrap it in a function to run it as given."
            ) from error

    def _run(self, model: nn.Module, call: Call, noise: float) -> Any:
        with Float64Mode(torch.float64 if model is self.copy else self.dtype, noise):
            return on_device_of(model, call)(model)


def on_device_of(model: object, call: Call) -> Call:
    """Return the call with its tensors copied to the device of the model, as the model may write to them."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return call.map_tensors(lambda x: x.to(x.device if first is None else first.device, copy=True))


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a deep copy in ``dtype``, in eval mode, on the CPU if its device has no float64 (MPS)."""
    out = copy.deepcopy(structural_copy(model))
    if dtype is torch.float64 and any(p.device.type == "mps" for p in model.parameters()):
        out = out.cpu()
    return out.to(dtype)


def _copied_or_error(model: nn.Module, who: str) -> nn.Module:
    try:
        return copied(model, torch.float64)
    except Exception as error:
        raise UsageError(
            f"{who[0].upper()}{who[1:]} cannot be copied to float64 ({first_line(error)}): wrap it in a function to "
            "run it as given."
        ) from error
