"""Parts of tensors as algebra: padding, slices and splits, and item assignments."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from repvgg import algebra
from repvgg.algebra import Axis
from repvgg.errors import BorderError, NotLinearError
from repvgg.symbolic.border import PaddedBorder
from repvgg.symbolic.handlers import constant, per_channel, same_source
from repvgg.symbolic.layout import CHANNELS
from repvgg.symbolic.tensor import ITEM_ASSIGNMENTS, SymbolicTensor, handles

_T = torch.Tensor
_ALL = slice(None)


@handles(F.pad, torch.constant_pad_nd)
def pad(
    input: SymbolicTensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> SymbolicTensor:
    """Pad or crop the spatial axes; ``pad`` starts with the last one."""
    spatial = input.layout.spatial
    sides = [int(side) for side in pad] + [0] * (2 * spatial - len(pad))
    if any(sides[2 * spatial :]):
        raise NotLinearError("a padding of channels or images is not a convolution")
    # The order of padding and cropping matters for a reflection.
    if mode != "constant" and min(sides, default=0) < 0 < max(sides):
        raise BorderError(f"a {mode} padding that crops as well is not a convolution")
    border: Any = "zeros" if mode == "constant" else mode
    # A padding is a convolution with a 1x1 identity kernel, so composition checks that it is exact.
    axes = tuple([Axis(before=sides[2 * i], after=sides[2 * i + 1]) for i in reversed(range(spatial))])
    _require_axes_of_source(input, axes)
    if mode != "constant" or min(sides, default=0) < 0:
        if value:
            raise BorderError(f"the image is padded with {value}, and a convolution pads with 0")
        return input.like(algebra.resample(input.map, axes, border), "pad")
    # What is in the border may still change by item assignments: whatever reads the tensor next requires the bias.
    padded = input.like(algebra.pad_with_bias(input.map, axes), "pad")
    padded.border = PaddedBorder(input.map, axes, float(value or 0), input.source.dtype) if any(sides) else None
    return padded


def _require_axes_of_source(symbol: SymbolicTensor, axes: tuple[Axis, ...]) -> None:
    if any(axis != Axis() for axis in axes) and not symbol.has_axes_of_source:
        raise NotLinearError("its axes were rearranged, and a part of them, or a padding, is not one of its input")


@handles(operator.getitem, _T.__getitem__)
def getitem(input: SymbolicTensor, index: Any) -> SymbolicTensor:
    """``x[:, channels, rows, columns]``, or ``x[..., channels]`` of rows, with slices; the result is a view."""
    channels, pixels = _slices(index, input)
    conv, axes = algebra.select_channels(input.map, channels), tuple(map(_pixels, pixels))
    _require_axes_of_source(input, axes)
    if any(axis != Axis() for axis in axes):
        conv = algebra.resample(conv, axes)
    return input.like(conv, "slice", view=True)


def keeps_channels(index: Any, symbol: SymbolicTensor) -> bool:
    """Whether an index takes all channels."""
    return _slices(index, symbol)[0] == _ALL


def _entries(index: Any, symbol: SymbolicTensor) -> tuple[list[Any], int]:
    """Return an entry of ``index`` for each axis, and the place of the channels among them."""
    entries = list(index) if isinstance(index, tuple) else [index]
    ellipsis = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    axes = symbol.arrangement.axes
    # Of an unknown rank, an Ellipsis may be empty; without one, at least the channels must follow.
    rank = len(axes) if axes is not None else len(entries) if ellipsis else len(entries) + 1
    if ellipsis:
        entries[ellipsis[0] : ellipsis[0] + 1] = [_ALL] * (rank + 1 - len(entries))
    entries += [_ALL] * (rank - len(entries))
    if len(entries) != rank or not all(isinstance(entry, (slice, int)) for entry in entries):
        raise NotLinearError("an index other than slices of channels, rows and columns is not a convolution")
    return entries, rank - 1 if axes is None else axes.index(CHANNELS)


def _slices(index: Any, symbol: SymbolicTensor) -> tuple[slice, list[slice]]:
    """Return the slice of the channels, and those of the spatial axes."""
    entries, place = _entries(index, symbol)
    if not all(isinstance(entry, slice) for entry in entries) or entries[:place] != [_ALL] * place:
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
def narrow(input: SymbolicTensor, dim: int, start: int, length: int) -> SymbolicTensor:
    """``length`` channels from ``start`` on."""
    if not input.layout.is_channel_axis(dim):
        raise NotLinearError("a part of an image of unknown size is not a convolution")
    start += input.map.out_channels if start < 0 else 0
    channels = slice(start, start + length)
    return getitem(input, (..., channels) if input.layout.rows else (_ALL, channels))


@handles(torch.chunk, _T.chunk)
def chunk(input: SymbolicTensor, chunks: int, dim: int = 0) -> tuple[SymbolicTensor, ...]:
    """Split the channels into ``chunks`` parts."""
    return split(input, -(-input.map.out_channels // chunks), dim)


@handles(torch.split, _T.split)
def split(input: SymbolicTensor, split_size_or_sections: Any, dim: int = 0) -> tuple[SymbolicTensor, ...]:
    """Split the channels into parts of one size, or of given sizes."""
    total, sizes = input.map.out_channels, split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(narrow(input, dim, start, size) for start, size in zip(starts, sizes, strict=True))


@handles(*ITEM_ASSIGNMENTS)
def setitem(target: Any, index: Any, value: Any) -> SymbolicTensor:
    """Assign to the border of a tensor that was just padded, or to channels; return the target.

    Channels may become another function of the source, or a number per channel.
    """
    if not isinstance(target, SymbolicTensor):
        raise NotLinearError("a constant is modified in place")
    if (overwritten := target.why_overwritten()) is not None:
        raise overwritten
    entries, place = _entries(index, target)
    if target.border is not None and any(entry != _ALL for entry in entries[place + 1 :]):
        border = target.border.copy()
        border.assign(tuple(entries), constant(value, target))
        target.write(target.map, border)
        target.source.record("assign", target.map)
        return target
    channels, pixels = _slices(index, target)
    if any(entry != _ALL for entry in pixels):
        raise NotLinearError("an item assignment to a part of the pixels is not a convolution")
    if (error := target.why_unreadable()) is not None:
        raise error
    if isinstance(value, SymbolicTensor):
        same_source((target, value))
        part = value.map
    else:
        part = algebra.select_channels(target.map, channels)
        part = algebra.constant(part, per_channel(value, target, part.out_channels))
    target.write(algebra.replace_channels(target.map, channels, part))
    target.source.record("assign", target.map)
    return target


@handles(torch.zeros_like)
def zeros_like(input: SymbolicTensor, **_: Any) -> SymbolicTensor:
    """Zeros of the same shape, to which channels may be assigned."""
    return input.like(algebra.constant(input.map, per_channel(0, input)), "identity")
