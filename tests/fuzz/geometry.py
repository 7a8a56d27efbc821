"""Which kernels, paddings, dilations and strides lead from one shape to another."""

from itertools import product

from tests.fuzz.program import Shape

STRIDES = ((1, 1), (2, 2), (2, 1))
USUAL = ((1, 0, 1), (3, 1, 1), (5, 2, 1))


def axis_choices(sizes: tuple[int, ...], stride: int, outs: tuple[int, ...] | None) -> list[tuple[int, int, int]]:
    """(kernel, padding, dilation) along one axis; all that lead to ``outs``, or any that leave three pixels."""
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
    """For each axis: sizes, stride, and the sizes to get to."""
    outs = zip(*to.sizes, strict=True) if to else (None, None)
    return zip(zip(*x.sizes, strict=True), stride, outs, strict=True)


def strides_to(x: Shape, to: Shape | None) -> list[tuple[int, int]]:
    """Strides with which some convolution leads to the target, or anywhere."""
    return [stride for stride in STRIDES if all(axis_choices(*axis) for axis in axes(x, to, stride))]
