"""PyTorch modules for maps: the plain convolution of a region, and a transposed convolution that is scaled."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.algebra import ConvMap
from repvgg.collapse.cost import emitted_map
from repvgg.errors import ReparamError, UsageError
from repvgg.symbolic import Layout, first_float

PlainConv: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def to_module(conv: ConvMap, like: Tensor, layout: Layout, *, requires_grad: bool = True) -> PlainConv:
    """Return the module that computes ``conv`` on tensors of a ``layout``: an nn.Linear for rows, else an nn.ConvNd.

    Its dtype, device and memory format are those of the kernel ``like``; the weights are cast once, here.

    Raises:
        ReparamError: a weight is finite in float64 and not in the dtype of ``like``, or there is no module that
            computes ``conv``: a grouped linear map of rows.
        UsageError: ``conv`` does not apply to tensors of that layout.
    """
    if conv.spatial != layout.spatial:
        raise UsageError(f"A map over {conv.spatial} axes does not apply to tensors {layout}.")
    if not conv.spatial and conv.groups > 1:
        raise ReparamError(f"no nn.Linear computes a linear map of rows in {conv.groups} groups")
    conv = emitted_map(conv)
    channels, before, after = (conv.in_channels, conv.out_channels), conv.padding[::2], conv.padding[1::2]
    module: PlainConv
    # The meta device skips the random initialization.
    if conv.spatial:
        padding = before if before == after else "same"
        geometry = (conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)
        kind, mode = _CONVOLUTIONS[conv.spatial], conv.border or "zeros"
        module = kind(*channels, *geometry, padding_mode=mode, device="meta", dtype=like.dtype)
    else:
        module = nn.Linear(*channels, device="meta", dtype=like.dtype)
    # Assigning to the meta module keeps its constructor arguments and costs no second copy.
    module.weight = nn.Parameter(_dense_weight(conv, like), requires_grad)
    module.bias = nn.Parameter(_cast(conv.bias_or_zeros(), like).clone(), requires_grad)
    return module


def _dense_weight(conv: ConvMap, like: Tensor) -> Tensor:
    """The kernel, multiplied out chunk by chunk, so that its float64 form never exists as a whole, and cast once."""
    shape, kept = conv.kernel.shape, torch.contiguous_format
    # A tensor with one channel or one tap is contiguous in both formats; it then counts as contiguous.
    if len(shape) in _CHANNELS_LAST and like.dim() == len(shape) and not like.is_contiguous():
        last = _CHANNELS_LAST[len(shape)]
        kept = last if like.is_contiguous(memory_format=last) else kept
    weight = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=kept)
    for channels, sums in conv.kernel.chunks():
        weight[channels].copy_(sums)
    return _require_finite(weight)


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` in the dtype and on the device of ``like``; raise ReparamError if a number overflows."""
    return _require_finite(value.detach().to(device=like.device, dtype=like.dtype, copy=True))


def _require_finite(cast: Tensor) -> Tensor:
    if not cast.is_meta and cast.numel() and any(bool(torch.isinf(end)) for end in torch.aminmax(cast)):
        raise ReparamError(f"the merged weights do not fit into {str(cast.dtype).removeprefix('torch.')}")
    return cast


def scale_transposed(transposed: _ConvTransposeNd, scaling: ConvMap) -> _ConvTransposeNd:
    """Return ``scaling(transposed(x))`` as one transposed convolution.

    With kernel W (I, O / groups, *K), bias b and ``y ↦ a·y + c`` per channel: the kernel is ``a·W``, where the output
    channels of each group are those of axis 1, and the bias ``a·b + c``. Computed in float64 and cast once.

    Raises:
        ReparamError: a weight does not fit into the dtype.
    """
    weight_IOK, groups = transposed.weight.detach(), transposed.groups
    factor_O = scaling.weight.flatten().to(weight_IOK.device)
    by_group = factor_O.view(groups, 1, -1, *(1,) * (weight_IOK.dim() - 2))  # (g, 1, O/g, 1, …)
    kernel = weight_IOK.double().view(groups, -1, *weight_IOK.shape[1:]) * by_group
    offset_O = scaling.bias_or_zeros().to(weight_IOK.device)
    if transposed.bias is not None:
        offset_O = offset_O + factor_O * transposed.bias.detach().double()
    new = copy.copy(transposed)
    new.__dict__ = {**vars(transposed), "_parameters": {}}  # copy.copy shares the dictionary of parameters
    for name, value in {"weight": kernel.view(weight_IOK.shape), "bias": offset_O}.items():
        own = _cast(value, weight_IOK).clone(memory_format=torch.preserve_format)
        setattr(new, name, nn.Parameter(own, transposed.weight.requires_grad))
    return new


def reference_tensor(module: nn.Module) -> Tensor:
    """The tensor that determines dtype, device and memory format: the largest kernel, else the first float tensor."""
    # The largest: a 1x1 kernel is contiguous in every memory format.
    kernels = [p for p in module.parameters() if p.dim() == 4]
    like = max(kernels, key=Tensor.numel) if kernels else first_float(module)
    if like is None:
        raise ReparamError("a module without any floating-point tensor cannot become a convolution")
    return like
