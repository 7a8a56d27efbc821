import numpy as np
import pytest
import torch

from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import GENERIC_ISAS, compile_to_assembly
from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.base import RegisterTile, pack_panels
from repvgg.engine.kernels.direct_conv import DirectConvKernel, select_register_tile
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from tests.engine.helpers import Guarded, expected, interior, isa_params, isas, random_conv, run, with_border

# (input channels, output channels, image, geometry)
CASES = {
    "3x3": (16, 32, (9, 11), ConvGeometry((3, 3), padding=(1, 1))),
    "odd channels": (5, 37, (8, 13), ConvGeometry((3, 3), padding=(1, 1))),
    "one channel": (1, 1, (3, 3), ConvGeometry((3, 3), padding=(1, 1))),
    "one pixel": (17, 5, (1, 1), ConvGeometry((3, 3), padding=(1, 1))),
    "stride 2, odd image": (3, 48, (15, 17), ConvGeometry((3, 3), (2, 2), (1, 1))),
    "stride 2, even image": (32, 20, (14, 14), ConvGeometry((3, 3), (2, 2), (1, 1))),
    "without padding": (8, 16, (7, 9), ConvGeometry((3, 3))),
    "more padding than kernel": (4, 16, (5, 5), ConvGeometry((3, 3), padding=(3, 2))),
    "dilated": (6, 16, (13, 12), ConvGeometry((3, 3), padding=(2, 4), dilation=(2, 4))),
    "1x1": (33, 65, (5, 6), ConvGeometry((1, 1))),
    "1x1, stride 2": (16, 16, (7, 7), ConvGeometry((1, 1), (2, 2))),
    "1x3": (4, 24, (6, 7), ConvGeometry((1, 3), padding=(0, 1))),
    "5x5, stride 2 and 1": (4, 16, (9, 9), ConvGeometry((5, 5), (2, 1), (2, 2))),
    "2x2": (4, 16, (4, 4), ConvGeometry((2, 2))),
    "groups of whole vectors": (32, 64, (6, 7), ConvGeometry((3, 3), padding=(1, 1), groups=2)),
    "groups of odd channels": (15, 21, (6, 7), ConvGeometry((3, 3), padding=(1, 1), groups=3)),
    "depthwise": (19, 19, (6, 7), ConvGeometry((3, 3), padding=(1, 1), groups=19)),
    "many channels": (130, 200, (4, 5), ConvGeometry((3, 3), padding=(1, 1))),
}


def kernel_of(conv, size, isa, pixel_stride=None, border=(2, 1), tile=None) -> DirectConvKernel:
    outputs, inputs = conv.weight.shape[0], conv.weight.shape[1] * conv.geometry.groups
    source = FeatureMapLayout(inputs, size, conv.geometry.padding, pixel_stride or round_up(inputs, isa.width))
    target = FeatureMapLayout(outputs, conv.geometry.output_size(size), border, round_up(outputs, isa.width))
    vectors = -(-outputs // conv.geometry.groups // isa.width)
    tile = tile or select_register_tile(isa, target.size[1], vectors)
    return DirectConvKernel(conv.geometry, source, target, tile, conv.epilogue, isa.width)


def check(conv, kernel, isa, batch=2, parts=1, seed=0) -> None:
    """Compare the kernel with float64; check canaries around both buffers, and zeros in border and padding channels."""
    source, target = Guarded(batch * kernel.source.image_stride), Guarded(batch * kernel.target.image_stride)
    x = interior(kernel.source, source.data)
    x[...] = np.random.default_rng(seed).standard_normal(x.shape)
    out = interior(kernel.target, target.data)
    out[...] = np.nan
    weights, bias = pack_panels(conv, isa.width, kernel.tile.nr)
    run(kernel, source.data, target.data, weights, bias, batch, isa, parts)
    torch.testing.assert_close(torch.from_numpy(out).double(), expected(conv, x), rtol=2e-6, atol=4e-6)
    source.assert_intact()
    target.assert_intact()
    out[...] = 0
    assert not with_border(kernel.target, target.data).any()


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("name", CASES)
def test_geometries_against_float64(name, isa):
    inputs, outputs, size, geometry = CASES[name]
    conv = random_conv(inputs, outputs, geometry)
    check(conv, kernel_of(conv, size, isa), isa)


@pytest.mark.parametrize(
    "tile",
    [RegisterTile(1, 1), RegisterTile(3, 2), RegisterTile(7, 3), RegisterTile(4, 5), RegisterTile(16, 1)],
    ids=str,
)
def test_register_tiles(tile):
    isa = isas()[-1]
    conv = random_conv(7, 7 * isa.width - 3, ConvGeometry((3, 3), padding=(1, 1)))
    check(conv, kernel_of(conv, (5, 16), isa, tile=tile), isa)


@pytest.mark.parametrize("isa", isa_params()[-2:])
@pytest.mark.parametrize("parts", [2, 7, 1000])
def test_units_may_run_in_any_order(parts, isa):
    conv = random_conv(6, 4 * isa.width + 6, ConvGeometry((3, 3), padding=(1, 1), groups=2))
    check(conv, kernel_of(conv, (5, 6), isa), isa, batch=3, parts=parts)


def test_without_relu_and_unpadded_channels():
    isa = isas()[-1]
    conv = random_conv(3, 10, ConvGeometry((3, 3), padding=(1, 1)), relu=False)
    check(conv, kernel_of(conv, (6, 6), isa, pixel_stride=3), isa)


def test_relu_passes_nan_on():
    isa = isas()[-1]
    conv = random_conv(1, 4, ConvGeometry((1, 1)))
    kernel = kernel_of(conv, (1, 1), isa, border=(0, 0))
    source, target = Guarded(kernel.source.image_stride, np.nan), Guarded(kernel.target.image_stride)
    run(kernel, source.data, target.data, *pack_panels(conv, isa.width, kernel.tile.nr), 1, isa)
    assert np.isnan(target.data[:4]).all()


@pytest.mark.parametrize("name", GENERIC_ISAS)
def test_selected_tiles_fit_the_registers(name):
    """No vector is spilled to the stack, on processors that this machine need not be."""
    isa = GENERIC_ISAS[name]
    conv = random_conv(48, 6 * isa.width, ConvGeometry((3, 3), padding=(1, 1)))
    text = compile_to_assembly(build_module(kernel_of(conv, (28, 28), isa).emit("kernel")), isa)
    assert any(word in text for word in ("vfmadd", "fmla", "mulps"))
    assert "Spill" not in text
