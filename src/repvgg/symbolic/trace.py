"""The symbolic forward: run a module on a symbolic input to obtain the one convolution that it is equal to."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from repvgg._arguments import check_model
from repvgg._html import table as html_table
from repvgg.algebra import ConvMap
from repvgg.errors import NotLinearError, TrainingModeError
from repvgg.symbolic.layout import Layout
from repvgg.symbolic.probe import channels_of, guarded
from repvgg.symbolic.shadow import fingerprint, shadow_of
from repvgg.symbolic.tensor import Source, SymbolicTensor


class EquivalentConv(NamedTuple):
    """Kernel (O, I / groups, *K) and bias (O,) of the convolution or linear layer that equals a module."""

    weight: Tensor
    bias: Tensor

    def __repr__(self) -> str:
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"EquivalentConv(weight {tuple(self.weight.shape)}, bias {tuple(self.bias.shape)}, {dtype})"

    def _repr_html_(self) -> str:
        rows = [
            (name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."), str(tensor.device))
            for name, tensor in zip(self._fields, self, strict=True)
        ]
        return html_table("Convolution or linear layer that equals the module", ("", "shape", "dtype", "device"), rows)


def algebra_device(tensor: Tensor | None) -> torch.device:
    """Return the device for the float64 algebra on ``tensor``: its own, or the CPU if that has no float64."""
    # Metal has no float64.
    if tensor is None or tensor.device.type == "mps":
        return torch.device("cpu")
    return tensor.device


def first_float(module: nn.Module) -> Tensor | None:
    """Return the first floating-point parameter or buffer, whose dtype and device count as those of the module."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def check_eval_mode(module: nn.Module, name: str = "") -> None:
    """Raise TrainingModeError, which names it, if a norm or a dropout in ``module`` is in training mode."""
    for inner, part in module.named_modules():
        # Only modules that behave differently in training mode: the flag of all others is harmless.
        differs = isinstance(part, (_BatchNorm, _DropoutNd)) or (
            isinstance(part, _InstanceNorm) and part.track_running_stats
        )
        if differs and getattr(part, "training", False):
            path = ".".join(filter(None, (name, inner))) or type(part).__name__
            raise TrainingModeError(f"{path!r} ({type(part).__name__}) is in training mode: call .eval() on the model.")


def unchanged_by_call(shadow: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a shadow; raise NotLinearError if it modifies its own state, and so is more than a function of its input."""
    before = fingerprint(shadow)
    result = guarded(shadow, *args, **kwargs)
    if fingerprint(shadow) != before:
        raise NotLinearError("it stores or modifies something in its attributes when it is called")
    return result


def trace(
    module: nn.Module,
    in_channels: int | None = None,
    layout: Layout | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> ConvMap:
    """Return the one convolution that ``module`` is equal to in eval mode, derived from its own ``forward``.

    Differentiable: gradients of the result reach the parameters of ``module``.

    Args:
        module: any module on one tensor: images, sequences, volumes, vectors or rows.
        in_channels: C; default: inferred from a convolution, linear layer or batch norm.
        layout: the axes of the tensor; default: inferred from a convolution, linear layer, pool or ``nn.BatchNorm2d``.
            If there is none and ``in_channels`` is given, that of images.
        dtype: that of the algebra.

    Raises:
        TrainingModeError: a batch norm or dropout in it is in training mode.
        MissingStatisticsError: a batch norm in it has no running statistics.
        NotLinearError: it is not a linear, shift-invariant map.
        BorderError: it is one in the interior of the image, but no convolution equals it at the border.
    """
    check_model(module, "trace")
    check_eval_mode(module)
    device = algebra_device(first_float(module))
    # Kernels are not converted here; the algebra converts them once they are multiplied out.
    shadow = shadow_of(
        module, lambda x: x.to(device=device, dtype=dtype), keep_kernels=True, training=False, compute_weights=True
    )
    # Even if one of them is given, the other must be inferred in agreement with it.
    if in_channels is None or layout is None:
        in_channels, layout = channels_of(shadow, channels=in_channels, layout=layout)
    result = guarded(shadow, SymbolicTensor.of(Source(), in_channels, dtype, device, layout))
    if not isinstance(result, SymbolicTensor):
        raise NotLinearError(f"the output is a {type(result).__name__}, not one tensor")
    if (error := result.why_unreadable()) is not None:
        raise error
    if not result.has_axes_of_source:
        raise NotLinearError("the axes of its output are not those of its input")
    return result.map


def equivalent_conv(module: nn.Module, in_channels: int | None = None, layout: Layout | None = None) -> EquivalentConv:
    """Return kernel and bias of the convolution or linear layer that equals ``module``.

    Computed in float64 and cast once to the dtype and device of the module; gradients reach its parameters. For
    regularizers on the equivalent kernel and for quantization-aware training. For arguments and errors see
    :func:`trace`, which returns stride, padding and the rest as well.
    """
    check_model(module, "equivalent_conv")
    conv = trace(module, in_channels, layout)
    like = first_float(module)
    weight, bias = conv.weight, conv.bias_or_zeros()
    return EquivalentConv(weight, bias) if like is None else EquivalentConv(weight.to(like), bias.to(like))
