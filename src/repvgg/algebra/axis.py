"""One spatial axis of a convolution, and how two of them combine.

Output pixel p of an axis reads the taps ``stride·p + dilation·i − before`` for i = 0 … kernel − 1, of an input that is
continued by ``before`` pixels in front and ``after`` behind; negative numbers crop. The output has
``(size + before + after − dilation·(kernel − 1) − 1) // stride + 1`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from repvgg.errors import BorderError, NotLinearError


@dataclass(frozen=True)
class Placement:
    """Where the taps of a kernel land in a larger one: tap i at index ``start + step·i``."""

    start: int
    step: int
    count: int

    @property
    def slice(self) -> slice:
        """The indices as a slice of the larger kernel."""
        return slice(self.start, self.start + self.step * (self.count - 1) + 1, self.step)

    def within(self, outer: Placement) -> Placement:
        """The place in the largest kernel, where the one that this is a place in has the place ``outer``."""
        return Placement(outer.start + outer.step * self.start, outer.step * self.step, self.count)


@dataclass(frozen=True)
class Axis:
    """Geometry of a convolution along one axis; see the module for the formula."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def reach(self) -> int:
        """Distance in pixels from the first tap to the last."""
        return self.dilation * (self.kernel - 1)

    def output_size(self, size: int) -> int:
        """How many output pixels there are for ``size`` input pixels."""
        return max(0, (size + self.before + self.after - self.reach - 1) // self.stride + 1)

    @property
    def growth(self) -> int:
        """Output size minus input size at stride 1: equal for two axes iff their outputs always have one size."""
        return self.before + self.after - self.reach

    @property
    def pads(self) -> bool:
        """Whether anything beyond the border is read."""
        return self.before > 0 or self.after > 0

    def tap_step(self) -> int:
        """Distance between neighbouring taps; 0 for a single tap, which has none."""
        return self.dilation if self.kernel > 1 else 0

    def stays_zero_outside(self, before: bool, after: bool) -> bool:
        """Whether the output, continued past the border, is zero where only zeros lie beyond the input's border.

        True on a side iff no tap of an output pixel beyond that side reaches the input. Only the sides asked for are
        looked at. At stride s > 1 the condition behind is the one that holds for every input size.
        """
        in_front = self.before >= self.reach - self.stride + 1
        behind = self.after >= self.reach
        return (in_front or not before) and (behind or not after)


def compose_axes(inner: Axis, outer: Axis) -> Axis:
    """The axis of ``outer ∘ inner``: strides multiply, reaches add, padding of the outer counts in inner strides."""
    step = gcd(inner.tap_step(), inner.stride * outer.tap_step()) or 1
    reach = inner.reach + inner.stride * outer.reach
    return Axis(
        kernel=reach // step + 1,
        stride=inner.stride * outer.stride,
        dilation=step,
        before=inner.before + inner.stride * outer.before,
        after=inner.after + inner.stride * outer.after,
    )


def inner_placement(inner: Axis, outer: Axis, merged: Axis, outer_tap: int) -> Placement:
    """Where the taps of ``inner`` land in the merged kernel when they are read by tap ``outer_tap`` of ``outer``."""
    start = inner.stride * outer.dilation * outer_tap // merged.dilation
    return Placement(start, max(1, inner.tap_step() // merged.dilation), inner.kernel)


def merge_axes(axes: Sequence[Axis]) -> Axis:
    """The smallest axis that holds the taps of all ``axes`` at their places.

    Raises:
        NotLinearError: the strides differ.
        BorderError: the output sizes differ.
    """
    first = axes[0]
    if any(axis.stride != first.stride for axis in axes):
        strides = sorted({axis.stride for axis in axes})
        raise NotLinearError(f"branches with strides {strides} do not merge into one convolution")
    if any(axis.growth != first.growth for axis in axes):
        raise BorderError("branches whose padding gives outputs of different sizes do not merge into one convolution")
    low = min(-axis.before for axis in axes)
    high = max(axis.reach - axis.before for axis in axes)
    step = gcd(*(axis.tap_step() for axis in axes), *(-axis.before - low for axis in axes)) or 1
    return Axis((high - low) // step + 1, first.stride, step, -low, first.growth + high)


def placement_in(axis: Axis, merged: Axis) -> Placement:
    """Where the taps of ``axis`` land in ``merged``, an outcome of :func:`merge_axes` over it."""
    start = (merged.before - axis.before) // merged.dilation
    return Placement(start, max(1, axis.tap_step() // merged.dilation), axis.kernel)


def symmetric_axis(axis: Axis) -> Axis:
    """The smallest enclosing axis whose padding is the same number, at least 0, on both sides."""
    target = max(axis.before, axis.after, 0)
    extra = (target - axis.before, target - axis.after)
    step = gcd(axis.tap_step(), *extra) or 1
    return Axis((axis.reach + sum(extra)) // step + 1, axis.stride, step, target, target)
