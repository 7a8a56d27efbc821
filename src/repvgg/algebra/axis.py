"""One spatial axis of a convolution, and how two of them combine.

Output pixel p of an axis reads the taps ``stride·p + dilation·i − before`` for i = 0 … kernel − 1, of an input that is
padded by ``before`` pixels at its start and ``after`` at its end; negative numbers crop. The output has
``(size + before + after − dilation·(kernel − 1) − 1) // stride + 1`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from repvgg.errors import BorderError, NotLinearError


@dataclass(frozen=True)
class Placement:
    """Where the taps of a kernel are in a larger one: tap i at index ``start + step·i``."""

    start: int
    step: int
    count: int

    @property
    def slice(self) -> slice:
        """The indices as a slice of the larger kernel."""
        return slice(self.start, self.start + self.step * (self.count - 1) + 1, self.step)

    def within(self, outer: Placement) -> Placement:
        """Return the placement in the outermost kernel, for a kernel in a kernel that is placed at ``outer``."""
        return Placement(outer.start + outer.step * self.start, outer.step * self.step, self.count)


@dataclass(frozen=True)
class Axis:
    """Geometry of a convolution along one axis; the module docstring has the formula."""

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
        """Return the number of output pixels for ``size`` input pixels."""
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
        """Return the distance between neighbouring taps; 0 for a single tap."""
        return self.dilation if self.kernel > 1 else 0

    def stays_zero_outside(self, before: bool, after: bool) -> bool:
        """Whether output pixels beyond the border would be zero if only zeros are beyond the input's border.

        True at the start (``before``) or end (``after``) iff no tap of an output pixel beyond it reaches the input.
        """
        at_start = self.before >= self.reach - self.stride + 1
        at_end = self.after >= self.reach  # at stride > 1, the bound that holds for every input size
        return (at_start or not before) and (at_end or not after)


def compose_axes(inner: Axis, outer: Axis) -> Axis:
    """Return the axis of ``outer ∘ inner``: strides multiply, reaches add, outer padding counts inner strides."""
    # Taps are at all sums of the two tap grids; the coarsest grid that contains them has the gcd as its step.
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
    """Return where the taps of ``inner`` are in the merged kernel when tap ``outer_tap`` of ``outer`` reads them."""
    start = inner.stride * outer.dilation * outer_tap // merged.dilation
    return Placement(start, max(1, inner.tap_step() // merged.dilation), inner.kernel)


def merge_axes(axes: Sequence[Axis]) -> Axis:
    """Return the smallest axis that contains the taps of all ``axes`` at their positions.

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
    # Positions relative to the output pixel: the first and last tap of any of the kernels.
    low = min(-axis.before for axis in axes)
    high = max(axis.reach - axis.before for axis in axes)
    step = gcd(*(axis.tap_step() for axis in axes), *(-axis.before - low for axis in axes)) or 1
    return Axis((high - low) // step + 1, first.stride, step, -low, first.growth + high)


def placement_in(axis: Axis, merged: Axis) -> Placement:
    """Return where the taps of ``axis`` are in ``merged``, a result of :func:`merge_axes` over it."""
    start = (merged.before - axis.before) // merged.dilation
    return Placement(start, max(1, axis.tap_step() // merged.dilation), axis.kernel)


def symmetric_axis(axis: Axis) -> Axis:
    """Return the smallest enclosing axis with equal padding, at least 0, on both sides."""
    # The kernel grows by zero taps on the side that has less padding.
    target = max(axis.before, axis.after, 0)
    extra = (target - axis.before, target - axis.after)
    step = gcd(axis.tap_step(), *extra) or 1
    return Axis((axis.reach + sum(extra)) // step + 1, axis.stride, step, target, target)
