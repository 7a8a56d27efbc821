"""Outputs of layers without their values: what a recording needs of most tensors is their shape.

Convolutions, linear layers and what works on each element of their outputs take nearly all of the time and memory of a
forward. A recorder leaves them out, and starts anew with all values as soon as the code does anything that may depend
on one. The outputs are memory that nothing has written to, of which the operating system then provides none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU)
_CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh"}
_ARITHMETIC = {"add", "sub", "mul", "truediv"}
_ARITHMETIC_IN_PLACE = {"iadd", "isub", "imul", "itruediv"}

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


def output_without_values(layer: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return a tensor in place of the output of a convolution or a linear layer; None if it must be computed."""
    known = type(layer) is nn.Linear or type(layer) in _CONVOLUTIONS
    if not known or kwargs or len(args) != 1 or type(args[0]) is not Tensor:
        return None
    if torch.is_autocast_enabled(args[0].device.type):
        return None
    x, weight = args[0], layer._parameters.get("weight")
    if weight is None or layer._forward_pre_hooks or layer._forward_hooks or not _is_plain(x, weight):
        return None
    shape: tuple[int, ...]
    if type(layer) is nn.Linear:
        if not x.dim() or x.shape[-1] != weight.shape[1]:
            return None
        shape = (*x.shape[:-1], weight.shape[0])
    else:
        fits = x.dim() == weight.dim() == _CONVOLUTIONS[type(layer)] and x.shape[1] == weight.shape[1] * layer.groups
        if not fits or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return None
        geometry = zip(x.shape[2:], weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
        sizes = [(size + 2 * pad - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, pad, step in geometry]
        if min(sizes) < 1:
            return None
        shape = (x.shape[0], weight.shape[0], *sizes)
    return x.new_empty(shape)


def elementwise_without_values(name: str, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a tensor in place of what an elementwise function or layer returns for arguments; None for others."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.is_contiguous() or not x.dim():
        return None
    if _under_autocast(x) or x.layout is not torch.strided or x.requires_grad:
        return None
    if layer is not None:
        if kwargs or len(args) != 1 or layer._forward_hooks or layer._forward_pre_hooks:
            return None
        if type(layer) in _NORMS and layer.track_running_stats and not layer.training:
            return _normalized(layer, x)
        if type(layer) in _ELEMENTWISE:
            return _as_written(x) if getattr(layer, "inplace", False) else torch.empty_like(x)
        return None
    if name in _ACTIVATIONS and len(args) == 1 and kwargs.keys() <= {"inplace"}:
        return _as_written(x) if kwargs.get("inplace") else torch.empty_like(x)
    if name == "batch_norm" and not any(isinstance(value, bool) and value for value in (*args[5:6], *kwargs.values())):
        mean_and_variance = [*args[1:3], *(kwargs[key] for key in ("running_mean", "running_var") if key in kwargs)]
        fit = all(isinstance(one, Tensor) and one.shape == x.shape[1:2] for one in mean_and_variance)
        return torch.empty_like(x) if fit and len(mean_and_variance) == 2 else None
    if name in _ARITHMETIC | _ARITHMETIC_IN_PLACE and len(args) == 2 and not kwargs:
        return _arithmetic(name in _ARITHMETIC_IN_PLACE, x, args[1])
    return None


def _under_autocast(x: Tensor) -> bool:
    # The meta device has no autocast: what would happen on the device of the model is left to PyTorch.
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda") if x.is_meta else (x.device.type,)))


def _arithmetic(in_place: bool, x: Tensor, y: Any) -> Tensor | None:
    """Return a tensor in place of a sum or product that has the shape of its first operand."""
    if isinstance(y, Tensor):
        if y.dtype is not x.dtype or y.device != x.device or y.requires_grad or not y.is_contiguous():
            return None
        sides = zip(reversed(x.shape), reversed(y.shape), strict=False)
        if y.dim() > x.dim() or any(size not in (1, full) for full, size in sides):
            return None
    elif type(y) not in (int, float, bool):
        return None
    return _as_written(x) if in_place else torch.empty_like(x)


def _as_written(x: Tensor) -> Tensor:
    """Return a tensor as if something had been written to all of it: its version tells."""
    x.narrow(0, 0, 0).zero_()
    return x


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether the output has the dtype, device and memory format of both."""
    same = x.dtype is weight.dtype and x.device == weight.device
    return same and x.layout is torch.strided and x.is_contiguous() and weight.is_contiguous() and x.numel() > 0


def meta_shortcut(layer: Any) -> Callable[..., Any] | None:
    """Return what gives the shape of a frequent layer whose meta kernel is slow, as it is written in Python."""
    if type(layer) in _NORMS and layer.track_running_stats:
        return partial(_normalized, layer)
    return torch.empty_like if type(layer) in _ELEMENTWISE and not getattr(layer, "inplace", False) else None


def _normalized(norm: Any, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
    norm._check_input_dim(input)
    if input.shape[1] != norm.num_features:
        raise ValueError(f"a batch norm of {norm.num_features} channels gets {input.shape[1]}")
    return torch.empty_like(input)
