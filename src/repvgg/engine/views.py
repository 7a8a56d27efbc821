"""Views: which elements of a value of the graph a PyTorch tensor holds, and in which order.

A value is a feature map (C, H, W) of each image. Permutations, reshapes, slices and broadcasts only change the order in
which it is read, so they cost nothing until an operation needs another order in memory. An axis of a tensor is a list
of factors, nested loops over axes of the value, the outermost first: ``x.flatten(2)`` has the axes ``[C], [H, W]``, and
a channel shuffle ``view(N, g, C/g, H, W).transpose(1, 2).flatten(1, 2)`` has ``[C/g of stride 1, g of stride C/g]`` as
its channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

from repvgg.engine.graph import C, Factor, FeatureShape, H, Rearrangement, W

Axis: TypeAlias = tuple[Factor, ...]
BROADCAST = -1  # the axis of a factor that repeats the same element


@final
@dataclass(frozen=True)
class View:
    """Elements of a value; ``axes`` are those of a tensor without that of the images. Factors have their true extents.

    The axis of the images is the first one of most tensors. ``batch_axis`` axes are before it, as in
    ``qkv.permute(2, 0, 3, 1, 4)``; and the ``folded`` axes after it are one with it, as in ``x.flatten(0, 1)``.
    """

    value: int
    source: FeatureShape  # of the value
    axes: tuple[Axis, ...]
    offset: tuple[int, int, int] = (0, 0, 0)
    batch_axis: int = 0
    folded: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the first axis of the tensor is that of the images, and only that."""
        return (self.batch_axis, self.folded) == (0, 0)

    def plain(self) -> View:
        """Return the same elements with the axis of the images in front and alone."""
        return replace(self, batch_axis=0, folded=0)

    def tensor_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of the tensor for a number of images."""
        first, last = self.batch_axis, self.batch_axis + self.folded
        return (*self.shape[:first], batch * math.prod(self.shape[first:last]), *self.shape[last:])

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of ``axes``."""
        return tuple(math.prod(factor.extent for factor in axis) for axis in self.axes)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor has each element of the value once."""
        factors = [factor for axis in self.axes for factor in axis]
        counts = [math.prod(each.extent for each in factors if each.axis == axis) for axis in (C, H, W)]
        broadcast = any(factor.axis == BROADCAST for factor in factors)
        return not broadcast and self.offset == (0, 0, 0) and tuple(counts) == self.source.axes

    def whole_axes(self) -> tuple[tuple[int, ...], ...] | None:
        """Return the axes of the value that each axis of the tensor is a product of, or None if it is anything else."""
        if not self.is_whole:
            return None
        found = tuple(tuple(factor.axis for factor in axis) for axis in self.axes)
        mentioned = [axis for axes in found for axis in axes]
        return found if len(set(mentioned)) == len(mentioned) else None

    # Changes of the order

    def permute(self, order: Sequence[int]) -> View:
        return replace(self, axes=tuple(self.axes[axis] for axis in order))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """Return the view of another shape with the same number of elements; None if factors do not divide."""
        waiting = [factor for axis in self.axes for factor in axis][::-1]
        axes = []
        for length in shape:
            axis: list[Factor] = []
            while length > 1:
                if not waiting:
                    return None
                factor = waiting.pop()
                if length % factor.extent == 0:
                    axis.append(factor)
                    length //= factor.extent
                elif factor.extent % length == 0:
                    inner = factor.extent // length
                    axis.append(Factor(factor.axis, length, factor.stride * inner))
                    waiting.append(Factor(factor.axis, inner, factor.stride))
                    length = 1
                else:
                    return None
            axes.append(_merged(axis))
        return replace(self, axes=tuple(axes)) if not waiting else None

    def slice(self, axis: int, start: int, length: int, step: int) -> View | None:
        """Return every ``step``-th of the elements from ``start`` on along an axis; None if it has several factors."""
        factors = self.axes[axis]
        if length == math.prod(factor.extent for factor in factors) and step == 1:
            return self
        if len(factors) > 1:
            return self._slice_outermost(axis, start, length, step)
        if not factors or factors[0].axis == BROADCAST:  # a single element, or the same one repeated
            return replace(self, axes=_replaced(self.axes, axis, _merged([Factor(BROADCAST, length, 0)])))
        (factor,) = factors
        offset = list(self.offset)
        offset[factor.axis] += start * factor.stride
        axes = _replaced(self.axes, axis, _merged([Factor(factor.axis, length, factor.stride * step)]))
        return replace(self, axes=axes, offset=(offset[0], offset[1], offset[2]))

    def _slice_outermost(self, axis: int, start: int, length: int, step: int) -> View | None:
        first, *rest = self.axes[axis]
        inner = math.prod(factor.extent for factor in rest)
        if step != 1 or start % inner or length % inner or first.axis == BROADCAST:
            return None
        offset = list(self.offset)
        offset[first.axis] += start // inner * first.stride
        shorter = [Factor(first.axis, length // inner, first.stride), *rest]
        return replace(
            self, axes=_replaced(self.axes, axis, _merged(shorter)), offset=(offset[0], offset[1], offset[2])
        )

    def expand(self, shape: Sequence[int]) -> View:
        """Return the view broadcast to a shape, which may have more axes."""
        missing = len(shape) - len(self.axes)
        axes = [(), *[()] * (missing - 1), *self.axes] if missing else list(self.axes)
        return replace(
            self,
            axes=tuple(
                _merged([Factor(BROADCAST, length, 0)]) if not axis and length > 1 else axis
                for axis, length in zip(axes, shape, strict=True)
            ),
        )

    # In memory

    def rearrangement(self, grouping: Sequence[Sequence[int]]) -> Rearrangement:
        """Return the copy whose C, H and W are these axes of the tensor."""
        channels, height, width = (
            tuple(map(self._size_free, _merged([factor for axis in group for factor in self.axes[axis]])))
            for group in grouping
        )
        return Rearrangement((channels, height, width), self.offset)

    def _size_free(self, factor: Factor) -> Factor:
        """Write a whole axis as such, so that the graph holds for images of all sizes."""
        if factor.axis == BROADCAST:
            return Factor(C, factor.extent, 0)
        whole = factor == Factor(factor.axis, self.source.axes[factor.axis], 1) and self.offset[factor.axis] == 0
        return factor._replace(extent=0) if whole else factor


def view_of(value: int, source: FeatureShape, axes: Sequence[Sequence[int]] = ((C,), (H,), (W,))) -> View:
    """Return the tensor each of whose axes is a product of axes of a value; axes of size 1 have no factor."""
    factors = (tuple(Factor(axis, source.axes[axis], 1) for axis in group if source.axes[axis] > 1) for group in axes)
    return View(value, source, tuple(factors))


def grouping_of(rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return which axes of a tensor of ``rank`` axes after the batch are the C, H and W of its copy in memory.

    Maps are (C, H, W). Of others, the last axis is that of the channels.
    """
    if rank == 3:
        return (0,), (1,), (2,)
    every = tuple(range(rank))
    return every[-1:], every[:-2], every[-2:-1]


def _merged(factors: Sequence[Factor]) -> Axis:
    """Join factors that run through an axis one after the other, and drop those of one element."""
    merged: list[Factor] = []
    for factor in (each for each in factors if each.extent > 1):
        last = merged[-1] if merged else None
        if last is not None and last.axis == factor.axis and last.stride == factor.stride * factor.extent:
            merged[-1] = Factor(factor.axis, last.extent * factor.extent, factor.stride)
        else:
            merged.append(factor)
    return tuple(merged)


def _replaced(axes: Sequence[Axis], place: int, axis: Axis) -> tuple[Axis, ...]:
    return tuple(itertools.chain(axes[:place], (axis,), axes[place + 1 :]))
