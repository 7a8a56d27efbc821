"""Handlers for slices: of channels, and of every n-th pixel or all but a border."""

from __future__ import annotations

import operator
from typing import Any

import torch

from repvgg import algebra
from repvgg.algebra import Axis
from repvgg.errors import NotLinearError
from repvgg.symbolic.tensor import SymbolicTensor, handles

_T = torch.Tensor
_ALL = slice(None)


@handles(operator.getitem, _T.__getitem__)
def getitem(input: SymbolicTensor, index: Any) -> SymbolicTensor:  # noqa: A002 - torch's own name
    """``x[:, channels, rows, columns]`` with slices; the outcome is a view."""
    _, channels, rows, columns = _slices(index)
    conv = algebra.select_channels(input.map, channels)
    if (rows, columns) != (_ALL, _ALL):
        conv = algebra.resample(conv, (_pixels(rows), _pixels(columns)))
    input.is_view = True  # from here on the two share memory: neither may be changed in place
    return input.like(conv, "slice", is_view=True)


def keeps_channels(index: Any) -> bool:
    """Whether an index takes all channels."""
    return _slices(index)[1] == _ALL


def _slices(index: Any) -> tuple[slice, slice, slice, slice]:
    entries = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = [_ALL] * (5 - len(entries))
    entries += [_ALL] * (4 - len(entries))
    if len(entries) != 4 or not all(isinstance(entry, slice) for entry in entries) or entries[0] != _ALL:
        raise NotLinearError("an index other than slices of channels, rows and columns is not a convolution")
    return entries[0], entries[1], entries[2], entries[3]


def _pixels(part: slice) -> Axis:
    """Rows or columns ``start : -stop : step`` of an image of unknown size."""
    start, stop, step = part.start or 0, part.stop, part.step or 1
    if start < 0 or step < 1 or (stop is not None and stop >= 0):
        raise NotLinearError("which pixels this slice keeps depends on the size of the image")
    return Axis(stride=step, before=-start, after=stop or 0)


@handles(torch.narrow, _T.narrow)
def narrow(input: SymbolicTensor, dim: int, start: int, length: int) -> SymbolicTensor:  # noqa: A002
    """``length`` channels from ``start`` on."""
    if dim not in (1, -3):
        raise NotLinearError("a part of an image of unknown size is not a convolution")
    return getitem(input, (_ALL, slice(start, start + length)))


@handles(torch.chunk, _T.chunk)
def chunk(input: SymbolicTensor, chunks: int, dim: int = 0) -> tuple[SymbolicTensor, ...]:  # noqa: A002
    """The channels in ``chunks`` parts."""
    return split(input, -(-input.map.out_channels // chunks), dim)


@handles(torch.split, _T.split)
def split(input: SymbolicTensor, split_size_or_sections: Any, dim: int = 0) -> tuple[SymbolicTensor, ...]:  # noqa: A002
    """The channels in parts of a given size, or of given sizes."""
    total, sizes = input.map.out_channels, split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(input, dim, start, size) for start, size in zip(starts, sizes, strict=True))
