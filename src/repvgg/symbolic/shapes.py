"""Handlers for what moves numbers around: concatenation, padding, and other shapes of the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from repvgg import algebra
from repvgg.errors import BorderError, NotLinearError
from repvgg.symbolic.layout import VECTORS, Layout
from repvgg.symbolic.operands import same_source
from repvgg.symbolic.tensor import RANK_UNKNOWN, SymbolicTensor, handles

_T = torch.Tensor


@handles(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0) -> SymbolicTensor:
    """Concatenation along the channels of functions of one source."""
    parts = [part for part in tensors if isinstance(part, SymbolicTensor)]
    if len(parts) < len(tensors) or not parts[0].layout.is_channel_axis(dim):
        raise NotLinearError("a concatenation along pixels or images, or with constants, is not a convolution")
    return same_source(parts).like(algebra.concatenate([part.map for part in parts]), "cat")


@handles(F.pad, torch.constant_pad_nd)
def pad(
    input: SymbolicTensor,  # noqa: A002 - torch's own name
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> SymbolicTensor:
    """Padding or cropping of the spatial axes, given from the last one on."""
    spatial = input.layout.spatial
    sides = [int(side) for side in pad] + [0] * (2 * spatial - len(pad))
    if any(sides[2 * spatial :]):
        raise NotLinearError("a padding of channels or images is not a convolution")
    if mode == "constant" and value not in (None, 0):
        raise BorderError(f"the image is padded with {value}, and a convolution pads with 0")
    if mode != "constant" and min(sides, default=0) < 0 < max(sides):
        raise BorderError(f"a {mode} padding that crops as well is not a convolution")
    border: Any = "zeros" if mode == "constant" else mode
    axes = [algebra.Axis(before=sides[2 * i], after=sides[2 * i + 1]) for i in range(spatial)]
    return input.like(algebra.resample(input.map, tuple(reversed(axes)), border), "pad")


@handles(_T.contiguous, _T.clone, torch.clone)
def unchanged(input: SymbolicTensor, *_: Any, memory_format: Any = None) -> SymbolicTensor:  # noqa: A002
    """Functions that change the layout in memory and no value; the outcome may be the same tensor, or another one."""
    return _view(input, input.layout)


@handles(torch.flatten, _T.flatten)
def flatten(input: SymbolicTensor, start_dim: int = 0, end_dim: int = -1) -> SymbolicTensor:  # noqa: A002
    """Rows (N, L, C) as vectors (N·L, C): the same numbers in the same order."""
    if input.layout.rows and input.layout.rank is None:
        raise NotLinearError(RANK_UNKNOWN)
    if input.layout != Layout(3, rows=True) or start_dim not in (0, -3) or end_dim not in (1, -2):
        raise NotLinearError("flatten is linear in this algebra only as flatten(0, 1) of rows (N, L, C)")
    return _view(input, VECTORS)


@handles(_T.reshape_as, _T.view_as)
def reshape_as(input: Any, other: Any) -> SymbolicTensor:  # noqa: A002
    """Rows in the shape of other rows of the same source: as many, in the same order, for maps of rows keep both."""
    if not isinstance(input, SymbolicTensor) or not isinstance(other, SymbolicTensor):
        raise NotLinearError("a reshape between a constant and the image is not a convolution")
    rows = input.source is other.source and input.layout.rows and other.layout.rows
    if not rows or input.map.out_channels != other.map.out_channels:
        raise NotLinearError("a reshape is linear in this algebra only between rows of one source and one width")
    return _view(input, other.layout)


def _view(symbol: SymbolicTensor, layout: Layout) -> SymbolicTensor:
    """The same numbers, perhaps in the same memory: from here on neither may be changed in place."""
    symbol.is_view = True
    return symbol.like(symbol.map, "identity", is_view=True, layout=layout)
