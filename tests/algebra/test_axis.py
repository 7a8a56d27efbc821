"""One axis: tap positions and output sizes, checked by counting pixels one by one."""

import itertools

import pytest

from repvgg.algebra.axis import Axis, compose_axes, merge_axes, placement_in, symmetric_axis
from repvgg.errors import BorderError, NotLinearError

AXES = [
    Axis(k, s, d, before, after)
    for k, s, d, before, after in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), (-1, 0, 1, 3), (-1, 0, 2))
]


def taps(axis: Axis, size: int) -> list[list[int]]:
    """Return the input pixels that each output pixel reads, including those beyond the border."""
    out = (size + axis.before + axis.after - axis.dilation * (axis.kernel - 1) - 1) // axis.stride + 1
    return [[axis.stride * p + axis.dilation * i - axis.before for i in range(axis.kernel)] for p in range(out)]


@pytest.mark.parametrize("inner", AXES[::7])
def test_composition_reads_the_same_pixels(inner):
    for outer, size in itertools.product(AXES[::5], (12, 17)):
        merged, second = compose_axes(inner, outer), taps(outer, len(taps(inner, size)))
        # what the inner axis reads at any position p, inside or beyond the border of its output
        reads = {
            p: [inner.stride * p + inner.dilation * i - inner.before for i in range(inner.kernel)]
            for p in range(-9, 60)
        }
        both = [sorted({x for middle in row for x in reads[middle]}) for row in second]
        assert len(taps(merged, size)) == len(second)
        for merged_reads, wanted in zip(taps(merged, size), both, strict=True):
            assert set(wanted) <= set(merged_reads)
            assert (min(merged_reads), max(merged_reads)) == (wanted[0], wanted[-1])


@pytest.mark.parametrize("axis", AXES)
def test_symmetric_axis_keeps_taps_and_sizes(axis):
    symmetric = symmetric_axis(axis)
    assert symmetric.before == symmetric.after >= 0
    for size in (9, 14):
        assert len(taps(symmetric, size)) == len(taps(axis, size))
        for wanted, reads in zip(taps(axis, size), taps(symmetric, size), strict=True):
            place = placement_in(axis, symmetric)
            assert [reads[place.start + place.step * i] for i in range(axis.kernel)] == wanted


def test_merge_finds_the_smallest_enclosing_axis():
    # a 3-tap kernel of dilation 2, the pixel itself, and the pixel to the right
    axes = [Axis(3, 1, 2, 2, 2), Axis(1), Axis(1, before=-1, after=1)]
    assert merge_axes(axes) == Axis(5, 1, 1, 2, 2)
    assert merge_axes(axes[:2]) == Axis(3, 1, 2, 2, 2)


def test_merge_refuses_axes_of_different_output_sizes():
    with pytest.raises(NotLinearError, match="strides"):
        merge_axes([Axis(3, 2, 1, 1, 1), Axis(1, 1)])
    with pytest.raises(BorderError, match="sizes"):
        merge_axes([Axis(3, 1, 1, 1, 1), Axis(3, 1, 1, 0, 0)])


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis.before >= 0 and axis.after >= 0])
def test_stays_zero_outside_is_exact(axis):
    """Counted over many sizes: does an output pixel beyond the border ever reach the image?"""

    def reaches(size: int, places: range) -> bool:
        reads = (axis.stride * p + axis.dilation * i - axis.before for p in places for i in range(axis.kernel))
        return any(0 <= x < size for x in reads)

    sizes = range(8, 16)
    in_front = any(reaches(size, range(-8, 0)) for size in sizes)
    after = any(reaches(size, range(len(taps(axis, size)), len(taps(axis, size)) + 8)) for size in sizes)
    assert axis.stays_zero_outside(before=True, after=False) is not in_front
    assert axis.stays_zero_outside(before=False, after=True) is not after
