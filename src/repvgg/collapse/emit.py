"""From the algebra back to a module: one ordinary ``nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repvgg.algebra import ConvMap, with_symmetric_padding
from repvgg.errors import ReparamError


def emitted_map(conv: ConvMap) -> ConvMap:
    """The map as ``nn.Conv2d`` can hold it: with symmetric padding, unless ``padding="same"`` says it as it is."""
    return conv if _same_padding(conv) else with_symmetric_padding(conv)


def to_conv2d(conv: ConvMap, like: Tensor, *, requires_grad: bool = True) -> nn.Conv2d:
    """An ``nn.Conv2d`` that computes ``conv``, in dtype, device and memory format of the kernel ``like``.

    The weights are cast once, here. The random number generator is not touched.

    Raises:
        ReparamError: a weight is finite in float64 and not in the dtype of ``like``.
    """
    conv = emitted_map(conv)
    padding: Any = (conv.padding[0], conv.padding[2])
    module = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding if conv.padding[::2] == conv.padding[1::2] else "same",
        conv.dilation,
        conv.groups,
        bias=True,
        padding_mode=conv.border or "zeros",
        device="meta",
        dtype=like.dtype,
    )
    module.weight = nn.Parameter(_written_out(conv, like), requires_grad)
    module.bias = nn.Parameter(_cast(conv.bias_or_zeros(), like).clone(), requires_grad)
    return module


def _same_padding(conv: ConvMap) -> bool:
    """Whether the padding is what ``padding="same"`` gives: the larger half of an odd total behind."""
    return conv.stride == (1, 1) and all(
        (axis.before, axis.after) == (axis.reach // 2, axis.reach - axis.reach // 2) for axis in conv.axes
    )


def _memory_format(like: Tensor) -> torch.memory_format:
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not like.is_contiguous() else torch.contiguous_format


def _written_out(conv: ConvMap, like: Tensor) -> Tensor:
    """The kernel, multiplied out piece by piece and cast once."""
    weight = torch.empty(conv.kernel.shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like))
    for rows, sums in conv.kernel.chunks():
        weight[rows].copy_(sums)
    return _fits(weight)


def _cast(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``like``."""
    return _fits(value.detach().to(device=like.device, dtype=like.dtype, copy=True))


def _fits(cast: Tensor) -> Tensor:
    """``cast`` itself, if no number became infinite in its dtype."""
    if not cast.is_meta and cast.numel() and any(bool(torch.isinf(end)) for end in torch.aminmax(cast)):
        raise ReparamError(f"the merged weights do not fit into {str(cast.dtype).removeprefix('torch.')}")
    return cast


def describe(conv: ConvMap) -> str:
    """A convolution in words, such as ``3x3 conv 48→96, stride 2``."""
    (height, width), (sy, sx), (dy, dx) = conv.kernel_size, conv.stride, conv.dilation
    parts = [f"{height}x{width} conv {conv.in_channels}→{conv.out_channels}"]
    parts += [f"stride {sy}" if sy == sx else f"stride {sy}x{sx}"] if (sy, sx) != (1, 1) else []
    parts += [f"dilation {dy}" if dy == dx else f"dilation {dy}x{dx}"] if (dy, dx) != (1, 1) else []
    parts += [f"{conv.groups} groups"] if conv.groups > 1 else []
    parts += [f"{conv.border} padding"] if conv.border not in (None, "zeros") else []
    return ", ".join(parts)
