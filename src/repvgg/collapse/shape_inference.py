"""Outputs of layers without their values: what a recording needs of most tensors is their shape.

Convolutions, linear layers and what works on each element of their outputs take nearly all of the time and memory of a
forward. A recorder leaves them out, and starts anew with all values as soon as the code does anything that may depend
on one. The outputs are memory that nothing has written to, of which the operating system then provides none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._arguments import per_axis

_CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
_ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu"}
#: Functions that fail only for what their arguments are, whatever the values.
ARITHMETIC = {"add", "sub", "mul", "truediv", "iadd", "isub", "imul", "itruediv"}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FUNCTION_OF: dict[type, str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.Linear: "linear",
    **dict.fromkeys(_NORMS, "batch_norm"),
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.LeakyReLU: "leaky_relu",
}

#: Functions that take nearly all of the time: the first of them is what a recorder begins to leave values out at.
COSTLY = {*_CONVOLUTIONS, "linear"}

#: Functions and methods that return tensors, of shapes that do not depend on the values of the arguments, or a fact
#: about memory or dtype.
_SHAPES_SUFFICE = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear"),
    *("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "normalize", "local_response_norm"),
    *("relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_"),
    *("leaky_relu", "leaky_relu_", "elu", "selu", "celu", "mish", "prelu", "softplus", "softsign", "hardtanh"),
    *("hardtanh_", "threshold", "softmax", "log_softmax", "logsigmoid", "glu", "dropout", "dropout2d", "dropout3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "lp_pool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("boolean_dispatch", "fn", "_max_pool1d", "_max_pool2d", "_max_pool3d", "_adaptive_max_pool2d"),
    *("interpolate", "upsample", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "fold"),
    *("grid_sample", "affine_grid", "scaled_dot_product_attention", "embedding"),
    *("add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv"),
    *("floordiv", "floor_divide", "neg", "pow", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "addcmul"),
    *("lerp", "exp", "log", "sqrt", "rsqrt", "square", "abs", "clamp", "clamp_", "clip", "reciprocal", "sin", "cos"),
    *("maximum", "minimum", "mean", "sum", "var", "std", "amax", "amin", "norm", "cumsum", "argmax", "argmin"),
    *("topk", "sort", "argsort", "gather", "index_select", "masked_fill", "masked_fill_"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
    *("cat", "concat", "concatenate", "stack", "chunk", "split", "tensor_split", "unbind", "hstack", "vstack"),
    *("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"),
    *("permute", "transpose", "swapaxes", "movedim"),
    *("t", "contiguous", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile", "narrow", "select", "roll"),
    *("flip", "clone", "detach", "to", "type", "type_as", "float", "half", "double", "bfloat16", "copy_", "fill_"),
    *("zero_", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"),
    *("getitem", "assign_item", "meshgrid", "arange", "linspace", "zeros", "ones", "full", "empty"),
    *("stride", "is_contiguous", "is_floating_point"),
}


def shapes_suffice(name: str, tensors: list[Tensor]) -> bool:
    """Whether the result of a function needs no more than the shapes and dtypes of its arguments."""
    # A mask selects as many elements as are true.
    masks = name in ("getitem", "assign_item") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors)
    return name in _SHAPES_SUFFICE and not masks


def function_of(layer: Any, x: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """Return the function that a layer calls with ``x``, by its name, and the arguments; None if that is not known.

    Raises:
        ValueError: a batch norm gets other channels than its own.
    """
    name = _FUNCTION_OF.get(type(layer))
    if name is None or type(x) is not Tensor or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if name in COSTLY:
        weight = layer._parameters.get("weight")
        if weight is None or getattr(layer, "padding_mode", "zeros") != "zeros":
            return None
        geometry = () if name == "linear" else (None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return name, (x, weight, *geometry), {}
    if name != "batch_norm":
        return name, (x,), {"inplace": getattr(layer, "inplace", False)}
    if layer.training or not layer.track_running_stats:
        return None
    layer._check_input_dim(x)
    if x.shape[1] != layer.num_features:
        raise ValueError(f"a batch norm of {layer.num_features} channels gets {x.shape[1]}")
    return name, (x, layer.running_mean, layer.running_var), {}


def output_without_values(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a tensor in place of what a function returns for arguments; None if it must be computed."""
    x = args[0] if args else None
    if type(x) is not Tensor or not x.is_floating_point() or x.layout is not torch.strided or not x.is_contiguous():
        return None
    if not x.numel() or not x.dim() or x.requires_grad or _under_autocast(x):
        return None
    if name in _ACTIVATIONS and len(args) == 1 and kwargs.keys() <= {"inplace"}:
        return _as_written(x) if kwargs.get("inplace") else torch.empty_like(x)
    if name == "batch_norm" and not any(isinstance(value, bool) and value for value in (*args[5:6], *kwargs.values())):
        mean_and_variance = [*args[1:3], *(kwargs[key] for key in ("running_mean", "running_var") if key in kwargs)]
        fit = all(isinstance(one, Tensor) and one.shape == x.shape[1:2] for one in mean_and_variance)
        return torch.empty_like(x) if fit and len(mean_and_variance) == 2 else None
    if name in ARITHMETIC and len(args) == 2 and not kwargs:
        return _arithmetic(name.startswith("i"), x, args[1])
    find: Callable[..., Sequence[int] | None] | None = _SHAPES.get(name)
    try:
        shape = None if find is None else find(x, *args[1:], **kwargs)
    except TypeError:  # arguments of another form of the function
        return None
    return None if shape is None else x.new_empty(shape)


