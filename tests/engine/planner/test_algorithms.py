import math

import pytest
import torch
from torch import nn

import repvgg.engine
from repvgg import create_model
from repvgg.engine.codegen.jit import GENERIC
from repvgg.engine.compiled_model import Network
from repvgg.engine.frontend import read
from repvgg.engine.graph import ConvGeometry
from repvgg.engine.kernels.direct_conv import ConvKernel
from repvgg.engine.planner.algorithms import Machine, Size, every_cover, form_of
from repvgg.engine.planner.cost_model import choose, costed_parts, every_choice
from repvgg.engine.planner.plan import plan
from repvgg.engine.winograd.convolution import WinogradFused, WinogradProduct
from repvgg.errors import UsageError
from repvgg.measure import walk
from tests.engine.helpers import isas

PADDED = ConvGeometry((3, 3), padding=(1, 1))
STACK = 2**21  # bytes that a thread surely has on Linux


@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("batch", [1, 7, 16])
@pytest.mark.parametrize(("channels", "image"), [(48, (56, 56)), (96, (28, 28)), (192, (14, 14)), (640, (45, 45))])
def test_large_layers_go_by_winograd_within_registers_and_stack(channels, image, batch, name):
    isa = GENERIC[name]
    choice = choose(PADDED, Size(channels, channels, image, batch), Machine(isa, 2))
    assert choice is not None
    for part in choice.parts:
        tiling, tile = part.tiling, part.tile
        assert tile.registers <= isa.registers
        assert tiling.piece % tile.pixels == 0 or (any(part.form.tails) and tiling.pieces == 1)
        assert tiling.tiles >= tiling.real == batch * tiling.of_image
        floats = tile.vectors * isa.width + (channels if part.way == "fused" else 0)
        assert 4 * part.form.places * (tiling.piece * floats + 32) <= STACK


def end_of(run):
    start, length, count, tail = run
    return start + length * count - (length - tail if tail else 0)


@pytest.mark.parametrize("image", [(14, 14), (28, 28), (13, 7), (9, 18), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_parts_cover_each_pixel_once(precision, stride, image):
    size, machine = Size(64, 64, image, 4), Machine(GENERIC["avx512"], 2, precision)
    covers = list(every_cover(size, stride, machine))
    assert len(covers) >= 4
    for rectangles in covers:
        ends = [[end_of(run) for run in runs] for runs in zip(*rectangles, strict=True)]
        covered = torch.zeros(max(ends[0]), max(ends[1]))
        for ((top, *_), (left, *_)), bottom, right in zip(rectangles, *ends, strict=True):
            covered[top:bottom, left:right] += 1
        assert (covered == 1).all()
        assert all(end >= length for end, length in zip(covered.shape, image, strict=True))
    for choice in every_choice(size, stride, machine):
        assert tuple(part.rectangle for part in choice.parts) in covers
        assert choice.end == tuple(max(part.end[axis] for part in choice.parts) for axis in (0, 1))


@pytest.mark.parametrize("image", [(14, 14), (28, 28), (56, 56), (7, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_no_cover_is_left_out_that_would_be_faster(stride, image):
    """The bound below which no cover can be is below each of them."""
    size, machine = Size(48, 64, image, 4), Machine(GENERIC["avx512"], 2, "medium")
    everything = [
        sum(
            min((part.cycles for part in costed_parts(piece, size, stride, machine)), default=math.inf)
            for piece in cover
        )
        for cover in every_cover(size, stride, machine)
    ]
    assert min(choice.cycles for choice in every_choice(size, stride, machine)) == min(everything)


@pytest.mark.parametrize(("precision", "channels", "most"), [("high", 16, 4.8), ("high", 400, 23), ("medium", 100, 26)])
def test_how_much_is_lost_grows_with_the_square_root_of_the_channels(precision, channels, most):
    size, machine = Size(channels, 64, (28, 28), 4), Machine(GENERIC["avx512"], 2, precision)
    losses = {form_of(rectangle, 1).loss for cover in every_cover(size, 1, machine) for rectangle in cover}
    assert 0.7 * most < max(losses) <= most


def test_the_highest_precision_is_direct():
    assert choose(PADDED, Size(192, 192, (14, 14), 1), Machine(GENERIC["avx512"], 1, "highest")) is None


def test_each_precision_computes_and_another_is_refused():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(4, 16, 15, 15)
    wanted = model.double()(x.double()).detach()
    model.float()
    for precision, limit in (("highest", 2e-6), ("high", 4e-6), ("medium", 1e-4)):
        network = repvgg.engine.compile(model, x.shape, 1, precision=precision)
        torch.testing.assert_close(network(x).double(), wanted, rtol=0, atol=limit)
    with pytest.raises(UsageError, match="'highest', 'high', 'medium', not 'low'"):
        repvgg.engine.compile(model, x.shape, precision="low")


NEVER = {
    "stride 3": (ConvGeometry((3, 3), (3, 3), (1, 1)), 96, 96),
    "stride 2 one way": (ConvGeometry((3, 3), (2, 1), (1, 1)), 96, 96),
    "dilated": (ConvGeometry((3, 3), padding=(2, 2), dilation=(2, 2)), 96, 96),
    "1x1": (ConvGeometry((1, 1)), 96, 96),
    "three channels": (PADDED, 3, 96),
    "groups of no whole vectors": (ConvGeometry((3, 3), padding=(1, 1), groups=4), 96, 100),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_winograd_does_not_take(name):
    geometry, inputs, outputs = NEVER[name]
    assert choose(geometry, Size(inputs, outputs, (28, 28), 1, geometry.groups), Machine(GENERIC["avx512"])) is None


@pytest.mark.parametrize("name", ["repvgg_t0", "repvgg_t1", "repvgg_t2", "repvgg_a0"])
def test_rows_of_the_table_have_a_plan(name):
    """With weights of zeros, which take no time to make."""
    with torch.device("meta"):
        model = create_model(name, plain=True)
    small = model.spec.input_size if model.spec.input_size < 64 else 64
    steps = plan(read(_zeros(model)), (2, 3, small, small), Machine(isas()[-1])).steps
    convs = {step.name for step in steps if isinstance(step.kernel, (ConvKernel, WinogradFused, WinogradProduct))}
    assert {name for name, module in model.named_modules() if type(module) is nn.Conv2d and ".se" not in name} <= convs


def _zeros(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def test_a_profile_names_each_step_and_counts_what_is_multiplied():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    network = Network(read(model), (2, 3, 16, 16), isas()[-1])
    x = torch.randn(2, 3, 16, 16)
    steps = network.profile(x, repeats=2)
    assert [step.name for step in steps] == ["input", "0", "2"]
    assert sum(step.muls for step in steps) == walk(model, x).macs
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-5)
    lines = str(steps).splitlines()
    assert lines[0].split() == ["layer", "how", "us", "share", "GFLOP/s"]
    assert [line.split()[0] for line in lines[1:]] == ["input", "0", "2", "all"]
    assert "direct, tiles of" in lines[2]
