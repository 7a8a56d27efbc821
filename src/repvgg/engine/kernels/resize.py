"""Upsampling by the nearest pixel or by bilinear interpolation, with tables of source pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from repvgg.engine.codegen.ir_builder import Index, IRBuilder, Value
from repvgg.engine.graph import Floats, Pair, Resize, WrapPad
from repvgg.engine.kernels.base import KERNEL_PARAMETERS, Kernel, row_address
from repvgg.engine.runtime.memory import FeatureMapLayout
from repvgg.errors import UnsupportedError

_ENTRY = 3  # floats of a table for each output row or column: two source indices (i32), and the weight of the second


@final
@dataclass(frozen=True)
class ResizeKernel(Kernel):
    """Interpolation between two source rows and two source columns; ``nearest`` copies the first of each.

    Its ``weights`` are the tables of :func:`resize_tables`, or with ``wraps`` those of :func:`wrap_tables`.
    """

    source: FeatureMapLayout
    target: FeatureMapLayout
    nearest: bool
    width: int
    wraps: bool = False

    def describe(self) -> str:
        if self.wraps:
            return "padding by pixels"
        return "nearest upsampling" if self.nearest else "bilinear upsampling"

    @property
    def units_per_block(self) -> int:
        """Output rows of an image."""
        return self.target.size[0]

    def emit(self, name: str) -> list[IRBuilder]:
        b, source, target = IRBuilder(name, KERNEL_PARAMETERS, self.width), self.source, self.target
        with b.loop("%begin", "%end") as units:
            image, row = b.divmod(units.index, target.size[0])
            read = row_address(b, "%source", source, image, 0)
            out = row_address(b, "%target", target, image, row)
            above, below, down = self._entry(b, row, source.row_stride)
            with b.loop(0, target.size[1]) as columns:
                entry = b.add(columns.index, target.size[0])
                left, right, across = self._entry(b, entry, source.pixel_stride)
                pixel = b.offset(out, b.mul(columns.index, target.pixel_stride))
                with b.loop(0, source.pixel_stride, self.width) as channels:
                    corners = (above, left), (above, right), (below, left), (below, right)
                    values = [
                        b.load(read, b.add(b.add(vertical, horizontal), channels.index))
                        for vertical, horizontal in (corners[:1] if self.nearest else corners)
                    ]
                    b.store(values[0] if self.nearest else _blend(b, values, down, across), pixel, channels.index)
        return [b]

    def _entry(self, b: IRBuilder, number: Index, stride: int) -> tuple[Index, Index, Value]:
        """Return the offsets of both source rows or columns, and the weight of the second."""
        address = b.offset("%weights", b.mul(number, _ENTRY))
        offsets = []
        for at in range(1 if self.nearest else 2):
            index = b.assign(f"load i32, ptr {b.offset(address, at)}, align 4")
            offsets.append(b.mul(b.assign(f"zext i32 {index} to i64"), stride))
        return offsets[0], offsets[-1], "" if self.nearest else b.broadcast(address, 2)


def _blend(b: IRBuilder, values: list[Value], down: Value, across: Value) -> Value:
    rows = [
        b.fma(across, b.binary("fsub", values[at + 1], values[at]), values[at])  # a + t·(b - a)
        for at in (0, 2)
    ]
    return b.fma(down, b.binary("fsub", rows[1], rows[0]), rows[0])


def resize_tables(op: Resize, source: Pair, target: Pair) -> Floats:
    """Return the entries of each output row, then those of each output column.

    Source positions are computed in float32, by the formulas of PyTorch, which decide about ties.
    """
    scales = op.scale or (None, None)
    tables = [
        _axis_table(op, length, count, scale) for length, count, scale in zip(source, target, scales, strict=True)
    ]
    return np.concatenate(tables).view(np.float32).ravel()


def wrap_tables(op: WrapPad, source: Pair, target: Pair) -> Floats:
    """Return the entries of a frame of pixels of the map itself.

    Raises:
        UnsupportedError: the frame is wider than the map allows.
    """
    tables = []
    for before, length, count in zip(op.pixels[::2], source, target, strict=True):
        places = np.arange(count) - before
        widest = {"reflect": length - 1, "circular": length}.get(op.mode, count)
        if max(before, count - length - before) > widest:
            raise UnsupportedError(f"A frame of {op.mode!r} pixels is wider than its map: pass larger images.")
        match op.mode:
            case "reflect":
                places = length - 1 - np.abs(length - 1 - np.abs(places))
            case "replicate":
                places = np.clip(places, 0, length - 1)
            case "circular":
                places = places % length
        first = places.astype(np.uint32)
        tables.append(np.stack([first, first, np.zeros_like(first)], 1))
    return np.concatenate(tables).view(np.float32).ravel()


def _axis_table(op: Resize, length: int, count: int, scale: float | None) -> NDArray[np.uint32]:
    places = np.arange(count, dtype=np.float32)
    if op.kind == "nearest" or not op.align_corners:
        step = np.float32(1 / scale if scale else length / count)
    else:
        step = np.float32((length - 1) / (count - 1) if count > 1 else 0)
    if op.kind == "nearest":
        first = np.minimum(np.floor(places * step), length - 1).astype(np.uint32)
        return np.stack([first, first, np.zeros_like(first)], 1)
    at = places * step if op.align_corners else np.maximum((places + np.float32(0.5)) * step - np.float32(0.5), 0)
    first = np.minimum(np.floor(at), length - 1).astype(np.uint32)
    share = np.clip(at.astype(np.float32) - first.astype(np.float32), 0, 1).astype(np.float32)
    return np.stack([first, np.minimum(first + 1, length - 1).astype(np.uint32), share.view(np.uint32)], 1)
