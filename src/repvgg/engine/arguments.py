"""The arguments of torch functions by name, and what they mean for the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from repvgg.engine.graph import Pointwise
from repvgg.engine.recorder import Call

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_MIN_SOFTPLUS_THRESHOLD = 17.0  # beyond it, log(1 + exp(x)) is x in float32: PyTorch returns x above the threshold

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_BINARY = ("input", "other")
_PARAMETERS: dict[str, Sequence[str]] = {
    "conv2d": _CONV,
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "linear": _CONV,
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "prelu": ("input", "weight"),
    "avg_pool2d": (
        *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
    "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "adaptive_max_pool2d": ("input", "output_size", "return_indices"),
    **dict.fromkeys(("mean", "amax"), ("input", "dim", "keepdim")),
    **dict.fromkeys(("dropout", "dropout2d", "feature_dropout"), ("input", "p", "training", "inplace")),
    "chunk": ("input", "chunks", "dim"),
    "roll": ("input", "shifts", "dims"),
    "split": ("input", "split_size_or_sections", "dim"),
    "unbind": ("input", "dim"),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), ("tensors", "dim")),
    "pixel_shuffle": ("input", "upscale_factor"),
    "pixel_unshuffle": ("input", "downscale_factor"),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), ("input", "groups")),
    "pad": ("input", "pad", "mode", "value"),
    "interpolate": (
        *("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    ),
    "softmax": ("input", "dim"),
    **dict.fromkeys(("hardtanh", "hardtanh_"), ("input", "min_val", "max_val")),
    **dict.fromkeys(("clamp", "clamp_", "clip", "clip_"), ("input", "min", "max")),
    **dict.fromkeys(("clamp_min", "clamp_min_"), ("input", "min")),
    **dict.fromkeys(("clamp_max", "clamp_max_"), ("input", "max")),
    **dict.fromkeys(("leaky_relu", "leaky_relu_"), ("input", "negative_slope")),
    **dict.fromkeys(("elu", "elu_", "celu", "celu_"), ("input", "alpha")),
    "softplus": ("input", "beta", "threshold"),
    **dict.fromkeys(("threshold", "threshold_", "_threshold", "_threshold_"), ("input", "threshold", "value")),
    "log_softmax": ("input", "dim"),
    **dict.fromkeys(("sum", "amin"), ("input", "dim", "keepdim")),
    **dict.fromkeys(("max", "min"), ("input", "dim", "keepdim")),
    **dict.fromkeys(("norm", "linalg_vector_norm"), ("input", "p", "dim", "keepdim")),
    "normalize": ("input", "p", "dim", "eps"),
    "conv1d": _CONV,
    "addcmul": ("input", "tensor1", "tensor2"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "instance_norm": (
        *("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    ),
    **dict.fromkeys(("matmul", "bmm", "__matmul__", "__rmatmul__"), ("input", "other")),
    "multi_head_attention_forward": (
        *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k"),
        *("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias"),
    ),
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "gelu": ("input", "approximate"),
    **dict.fromkeys(("pow", "__pow__"), ("input", "exponent")),
}

#: Functions of two tensors, or of a tensor and a number.
ARITHMETIC = {
    **dict.fromkeys(("add", "add_", "__radd__"), "add"),
    **dict.fromkeys(("sub", "sub_", "subtract", "__rsub__", "rsub"), "sub"),
    **dict.fromkeys(("mul", "mul_", "multiply", "multiply_", "__rmul__"), "mul"),
    **dict.fromkeys(("div", "div_", "true_divide", "divide", "__rdiv__", "__rtruediv__"), "div"),
    "maximum": "max",
    "minimum": "min",
}

_WITHOUT_PARAMETERS = {
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "silu": "silu",
    "hardswish": "hard_swish",
    "hardsigmoid": "hard_sigmoid",
    "exp": "exp",
    "abs": "abs",
    "absolute": "abs",
    "__abs__": "abs",
    "square": "square",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "reciprocal": "reciprocal",
    "log": "log",
    "erf": "erf",
    "mish": "mish",
}
_WITHOUT_PARAMETERS |= {f"{name}_": kind for name, kind in _WITHOUT_PARAMETERS.items() if not name.endswith("_")}

#: Functions of each element, for :func:`pointwise`.
ELEMENTWISE = (
    *_WITHOUT_PARAMETERS,
    *("relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max"),
    *("clamp_max_", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "neg", "neg_", "negative", "pow", "__pow__"),
    *("softplus", "logsigmoid", "softsign", "selu", "selu_", "celu", "celu_", "threshold", "threshold_"),
    *("log_sigmoid", "_threshold", "_threshold_"),
)


def of(call: Call) -> dict[str, Any]:
    """Return the arguments of a call by name; "self" and "x" are called "input"."""
    names = _PARAMETERS.get(call.function, _BINARY if call.function in ARITHMETIC else ("input",))
    if call.function == "split" and "split_size" in call.kwargs:
        names = ("input", "split_size", "dim")
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    for alias in ("self", "x", "tensor"):
        if "input" not in given and alias in given:
            given["input"] = given.pop(alias)
    return given


def pointwise(function: str, given: Mapping[str, Any]) -> tuple[Pointwise, ...] | None:
    """Return the functions of each element that a call computes, or None if its arguments are not supported."""
    if function in _WITHOUT_PARAMETERS:
        return (Pointwise(_WITHOUT_PARAMETERS[function]),)
    function = function.removesuffix("_") if not function.endswith("__") else function
    match function:
        case "relu6":
            return (Pointwise("clamp", 0.0, 6.0),)
        case "hardtanh":
            return (Pointwise("clamp", float(given.get("min_val", -1.0)), float(given.get("max_val", 1.0))),)
        case "clamp" | "clip" | "clamp_min" | "clamp_max":
            bounds = given.get("min"), given.get("max")
            if any(not (one is None or isinstance(one, (int, float))) for one in bounds):
                return None
            low, high = bounds
            return (
                Pointwise("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high)),
            )
        case "leaky_relu":
            return (Pointwise("leaky_relu", float(given.get("negative_slope", 0.01))),)
        case "elu":
            return (
                (Pointwise("elu", float(given.get("alpha", 1.0))),)
                if set(given) <= {"input", "alpha", "inplace"}
                else None
            )
        case "celu":
            alpha = float(given.get("alpha", 1.0))
            return Pointwise("affine", 1 / alpha), Pointwise("elu", 1.0), Pointwise("affine", alpha)
        case "selu":
            return Pointwise("elu", _SELU_ALPHA), Pointwise("affine", _SELU_SCALE)
        case "softplus":
            beta, threshold = float(given.get("beta", 1)), float(given.get("threshold", 20))
            if threshold < _MIN_SOFTPLUS_THRESHOLD or beta <= 0:
                return None
            softplus = (Pointwise("softplus"),)
            return softplus if beta == 1 else (Pointwise("affine", beta), *softplus, Pointwise("affine", 1 / beta))
        case "logsigmoid" | "log_sigmoid":  # -softplus(-x)
            return Pointwise("affine", -1.0), Pointwise("softplus"), Pointwise("affine", -1.0)
        case "softsign":
            return (Pointwise("softsign"),)
        case "threshold" | "_threshold":
            return (Pointwise("threshold", float(given["threshold"]), float(given["value"])),)
        case "gelu":
            kinds = {"none": "gelu", "tanh": "gelu_tanh"}
            kind = kinds.get(given.get("approximate", "none"))
            return (Pointwise(kind),) if kind else None
        case "neg" | "negative":
            return (Pointwise("affine", -1.0),)
        case "pow" | "__pow__":
            powers = {2.0: "square", 3.0: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
            exponent = given.get("exponent", given.get("other"))
            kind = powers.get(float(exponent)) if isinstance(exponent, (int, float)) else None
            return (Pointwise(kind),) if kind else None
    return None


def order_of(call: Call, rank: int) -> list[int] | None:
    """Return the order of axes of ``permute``, ``transpose`` and ``movedim``, or None if it is not known."""
    given = list(call.args[1:]) or [call.kwargs[name] for name in call.kwargs if name != "input"]
    order = list(range(rank))
    if call.function == "permute":
        found = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        return [int(axis) % rank for axis in found]
    if call.function in ("mT", "adjoint"):
        return [*order[:-2], order[-1], order[-2]]
    if call.function in ("transpose", "swapaxes", "swapdims"):
        one, other = (int(axis) % rank for axis in given)
        order[one], order[other] = order[other], order[one]
        return order
    sources, targets = ([each] if isinstance(each, int) else list(each) for each in given)
    sources, targets = ([axis % rank for axis in each] for each in (sources, targets))
    rest = [axis for axis in order if axis not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        rest.insert(target, source)
    return rest


def slices_of(index: Any, rank: int) -> list[slice | int | None] | None:
    """Return what an index does to each axis of a tensor, with None for new axes.

    The result is None if it is no index by slices and numbers.
    """
    given = list(index) if isinstance(index, tuple) else [index]
    if not all(one is None or one is Ellipsis or type(one) is slice or _is_integer(one) for one in given):
        return None
    missing = [slice(None)] * (rank - sum(one is not None and one is not Ellipsis for one in given))
    at = given.index(Ellipsis) if Ellipsis in given else len(given)
    given[at : at + 1] = missing
    return [
        slice(*(None if each is None else int(each) for each in (one.start, one.stop, one.step)))
        if isinstance(one, slice)
        else None
        if one is None
        else int(one)
        for one in given
    ]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
