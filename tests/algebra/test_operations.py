"""Every operation of the algebra against the computation that it represents, in float64."""

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


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(cin, cout, k=3, seed=0, bias=True, groups=1, **geometry):
    k = (k, k) if isinstance(k, int) else k
    geometry.setdefault("border", "zeros")
    return ConvMap.of(
        numbers(cout, cin // groups, *k, seed=seed),
        numbers(cout, seed=seed + 1) if bias else None,
        groups=groups,
        **geometry,
    )


IMAGES = [numbers(2, 4, 13, 16, seed=9), numbers(1, 4, 14, 11, seed=8)]


def test_by_hand():
    """x = [[1, 2], [3, 4]] with zeros around it; the kernel sums a cross; 1x1 doubles; the identity adds x."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64)
    cross = torch.tensor([[[[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]]], dtype=torch.float64)
    three = ConvMap.of(cross, torch.tensor([0.5], dtype=torch.float64), padding=(1, 1, 1, 1), border="zeros")
    one = ConvMap.of(torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64))
    merged = add(three, one, ConvMap.identity(1))
    assert_close(merged.weight, torch.tensor([[[[0.0, 1, 0], [1, 3, 1], [0, 1, 0]]]], dtype=torch.float64), **EXACT)
    # centre: 3·1 + 2 + 3 + 0.5 = 8.5, and so on
    assert_close(merged(x), torch.tensor([[[[8.5, 11.5], [14.5, 17.5]]]], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (4, 2), (1, 4), (4, 4), (2, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("border", ["zeros", "reflect", "replicate", "circular"])
def test_add(groups, stride, border):
    left = conv(4, 4, 3, 1, groups=groups[0], stride=stride, padding=(1, 1, 1, 1), border=border)
    right = conv(4, 4, 1, 2, groups=groups[1], stride=stride)
    dilated = conv(
        4, 4, 3, 3, groups=4, stride=stride, dilation=(2, 1), padding=(2, 2, 1, 1), border=border, bias=False
    )
    merged = add(left, right, dilated)
    assert merged.groups == min(*groups)
    for x in IMAGES:
        assert_close(merged(x), left(x) + right(x) + dilated(x), **EXACT)


def test_an_identity_is_never_multiplied_out():
    identity = ConvMap.identity(512)
    merged = add(conv(512, 512, 1), identity)
    assert merged.kernel.terms[-1].weight.numel() == 512
    assert compose(identity, conv(512, 512, 1)).kernel.terms[0].weight.shape == (512, 512, 1, 1)


@pytest.mark.parametrize("inner_groups", [1, 2, 4])
@pytest.mark.parametrize("outer_groups", [1, 2, 4])
@pytest.mark.parametrize("outer_kernel", [1, (3, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_compose_without_outer_padding(inner_groups, outer_groups, outer_kernel, stride):
    inner = conv(4, 8, 3, 1, groups=inner_groups, stride=(stride, 1), dilation=(1, 2), padding=(2, 1, 0, 3))
    outer = conv(8, 4, outer_kernel, 2, groups=outer_groups, dilation=(2, 1), stride=(1, stride))
    merged = compose(inner, outer)
    for x in IMAGES:
        assert_close(merged(x), outer(inner(x)), **EXACT)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_compose_with_depthwise(multiplier):
    depthwise, dense = conv(4, 4 * multiplier, 3, 1, groups=4), conv(4 * multiplier, 6, 1, 2)
    for x in IMAGES:
        assert_close(compose(depthwise, dense)(x), dense(depthwise(x)), **EXACT)
    pointwise, depthwise = conv(4, 6, 1, 3), conv(6, 6, 3, 4, groups=6)
    for x in IMAGES:
        assert_close(compose(pointwise, depthwise)(x), depthwise(pointwise(x)), **EXACT)


def test_compose_across_the_border_if_exact():
    padded = conv(8, 4, 3, 2, padding=(1, 1, 1, 1))
    pointwise = conv(4, 8, 1, 1, bias=False)
    strided = conv(4, 8, 1, 1, bias=False, stride=(2, 2))
    full = conv(4, 8, 3, 1, bias=False, padding=(2, 2, 2, 2))
    for inner, x in itertools.product((pointwise, strided, full), IMAGES):
        assert_close(compose(inner, padded)(x), padded(inner(x)), **EXACT)
    reflected = conv(8, 4, 3, 2, padding=(1, 1, 1, 1), border="reflect")
    biased = conv(4, 8, 1, 1)
    ring = conv(4, 4, 3, 5, padding=(1, 1, 1, 1), border="circular")
    for inner, outer in ((biased, reflected), (ring, ring)):
        assert_close(compose(inner, outer)(IMAGES[0]), outer(inner(IMAGES[0])), **EXACT)


@pytest.mark.parametrize(
    ("inner", "outer", "reason"),
    [
        ({"k": 1}, {}, "leaks into the padding"),
        ({"k": 3, "bias": False}, {}, "still see the image"),
        ({"k": 3, "bias": False, "padding": (1, 1, 1, 1)}, {}, "still see the image"),
        ({"k": 3, "bias": False, "padding": (1, 1, 1, 1), "border": "reflect"}, {}, "in two ways"),
        ({"k": 3, "bias": False}, {"border": "reflect"}, "not its input"),
        ({"k": 1, "bias": False, "stride": (2, 2)}, {"border": "circular"}, "not its input"),
    ],
)
def test_compose_refuses_what_would_differ_at_the_border(inner, outer, reason):
    first, second = conv(4, 4, **inner), conv(4, 4, 3, 2, padding=(1, 1, 1, 1), **outer)
    with pytest.raises(BorderError, match=reason):
        compose(first, second)


def test_refused_compositions_really_differ():
    """The composed kernel without its border condition gives other numbers at the border."""
    inner, outer = conv(4, 4, 1, 1), conv(4, 4, 3, 2, padding=(1, 1, 1, 1))
    inside = compose(inner, ConvMap.of(outer.weight, outer.bias))
    x = IMAGES[0]
    wrong = ConvMap.of(inside.weight, inside.bias, padding=(1, 1, 1, 1), border="zeros")(x)
    assert_close(wrong[..., 1:-1, 1:-1], outer(inner(x))[..., 1:-1, 1:-1], **EXACT)
    assert (wrong - outer(inner(x))).abs().max() > 0.1


def test_scale_and_shift():
    base, factor, offset = conv(4, 4, 3, 1, groups=2), numbers(4, seed=5), numbers(4, seed=6)
    x = IMAGES[0]
    assert_close(scale(base, factor)(x), base(x) * factor.view(1, -1, 1, 1), **EXACT)
    assert_close(shift(base, offset)(x), base(x) + offset.view(1, -1, 1, 1), **EXACT)
    assert_close(shift(ConvMap.identity(4), offset)(x), x + offset.view(1, -1, 1, 1), **EXACT)


@pytest.mark.parametrize("groups", [1, 2])
def test_concatenate_and_select(groups):
    left = conv(4, 4, 3, 1, groups=groups, padding=(1, 1, 1, 1))
    right = conv(4, 6, 1, 2, bias=False)
    both = concatenate([left, right, ConvMap.identity(4)])
    for x in IMAGES:
        whole = torch.cat([left(x), right(x), x], 1)
        assert_close(both(x), whole, **EXACT)
        assert_close(select_channels(both, slice(3, 12, 2))(x), whole[:, 3:12:2], **EXACT)
        assert_close(select_channels(left, slice(1, 3))(x), left(x)[:, 1:3], **EXACT)
    assert select_channels(left, slice(0, 4)) is left


def test_open_groups_and_embed():
    base = conv(4, 8, (3, 1), 1, groups=4, padding=(1, 1, 0, 0))
    larger = embed(base, (Axis(5, before=2, after=2), Axis(3, before=1, after=1)))
    for groups, x in itertools.product((1, 2, 4), IMAGES):
        assert open_groups(base, groups).weight.shape == (8, 4 // groups, 3, 1)
        assert_close(open_groups(base, groups)(x), base(x), **EXACT)
        assert_close(larger(x), base(x), **EXACT)
    with pytest.raises(NotLinearError, match="groups"):
        open_groups(base, 3)


@pytest.mark.parametrize("axes", [(Axis(before=1, after=2), Axis()), (Axis(before=-1), Axis(stride=2, after=-2))])
def test_resample_and_symmetric_padding(axes):
    base = conv(4, 4, 3, 1, bias=False, padding=(2, 2, 2, 2))
    moved = resample(base, axes, "zeros")
    symmetric = with_symmetric_padding(moved)
    assert symmetric.padding[0] == symmetric.padding[1]
    for x in IMAGES:
        y, z = axes
        sides = [z.before, z.after, y.before, y.after]
        wanted = F.pad(base(x), sides)[:, :, :: y.stride, :: z.stride]
        assert_close(moved(x), wanted, **EXACT)
        assert_close(symmetric(x), wanted, **EXACT)


def test_mismatches_raise():
    with pytest.raises(NotLinearError, match="4→4 and 4→8"):
        add(conv(4, 8), conv(4, 4))
    with pytest.raises(NotLinearError, match="8 channels do not fit"):
        compose(conv(4, 8), conv(4, 4))
    with pytest.raises(BorderError, match="reflect and by zeros"):
        add(conv(4, 4, padding=(1, 1, 1, 1)), conv(4, 4, padding=(1, 1, 1, 1), border="reflect"))
    with pytest.raises(UsageError, match="OIHW"):
        ConvMap.of(numbers(3))
    with pytest.raises(UsageError, match="needs a border"):
        ConvMap.of(numbers(4, 4, 3, 3), padding=(1, 0, 0, 0))
    with pytest.raises(UsageError, match="groups"):
        ConvMap.of(numbers(4, 4, 1, 1), groups=3)
    with pytest.raises(UsageError, match="bias"):
        ConvMap.of(numbers(4, 4, 1, 1), numbers(3))


def random_map(r, cin):
    groups = r.choice([g for g in (1, 2, 4) if cin % g == 0])
    cout = groups * r.choice([1, 2, 3])
    geometry = {
        "stride": (r.choice([1, 1, 2]), r.choice([1, 2])),
        "padding": tuple(r.choice([-1, 0, 0, 1, 2]) for _ in range(4)),
        "dilation": (r.choice([1, 2]), r.choice([1, 3])),
        "border": r.choice(["zeros", "zeros", "reflect", "replicate", "circular"]),
    }
    size = (r.choice([1, 2, 3]), r.choice([1, 1, 3]))
    return conv(cin, cout, size, r.randrange(10**6), r.random() < 0.4, groups, **geometry)


@pytest.mark.parametrize("seed", range(8))
def test_random_compositions_are_exact_or_refused(seed):
    r, compared = random.Random(seed), 0
    while compared < 25:
        inner = random_map(r, 4)
        outer = random_map(r, inner.out_channels)
        try:
            merged = compose(inner, outer)
        except (BorderError, NotLinearError):
            continue
        for x in IMAGES:
            try:
                wanted = outer(inner(x))
            except RuntimeError:  # torch pads by reflection only up to the size of the image
                continue
            assert_close(merged(x), wanted, rtol=1e-11, atol=1e-11)
            compared += 1
