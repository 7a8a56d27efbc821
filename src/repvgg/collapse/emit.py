"""From the algebra back to a module: one ordinary ``nn.Conv2d``, or its like for sequences, volumes and rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repvgg.algebra import ConvMap, with_symmetric_padding
from repvgg.errors import ReparamError, UsageError
from repvgg.symbolic import Layout

Plain: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def emitted_map(conv: ConvMap) -> ConvMap:
    """The map as ``nn.Conv2d`` can hold it: with symmetric padding, unless ``padding="same"`` says it as it is."""
    return conv if _same_padding(conv) else with_symmetric_padding(conv)


def to_module(conv: ConvMap, like: Tensor, layout: Layout, *, requires_grad: bool = True) -> Plain:
    """The module that computes ``conv``, in dtype, device and memory format of the kernel ``like``.

    It is an ``nn.Linear`` for rows and vectors, else an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``. The weights are
    cast once, here. The random number generator is not touched.

    Args:
        conv: what to compute.
        like: a tensor that tells dtype, device and memory format.
        layout: the shape of the input.
        requires_grad: of the parameters.

    Raises:
        ReparamError: a weight is finite in float64 and not in the dtype of ``like``, or there is no module that
            computes ``conv``: a linear map of rows in groups.
        UsageError: ``conv`` is no map of tensors of that layout.
    """
    if conv.spatial != layout.spatial:
        raise UsageError(f"A map over {conv.spatial} axes is none of tensors {layout}.")
    conv = emitted_map(conv)
    module = _convolution(conv, like) if conv.spatial else _linear(conv, like)
    module.weight = nn.Parameter(_written_out(conv, like), requires_grad)
    module.bias = nn.Parameter(cast(conv.bias_or_zeros(), like).clone(), requires_grad)
    return module


def _convolution(conv: ConvMap, like: Tensor) -> Plain:
    before, after = conv.padding[::2], conv.padding[1::2]
    module: Plain = _CONVOLUTIONS[conv.spatial](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        before if before == after else "same",
        conv.dilation,
        conv.groups,
        bias=True,
        padding_mode=conv.border or "zeros",
        device="meta",
        dtype=like.dtype,
    )
    return module


def _linear(conv: ConvMap, like: Tensor) -> nn.Linear:
    if conv.groups > 1:
        raise ReparamError(f"a linear map of rows in {conv.groups} groups is no nn.Linear")
    return nn.Linear(conv.in_channels, conv.out_channels, bias=True, device="meta", dtype=like.dtype)


def _same_padding(conv: ConvMap) -> bool:
    """Whether the padding is what ``padding="same"`` gives: the larger half of an odd total behind."""
    return max(conv.stride, default=1) == 1 and all(
        (axis.before, axis.after) == (axis.reach // 2, axis.reach - axis.reach // 2) for axis in conv.axes
    )


def _memory_format(like: Tensor, dim: int) -> torch.memory_format:
    """That of ``like``, for a tensor of ``dim`` axes."""
    last = _CHANNELS_LAST.get(dim)
    if last is None or like.dim() != dim or like.is_contiguous() or not like.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _written_out(conv: ConvMap, like: Tensor) -> Tensor:
    """The kernel, multiplied out piece by piece and cast once."""
    shape = conv.kernel.shape
    order = _memory_format(like, len(shape))
    weight = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)
    for rows, sums in conv.kernel.chunks():
        weight[rows].copy_(sums)
    return _fits(weight)


def cast(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``like``."""
    return _fits(value.detach().to(device=like.device, dtype=like.dtype, copy=True))


def _fits(cast: Tensor) -> Tensor:
    """``cast`` itself, if no number became infinite in its dtype."""
    if not cast.is_meta and cast.numel() and any(bool(torch.isinf(end)) for end in torch.aminmax(cast)):
        raise ReparamError(f"the merged weights do not fit into {str(cast.dtype).removeprefix('torch.')}")
    return cast


def describe(conv: ConvMap) -> str:
    """A map in words, such as ``3x3 conv 48→96, stride 2`` or ``linear 64→128``."""
    parts = [f"{_kind(conv)} {conv.in_channels}→{conv.out_channels}"]
    parts += [f"stride {_joined(conv.stride)}"] if any(step > 1 for step in conv.stride) else []
    parts += [f"dilation {_joined(conv.dilation)}"] if any(step > 1 for step in conv.dilation) else []
    parts += [f"{conv.groups} groups"] if conv.groups > 1 else []
    parts += [f"{conv.border} padding"] if conv.border not in (None, "zeros") else []
    return ", ".join(parts)


def _kind(conv: ConvMap) -> str:
    if conv.spatial < 2:
        return f"{conv.kernel_size[0]}-tap conv" if conv.spatial else "linear"
    return "x".join(map(str, conv.kernel_size)) + " conv"


def _joined(numbers: tuple[int, ...]) -> str:
    """One number for all axes, if it is the same."""
    return str(numbers[0]) if len(set(numbers)) == 1 else "x".join(map(str, numbers))
