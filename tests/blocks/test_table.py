"""Properties of every block over geometries, dtypes and sizes; and each block against its published formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.blocks import BLOCKS
from repvgg.errors import TrainingModeError
from tests.blocks.cases import (
    EXACT,
    GEOMETRIES,
    LINEAR,
    RELATIVE_TOLERANCE,
    build_block,
    cases,
    collapse_block,
    geometry_of,
    images,
    relative_error,
)
from tests.blocks.helpers import randomize_norms, training_step
from tests.blocks.published_formulas import PUBLISHED, ungrouped


def test_every_block_has_a_published_formula():
    assert set(PUBLISHED) == set(LINEAR)
    assert all(entry.name == name and entry.source and entry.formula for name, entry in BLOCKS.items())


@pytest.mark.parametrize(("name", "key"), cases(GEOMETRIES))
@torch.no_grad()
def test_traced_kernel_equals_published_formula(name, key):
    geometry = geometry_of(name, **GEOMETRIES[key])
    block = build_block(name, geometry)
    conv = repvgg.trace(block)
    assert (conv.stride, conv.groups) == (geometry.stride, geometry.groups)
    for x in images(geometry):
        assert relative_error(conv(x), block(x)) <= EXACT
    kernel, bias = PUBLISHED[name](block, geometry)
    found = with_all_taps(ungrouped(conv.weight, conv.groups), geometry)
    assert_close(
        found, with_all_taps(kernel, geometry, is_expanded=False), rtol=0, atol=EXACT * float(kernel.abs().max())
    )
    assert_close(conv.bias_or_zeros(), bias, rtol=0, atol=EXACT * float(1 + bias.abs().max()))


def with_all_taps(kernel, geometry, is_expanded=True):
    """Expand a dilation into zeros between taps: the algebra may represent it either way."""
    size = [step * (side - 1) + 1 for step, side in zip(geometry.dilation, geometry.kernel_size, strict=True)]
    if is_expanded and list(kernel.shape[2:]) == size:
        return kernel
    out = kernel.new_zeros(*kernel.shape[:2], *size)
    out[:, :, :: geometry.dilation[0], :: geometry.dilation[1]] = kernel
    return out


@pytest.mark.parametrize(("name", "key"), cases(["square", "groups, wider", "dilation and stride", "reflect"]))
def test_collapse_leaves_one_convolution(name, key):
    geometry = geometry_of(name, **GEOMETRIES[key])
    block, plain, report = collapse_block(name, geometry)
    assert len(report.folded) == 1
    assert report.left == ()
    assert repvgg.is_plain(plain)
    assert [type(part) for part in plain.modules() if not any(part.children())].count(nn.Conv2d) == 1
    with torch.no_grad():
        for x in images(geometry):
            assert relative_error(plain(x), block(x).relu()) <= EXACT


@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
@pytest.mark.parametrize("name", LINEAR)
def test_low_precision_is_rounded_once(name, dtype):
    """The plain form of a low-precision block is as close to its float64 function as a single rounding."""
    geometry = geometry_of(name)
    block, plain, _ = collapse_block(name, geometry, dtype)
    exact = build_block(name, geometry, dtype).double()
    assert all(tensor.dtype == dtype for tensor in plain.parameters())
    with torch.no_grad():
        for x in images(geometry, dtype=dtype):
            assert relative_error(plain(x), exact(x.double()).relu()) <= RELATIVE_TOLERANCE[dtype]
    weight, bias = repvgg.equivalent_conv(block)
    assert weight.dtype == bias.dtype == dtype


@pytest.mark.parametrize("name", LINEAR)
def test_gradients_through_equivalent_conv(name):
    """Compare with central differences along a random direction of all parameters."""
    geometry = geometry_of(name)
    block = build_block(name, geometry)
    parameters = list(block.parameters())
    generator = torch.Generator().manual_seed(3)
    first = repvgg.equivalent_conv(block)
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in first]
    step = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def value():
        return sum((part * w).sum() for part, w in zip(repvgg.equivalent_conv(block), weights, strict=True))

    grads = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum((g * s).sum() for g, s in zip(grads, step, strict=True) if g is not None)
    sides = []
    with torch.no_grad():
        for amount in (1e-5, -2e-5):
            for p, s in zip(parameters, step, strict=True):
                p += amount * s
            sides.append(value())
    assert_close(slope, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-6)
    named = zip(block.named_parameters(), grads, strict=True)
    assert [n for (n, _), g in named if g is None] == []


@pytest.mark.parametrize("name", BLOCKS)
def test_training_step_gives_every_parameter_a_gradient(name):
    geometry = geometry_of(name)
    block = build_block(name, geometry).train()
    block(next(images(geometry))).square().sum().backward()
    missing = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    with pytest.raises(TrainingModeError):
        repvgg.trace(block)


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_passes_equal_eager_training_step(name, compiled):
    geometry = geometry_of(name)
    block = randomize_norms(build_block(name, geometry))
    found, wanted = (training_step(block, next(images(geometry)), kernels) for kernels in ("compiled", "eager"))
    for key, value in wanted.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_last_gives_equal_results(name):
    geometry = geometry_of(name)
    block, x = build_block(name, geometry), next(images(geometry))
    wanted = block(x)
    out = block.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert_close(out, wanted, rtol=1e-12, atol=1e-12)
