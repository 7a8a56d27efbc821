"""Handlers for slices: of channels, every n-th pixel, or all pixels but a border."""

from __future__ import annotations

import operator
from typing import Any

import torch

from repvgg import algebra
from repvgg.algebra import Axis
from repvgg.errors import NotLinearError
from repvgg.symbolic.tensor import Layout, SymbolicTensor, handles

_T = torch.Tensor
_ALL = slice(None)


@handles(operator.getitem, _T.__getitem__)
def getitem(input: SymbolicTensor, index: Any) -> SymbolicTensor:  # noqa: A002 - torch's own name
    """``x[:, channels, rows, columns]``, or ``x[..., channels]`` of rows, with slices; the result is a view."""
    channels, pixels = _slices(index, input.layout)
    conv = algebra.select_channels(input.map, channels)
    if any(part != _ALL for part in pixels):
        conv = algebra.resample(conv, tuple(map(_pixels, pixels)))
    input.is_view = True  # the two share memory: neither may be modified in place from here on
    return input.like(conv, "slice", is_view=True)


def keeps_channels(index: Any, layout: Layout) -> bool:
    """Whether an index takes all channels."""
    return _slices(index, layout)[0] == _ALL


def _slices(index: Any, layout: Layout) -> tuple[slice, list[slice]]:
    """Return the slice of the channels, and those of the spatial axes."""
    entries = list(index) if isinstance(index, tuple) else [index]
    rank = layout.rank
    if rank is None:  # an Ellipsis may be empty; without one, at least the channels must follow
        rank = len(entries) if Ellipsis in entries else len(entries) + 1
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [_ALL] * (rank + 1 - len(entries))
    entries += [_ALL] * (rank - len(entries))
    place = rank + layout.axis
    if (
        len(entries) != rank
        or not all(isinstance(entry, slice) for entry in entries)
        or entries[:place] != [_ALL] * place
    ):
        raise NotLinearError("an index other than slices of channels, rows and columns is not a convolution")
    return entries[place], entries[place + 1 :]


def _pixels(part: slice) -> Axis:
    """Return ``start : -stop : step`` along a spatial axis of unknown size as a padding and a stride."""
    start, stop, step = part.start or 0, part.stop, part.step or 1
    # A start from the front and a stop from the end are the only bounds that hold for every size.
    if start < 0 or step < 1 or (stop is not None and stop >= 0):
        raise NotLinearError("which pixels this slice keeps depends on the size of the image")
    return Axis(stride=step, before=-start, after=stop or 0)


@handles(torch.narrow, _T.narrow)
def narrow(input: SymbolicTensor, dim: int, start: int, length: int) -> SymbolicTensor:  # noqa: A002
    """``length`` channels from ``start`` on."""
    if not input.layout.is_channel_axis(dim):
        raise NotLinearError("a part of an image of unknown size is not a convolution")
    start += input.map.out_channels if start < 0 else 0
    channels = slice(start, start + length)
    return getitem(input, (..., channels) if input.layout.rows else (_ALL, channels))


@handles(torch.chunk, _T.chunk)
def chunk(input: SymbolicTensor, chunks: int, dim: int = 0) -> tuple[SymbolicTensor, ...]:  # noqa: A002
    """Split the channels into ``chunks`` parts."""
    return split(input, -(-input.map.out_channels // chunks), dim)


@handles(torch.split, _T.split)
def split(input: SymbolicTensor, split_size_or_sections: Any, dim: int = 0) -> tuple[SymbolicTensor, ...]:  # noqa: A002
    """Split the channels into parts of one size, or of given sizes."""
    total, sizes = input.map.out_channels, split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(input, dim, start, size) for start, size in zip(starts, sizes, strict=True))
