"""Kernels, paddings, dilations and strides that lead from one shape to another."""

from itertools import product

from tests.fuzz.program import Shape

STRIDES = ((1, 1), (2, 2), (2, 1))
USUAL = ((1, 0, 1), (3, 1, 1), (5, 2, 1))


def axis_choices(sizes: tuple[int, ...], stride: int, outs: tuple[int, ...] | None) -> list[tuple[int, int, int]]:
    """Return every (kernel, padding, dilation) along one axis that leads to ``outs``, or leaves three pixels."""
    found = []
    for k, d in product((1, 3, 2, 5), (1, 2)):
        for p in range(k + 1) if (k, d) != (1, 2) else ():
            got = tuple((n + 2 * p - d * (k - 1) - 1) // stride + 1 for n in sizes)
            if got == outs or (outs is None and min(got) >= 3):
                found.append((k, p, d))
    return found


def large_enough(x: Shape | None) -> bool:
    return x is not None and min(map(min, x.sizes)) >= 3


def axes(x: Shape, to: Shape | None, stride: tuple[int, int]):
    """Return for each axis: sizes, stride, and target sizes."""
    outs = zip(*to.sizes, strict=True) if to else (None, None)
    return zip(zip(*x.sizes, strict=True), stride, outs, strict=True)


def strides_to(x: Shape, to: Shape | None) -> list[tuple[int, int]]:
    """Return strides with which some convolution leads to the target, or to any shape."""
    return [stride for stride in STRIDES if all(axis_choices(*axis) for axis in axes(x, to, stride))]
