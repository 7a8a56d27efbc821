"""Properties of every block of the table, over geometry, dtype and sizes; and each against its published formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.blocks import BLOCKS
from repvgg.errors import TrainingModeError
from tests.blocks.cases import EXACT, GEOMETRIES, HALF, LINEAR, cases, geometry_of, images, made, plain_of, relative
from tests.blocks.helpers import step, stirred
from tests.blocks.published_formulas import PUBLISHED, opened


def test_every_block_has_a_published_formula():
    assert set(PUBLISHED) == set(LINEAR)
    assert all(row.name == name and row.source and row.formula for name, row in BLOCKS.items())


@pytest.mark.parametrize(("name", "key"), cases(GEOMETRIES))
@torch.no_grad()
def test_the_published_formula_and_the_symbolic_one_agree(name, key):
    geometry = geometry_of(name, **GEOMETRIES[key])
    block = made(name, geometry)
    conv = repvgg.trace(block)
    assert (conv.stride, conv.groups) == (geometry.stride, geometry.groups)
    for x in images(geometry):
        assert relative(conv(x), block(x)) <= EXACT
    kernel, bias = PUBLISHED[name](block, geometry)
    found = spread_out(opened(conv.weight, conv.groups), geometry)
    assert_close(found, spread_out(kernel, geometry, known=False), rtol=0, atol=EXACT * float(kernel.abs().max()))
    assert_close(conv.bias_or_zeros(), bias, rtol=0, atol=EXACT * float(1 + bias.abs().max()))


def spread_out(kernel, geometry, known=True):
    """Kernels with all their taps, the zeros of a dilation included: the algebra may write them either way."""
    size = [step * (side - 1) + 1 for step, side in zip(geometry.dilation, geometry.kernel_size, strict=True)]
    if known and list(kernel.shape[2:]) == size:
        return kernel
    out = kernel.new_zeros(*kernel.shape[:2], *size)
    out[:, :, :: geometry.dilation[0], :: geometry.dilation[1]] = kernel
    return out


@pytest.mark.parametrize(("name", "key"), cases(["square", "groups, wider", "dilation and stride", "reflect"]))
def test_a_collapse_leaves_one_convolution(name, key):
    geometry = geometry_of(name, **GEOMETRIES[key])
    block, plain, report = plain_of(name, geometry)
    assert len(report.folded) == 1
    assert report.left == ()
    assert repvgg.is_plain(plain)
    assert [type(part) for part in plain.modules() if not any(part.children())].count(nn.Conv2d) == 1
    with torch.no_grad():
        for x in images(geometry):
            assert relative(plain(x), block(x).relu()) <= EXACT


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LINEAR)
def test_dtypes_are_rounded_once(name, dtype):
    """The plain form of a half-precision block is as near to its float64 function as one rounding of it."""
    geometry = geometry_of(name)
    block, plain, _ = plain_of(name, geometry, dtype)
    exact = made(name, geometry, dtype).double()
    assert all(tensor.dtype == dtype for tensor in plain.parameters())
    with torch.no_grad():
        for x in images(geometry, dtype=dtype):
            assert relative(plain(x), exact(x.double()).relu()) <= HALF[dtype]
    weight, bias = repvgg.equivalent_conv(block)
    assert weight.dtype == bias.dtype == dtype


@pytest.mark.parametrize("name", LINEAR)
def test_gradients_through_the_equivalent_conv(name):
    """Against central differences, along a random direction of all parameters at once."""
    geometry = geometry_of(name)
    block = made(name, geometry)
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
def test_a_training_step_reaches_every_parameter(name):
    geometry = geometry_of(name)
    block = made(name, geometry).train()
    block(next(images(geometry))).square().sum().backward()
    missing = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    with pytest.raises(TrainingModeError):
        repvgg.trace(block)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_compiled_passes_train_it_as_pytorch_does(name, compiled):
    geometry = geometry_of(name)
    block = stirred(made(name, geometry))
    found, wanted = (step(block, next(images(geometry)), kernels) for kernels in ("compiled", "eager"))
    for key, value in wanted.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", BLOCKS)
def test_channels_last_changes_nothing(name):
    geometry = geometry_of(name)
    block, x = made(name, geometry), next(images(geometry))
    wanted = block(x)
    out = block.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert_close(out, wanted, rtol=1e-12, atol=1e-12)
