"""Maps over 0 to 3 axes: every operation against torch's own functions, in float64."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from repvgg.algebra import (
    Axis,
    ConvMap,
    add,
    compose,
    concatenate,
    embed,
    open_groups,
    resample,
    scale,
    select_channels,
    shift,
    with_symmetric_padding,
)
from repvgg.errors import BorderError, NotLinearError, UsageError

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = {0: (), 1: (17,), 2: (13, 16), 3: (9, 7, 11)}
TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPATIAL = pytest.mark.parametrize("n", [1, 2, 3])
EVERY = pytest.mark.parametrize("n", [0, 1, 2, 3])


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(n, channels=4):
    return numbers(2, channels, *SIZES[n], seed=9)


def conv(n, cin, cout, k=1, seed=0, bias=True, groups=1, **geometry):
    size = (k,) * n if isinstance(k, int) else k
    weight = numbers(cout, cin // groups, *size, seed=seed)
    return ConvMap.of(weight, numbers(cout, seed=seed + 1) if bias else None, groups=groups, **geometry)


def column(vector, n):
    return vector.view(1, -1, *(1,) * n)


@SPATIAL
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_evaluation_equals_torch(n, stride, dilation, groups, padding):
    kernel = (3, 2, 1)[:n]
    sides, steps, taps = ((value,) * n for value in (padding, stride, dilation))
    base = conv(n, 4, 8, kernel, groups=groups, stride=steps, dilation=taps, padding=sides * 2, border="zeros")
    wanted = TORCH[n](tensor(n), base.weight, base.bias, stride, padding, dilation, groups)
    assert_close(base(tensor(n)), wanted, **EXACT)
    assert (base.spatial, base.kernel_size, len(base.axes)) == (n, kernel, n)
    assert base.multiply_adds == base.kernel.numel() / stride**n


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_linear_maps(groups):
    base = conv(0, 4, 8, groups=groups)
    whole = open_groups(base, 1)
    for x in (numbers(5, 4), numbers(2, 3, 4), numbers(4)):
        assert_close(base(x), F.linear(x, whole.weight, base.bias), **EXACT)
    assert repr(base).startswith("ConvMap(4→8, linear")


@EVERY
@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (4, 2), (1, 4), (4, 4)])
@pytest.mark.parametrize("border", ["zeros", "reflect", "replicate", "circular"])
def test_sums(n, groups, border):
    large = conv(n, 4, 4, 3, 1, groups=groups[0], padding=(1, 1) * n, border=border)
    small = conv(n, 4, 4, 1, 2, groups=groups[1])
    uneven = conv(
        n, 4, 4, (3, 1, 2)[:n], 3, False, dilation=(2, 1, 1)[:n], padding=(2, 2, 0, 0, 1, 0)[: 2 * n], border=border
    )
    merged, x = add(large, small, uneven, ConvMap.identity(4, spatial=n)), tensor(n)
    assert_close(merged(x), large(x) + small(x) + uneven(x) + x, **EXACT)
    pieces = [sums.clone() for _, sums in merged.kernel.chunks()]
    assert_close(torch.cat(pieces), merged.weight, **EXACT)


@EVERY
@pytest.mark.parametrize("inner_groups", [1, 2, 4])
@pytest.mark.parametrize("outer_groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_compositions(n, inner_groups, outer_groups, stride):
    inner = conv(n, 4, 8, (3, 2, 1)[:n], 1, groups=inner_groups, stride=(stride,) * n, dilation=(1, 2, 1)[:n])
    outer = conv(n, 8, 8, (2, 1, 3)[:n], 2, groups=outer_groups, stride=(1, stride, 1)[:n], dilation=(2, 1, 1)[:n])
    merged = compose(inner, outer)
    assert_close(merged(tensor(n)), outer(inner(tensor(n))), **EXACT)


@EVERY
def test_scale_shift_concatenate_and_select(n):
    left, right = conv(n, 4, 4, 3, 1, groups=2, padding=(1, 1) * n, border="zeros"), conv(n, 4, 6, 1, 2, bias=False)
    factor, x = numbers(4, seed=5), tensor(n)
    assert_close(shift(scale(left, factor), factor)(x), left(x) * column(factor, n) + column(factor, n), **EXACT)
    both = concatenate([left, right, ConvMap.identity(4, spatial=n)])
    whole = torch.cat([left(x), right(x), x], 1)
    assert_close(both(x), whole, **EXACT)
    assert_close(select_channels(both, slice(3, 12, 2))(x), whole[:, 3:12:2], **EXACT)
    assert_close(left.to("cpu", torch.float32)(x.float()).double(), left(x), rtol=1e-4, atol=1e-5)


@SPATIAL
def test_resample_embed_and_symmetric_padding(n):
    base = conv(n, 4, 4, 3, 1, bias=False, padding=(2, 2) * n, border="zeros")
    axes = (Axis(before=1, after=2), Axis(before=-1), Axis(stride=2, after=-2))[:n]
    moved, x = resample(base, axes, "zeros"), tensor(n)
    sides = [side for axis in reversed(axes) for side in (axis.before, axis.after)]
    wanted = F.pad(base(x), sides)[(..., *(slice(None, None, axis.stride) for axis in axes))]
    assert_close(moved(x), wanted, **EXACT)
    assert_close(with_symmetric_padding(moved)(x), wanted, **EXACT)
    larger = embed(base, tuple(Axis(7, before=4, after=4) for _ in range(n)))
    assert larger.kernel_size == (7,) * n
    assert_close(larger(x), base(x), **EXACT)


@SPATIAL
def test_borders_that_are_refused(n):
    padded = conv(n, 4, 4, 3, 2, padding=(1, 1) * n, border="zeros")
    with pytest.raises(BorderError, match="leaks into the padding"):
        compose(conv(n, 4, 4), padded)
    with pytest.raises(BorderError, match="still see the image"):
        compose(conv(n, 4, 4, 3, bias=False), padded)
    with pytest.raises(BorderError, match="reflect and by zeros"):
        add(padded, conv(n, 4, 4, 3, padding=(1, 1) * n, border="reflect"))
    full = conv(n, 4, 4, 3, 1, bias=False, padding=(2, 2) * n, border="zeros")
    assert_close(compose(full, padded)(tensor(n)), padded(full(tensor(n))), **EXACT)


def test_maps_over_different_numbers_of_axes_are_refused():
    for n, m in itertools.permutations(range(4), 2):
        for operation in (add, compose, lambda *both: concatenate(both)):
            with pytest.raises(NotLinearError, match="axes"):
                operation(conv(n, 4, 4), conv(m, 4, 4))
    with pytest.raises(UsageError, match="stride"):
        ConvMap.of(numbers(4, 4, 3), stride=(1, 1))
    with pytest.raises(UsageError, match="padding"):
        ConvMap.of(numbers(4, 4, 3), padding=(1,), border="zeros")
    with pytest.raises(UsageError, match="at least 1"):
        ConvMap.of(numbers(4, 4, 3), stride=(0,))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_random_compositions_are_exact_or_refused(n, seed):
    r, compared = random.Random(seed), 0

    def draw(cin):
        groups = r.choice([g for g in (1, 2, 4) if cin % g == 0])
        geometry = {
            "stride": tuple(r.choice([1, 1, 2]) for _ in range(n)),
            "padding": tuple(r.choice([-1, 0, 0, 1, 2]) for _ in range(2 * n)),
            "dilation": tuple(r.choice([1, 2]) for _ in range(n)),
            "border": r.choice(["zeros", "zeros", "reflect", "circular"]),
        }
        size = tuple(r.choice([1, 1, 3]) for _ in range(n))
        return conv(n, cin, groups * 2, size, r.randrange(10**6), r.random() < 0.4, groups, **geometry)

    for _ in range(300):
        inner = draw(4)
        outer = draw(inner.out_channels)
        try:
            merged = compose(inner, outer)
        except BorderError:
            continue
        try:
            wanted = outer(inner(tensor(n)))
        except RuntimeError:  # the kernel is larger than the rest of the image, or torch cannot reflect that far
            continue
        assert_close(merged(tensor(n)), wanted, rtol=1e-11, atol=1e-11)
        compared += 1
    assert compared > 5