def _convolved(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Sequence[int] | None:
    axes = weight.dim() - 2
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] * groups or not _is_like(x, weight):
        return None
    if isinstance(padding, str):
        return None
    geometry = (per_axis(value, axes) for value in (stride, padding, dilation))
    steps = zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    sizes = [(size + 2 * pad - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, pad, step in steps]
    return (x.shape[0], weight.shape[0], *sizes) if min(sizes) > 0 else None


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Sequence[int] | None:
    fits = weight.dim() == 2 and x.shape[-1] == weight.shape[1] and _is_like(x, weight)
    return (*x.shape[:-1], weight.shape[0]) if fits else None


def _padded(x: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Sequence[int] | None:
    sizes = list(x.shape)
    if mode != "constant" or len(pad) > 2 * len(sizes):
        return None
    for place, side in enumerate(pad):
        sizes[-1 - place // 2] += side
    return sizes if min(sizes) > 0 else None


def _averaged(x: Tensor, dim: Any = None, keepdim: bool = False) -> Sequence[int] | None:
    dims = {place % x.dim() for place in ((dim,) if isinstance(dim, int) else dim or ())}
    kept = [1 if place in dims else size for place, size in enumerate(x.shape) if keepdim or place not in dims]
    return kept if dims else None


_SHAPES: dict[str, Callable[..., Sequence[int] | None]] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolved),
    "linear": _linear,
    "pad": _padded,
    "mean": _averaged,
}


def _under_autocast(x: Tensor) -> bool:
    # The meta device has no autocast: what would happen on the device of the model is left to PyTorch.
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda") if x.is_meta else (x.device.type,)))


def _arithmetic(in_place: bool, x: Tensor, y: Any) -> Tensor | None:
    """Return a tensor in place of a sum or product that has the shape of its first operand."""
    if isinstance(y, Tensor):
        sides = zip(reversed(x.shape), reversed(y.shape), strict=False)
        if y.requires_grad or not _is_like(x, y) or y.dim() > x.dim() or any(n not in (1, full) for full, n in sides):
            return None
    elif type(y) not in (int, float, bool):
        return None
    return _as_written(x) if in_place else torch.empty_like(x)


def _as_written(x: Tensor) -> Tensor:
    """Return a tensor as if something had been written to all of it: its version tells."""
    x.narrow(0, 0, 0).zero_()
    return x


def _is_like(x: Tensor, other: Tensor) -> bool:
    """Whether two operands have one dtype, device and memory format, which are those of the result."""
    return x.dtype is other.dtype and x.device == other.device and other.is_contiguous()
