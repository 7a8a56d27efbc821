import numpy as np
import pytest
import torch

from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import GENERIC_ISAS, compile_to_assembly
from repvgg.engine.graph import ADD, RELU, ConvGeometry
from repvgg.engine.kernels.base import RegisterTile, pack_panels
from repvgg.engine.kernels.conv1x1 import Conv1x1Kernel, select_1x1_tile
from repvgg.engine.runtime.memory import FeatureMapLayout, round_up
from tests.engine.helpers import Guarded, expected, interior, isa_params, isas, random_conv, run, with_border

# (input channels, output channels, image, stride, border of the input, border of the output)
CASES = {
    "contiguous": (33, 70, (5, 6), (1, 1), (0, 0), (0, 0)),
    "fewer pixels than a tile": (24, 20, (1, 2), (1, 1), (0, 0), (0, 0)),
    "one pixel more than tiles": (40, 17, (7, 7), (1, 1), (0, 0), (1, 1)),
    "border of the output": (40, 33, (6, 9), (1, 1), (0, 0), (2, 1)),
    "border of the input": (40, 33, (6, 9), (1, 1), (1, 2), (0, 0)),
    "strides": (19, 40, (9, 8), (2, 3), (0, 0), (1, 0)),
    "blocks of channels": (403, 34, (4, 5), (1, 1), (0, 0), (0, 0)),
    "three blocks of channels": (700, 9, (5, 3), (1, 1), (0, 0), (1, 1)),
    "blocks of pixels": (20, 24, (17, 19), (1, 1), (0, 0), (0, 0)),
    "blocks of both": (420, 20, (13, 14), (1, 1), (0, 0), (0, 0)),
}


def kernel_of(case, isa, epilogue=RELU, tile=None) -> Conv1x1Kernel:
    inputs, outputs, size, stride, before, after = case
    source = FeatureMapLayout(inputs, size, before, round_up(inputs, isa.width))
    rows, columns = (-(-length // step) for length, step in zip(size, stride, strict=True))
    target = FeatureMapLayout(outputs, (rows, columns), after, round_up(outputs, isa.width))
    tile = tile or select_1x1_tile(isa, rows * columns, -(-outputs // isa.width))
    return Conv1x1Kernel(stride, source, target, tile, epilogue, isa.width)


def check(case, kernel, isa, parts=3) -> None:
    """Compare with float64; check canaries around both buffers, and zeros in the border."""
    batch, added = 2, ADD in kernel.epilogue
    conv = random_conv(*case[:2], ConvGeometry((1, 1), case[3]), relu=False)
    source, target = Guarded(batch * kernel.source.image_stride), Guarded(batch * kernel.target.image_stride)
    random = np.random.default_rng(0)
    x, out = interior(kernel.source, source.data), interior(kernel.target, target.data)
    x[...] = random.standard_normal(x.shape)
    out[...] = random.standard_normal(out.shape) if added else np.nan
    wanted = expected(conv, x) + (torch.from_numpy(out.copy()).double() if added else 0)
    run(kernel, source.data, target.data, *pack_panels(conv, isa.width, kernel.tile.nr), batch, isa, parts)
    torch.testing.assert_close(torch.from_numpy(out).double(), wanted.relu(), rtol=2e-6, atol=4e-6)
    source.assert_intact()
    target.assert_intact()
    out[...] = 0
    assert not with_border(kernel.target, target.data)[..., : kernel.target.channels].any()


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("name", CASES)
def test_cases_against_float64(name, isa):
    check(CASES[name], kernel_of(CASES[name], isa), isa)


@pytest.mark.parametrize("name", ["one pixel more than tiles", "blocks of both"])
def test_a_pixel_that_two_tiles_compute_is_added_to_once(name):
    isa = isas()[-1]
    check(CASES[name], kernel_of(CASES[name], isa, (ADD, *RELU)), isa)


@pytest.mark.parametrize(
    "tile", [RegisterTile(1, 1), RegisterTile(3, 2), RegisterTile(7, 1), RegisterTile(2, 4)], ids=str
)
def test_register_tiles(tile):
    isa = isas()[-1]
    case = (21, 5 * isa.width - 3, (4, 5), (1, 1), (0, 0), (0, 0))
    check(case, kernel_of(case, isa, tile=tile), isa)


def test_the_selected_tile_has_no_more_rows_than_pixels():
    for isa in GENERIC_ISAS.values():
        for pixels in (1, 2, 5, 49, 196):
            tile = select_1x1_tile(isa, pixels, 64)
            assert tile.mr <= pixels
            assert tile.registers <= isa.registers


@pytest.mark.parametrize("name", GENERIC_ISAS)
def test_selected_tiles_fit_the_registers(name):
    """No vector is spilled to the stack, on processors that this machine need not be."""
    isa = GENERIC_ISAS[name]
    case = (128, 12 * isa.width, (14, 14), (1, 1), (0, 0), (1, 1))
    text = compile_to_assembly(build_module(kernel_of(case, isa).emit("kernel")), isa)
    assert any(word in text for word in ("vfmadd", "fmla", "mulps"))
    assert "Spill" not in text
