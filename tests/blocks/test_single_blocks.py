"""Properties of single blocks: rejected geometries, initial values, borders, memory, strides."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.blocks import BLOCKS, BranchSum, Geometry, PaddedNorm, block_of, create_block
from repvgg.errors import BorderError, NotLinearError, UsageError
from tests.blocks.cases import EXACT, build_block, geometry_of, images, relative_error
from tests.blocks.published_formulas import PUBLISHED, randomized


def test_relu_in_branches_prevents_collapse():
    block = build_block("repvgg_relu", geometry_of("repvgg_relu"))
    with pytest.raises(NotLinearError, match="relu is not a linear"):
        repvgg.trace(block)
    plain, report = repvgg.reparameterize(block)
    assert not repvgg.is_plain(plain) or len(report.folded) == 3
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) >= 2
    assert [skipped.name for skipped in report.left] == ["identity.0"]


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("conv_bn", "trivial", "dirac", "doconv")])
def test_uncentred_padding_is_rejected(name):
    geometry = geometry_of(name, padding=0)
    if name.startswith("expand"):
        block = build_block(name, geometry)
        x = next(images(geometry))
        assert relative_error(repvgg.trace(block)(x), block(x)) <= EXACT
        return
    with pytest.raises(BorderError, match="its padding is"):
        create_block(name, geometry)


@pytest.mark.parametrize("name", ["repvgg", "acb", "dbb", "replk", "repmixer", "orepa", "mobileone", "expand_ck"])
def test_even_kernel_is_rejected(name):
    with pytest.raises(UsageError, match="odd"):
        create_block(name, Geometry.square(4, 4, kernel_size=4))


@pytest.mark.parametrize("name", ["conv_bn", "doconv", "expand_cl"])
def test_even_kernel_is_supported_by_blocks_without_centre(name):
    geometry = Geometry.square(4, 6, kernel_size=(4, 2), padding=(1, 0), stride=2)
    block = build_block(name, geometry)
    x = next(images(geometry))
    assert relative_error(repvgg.trace(block)(x), block(x)) <= EXACT
    kernel, bias = PUBLISHED[name](block, geometry)
    assert relative_error(F.conv2d(x, kernel, bias, 2, (1, 0)), block(x)) <= EXACT


def test_unknown_names_and_unsupported_geometries():
    with pytest.raises(UsageError, match="did you mean repvgg"):
        block_of("repvg")
    with pytest.raises(UsageError, match="known are conv_bn"):
        block_of("zzzzzz")
    with pytest.raises(UsageError, match="square kernels of 5, 7"):
        create_block("unireplk", Geometry.square(4, 4))
    with pytest.raises(UsageError, match="stride 1"):
        create_block("repmixer", Geometry.square(4, 4, 2))
    with pytest.raises(UsageError, match="do not divide"):
        Geometry.square(4, 4, groups=3)
    with pytest.raises(UsageError, match="at least 1"):
        Geometry.square(4, 0)


def test_geometry_of_convolution():
    conv = nn.Conv2d(4, 6, (3, 5), (1, 1), "same", (2, 1), 2, padding_mode="circular")
    geometry = Geometry.of(conv)
    assert geometry.padding == (2, 2)
    assert Geometry.of(geometry.conv()) == geometry
    assert Geometry.of(nn.Conv2d(4, 6, 3, padding="valid")).padding == (0, 0)
    with pytest.raises(UsageError, match="even kernel"):
        Geometry.of(nn.Conv2d(4, 6, 2, padding="same"))


def test_padded_norm_equals_padding_before_norm_in_eval_mode():
    """In eval mode, padding with the norm of zero after the norm equals zero padding before it."""
    norm = randomized(PaddedNorm(4, (2, 1)).double())
    inner = nn.BatchNorm2d(4).double().eval()
    inner.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    assert_close(norm(x), inner(F.pad(x, (1, 1, 2, 2))), rtol=1e-13, atol=1e-13)


def test_padded_norm_in_training_mode_uses_batch_statistics_inside_and_running_statistics_at_border():
    norm = randomized(PaddedNorm(4, (1, 1)).double()).train()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    out = norm(x)
    inside = F.batch_norm(x, None, None, norm.weight, norm.bias, True)
    assert_close(out[:, :, 1:-1, 1:-1], inside, rtol=1e-12, atol=1e-12)
    mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
    var = 0.9 * var + 0.1 * x.var((0, 2, 3))
    border = norm.bias - mean * norm.weight / (var + norm.eps).sqrt()
    assert_close(out[:, :, 0, 0], border.expand(3, 4), rtol=1e-12, atol=1e-12)


def bytes_saved_for_backward(module, x):
    """Return the bytes of tensors that a training step stores for backward, each storage once, without parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters(), *module.buffers())}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x)
    out.sum().backward()
    return sum(size for size, _ in seen.values())


def test_orepa_stores_less_for_backward_than_repvgg():
    geometry = Geometry.square(8, 8)
    x = torch.randn(4, 8, 32, 32)
    with repvgg.blocks.training_kernels("eager"):
        kept = {
            name: bytes_saved_for_backward(create_block(name, geometry), x) for name in ("orepa", "repvgg", "conv_bn")
        }
    image = x.numel() * x.element_size()
    assert image <= kept["conv_bn"] < kept["orepa"] < 1.5 * image
    assert kept["repvgg"] >= 2 * image
    assert kept["orepa"] < kept["repvgg"]


@pytest.mark.parametrize("name", BLOCKS)
def test_initial_values_are_as_published(name):
    torch.manual_seed(0)
    geometry = geometry_of(name)
    block = create_block(name, geometry).double().eval()
    if name == "dirac":
        assert_close(block[0].alpha, torch.ones(4, dtype=torch.float64))
        assert_close(block[0].beta, torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0)
    elif name == "doconv":
        x = next(images(geometry))
        assert_close(block[0](x), F.conv2d(x, block[0].weight, None, 1, 1), rtol=1e-12, atol=1e-12)
    elif name == "repmixer":
        x = next(images(geometry))
        assert relative_error(block(x), x) < 1e-3
    elif name == "dbb":
        assert not block["expanded"][0].weight.any()
    elif name == "mobileone":
        assert isinstance(block, BranchSum)
        assert sum(branch.startswith("dense") for branch in block) == 4
    else:
        out = block(next(images(geometry)))
        assert out.isfinite().all()
        assert out.abs().max() > 0


@pytest.mark.parametrize("name", ["dirac", "trivial", "doconv", "orepa"])
def test_strided_1x1_kernel_subsamples_input(name):
    """The function of a strided 1x1 convolution without calling one: oneDNN's gradient of it is faulty."""
    geometry = Geometry.square(4, 6, 2, kernel_size=1)
    layer = build_block(name, geometry)[0]
    for x in images(geometry):
        x.requires_grad_()
        wanted = F.conv2d(x, layer.kernel(), None, 2)
        assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
        read = layer(x).grad_fn.next_functions[0][0]
        assert read.name() == "SliceBackward0"
        assert repvgg.trace(layer).stride == (2, 2)
        (found,) = torch.autograd.grad(layer(x).square().sum(), x)
        (expected,) = torch.autograd.grad(wanted.square().sum(), x)
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
