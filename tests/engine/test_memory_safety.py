"""Random models in memory that detects out-of-bounds accesses.

Red zones: canaries, NaNs, surround all buffers and weights, and everything that a call has to write is NaN before it.
A write out of bounds changes a canary; a read out of bounds, or of uninitialized memory, makes the output NaN.
Fences: pages without permissions directly before or after a buffer, which end the process.
"""

import ctypes
import faulthandler
import itertools
import mmap
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repvgg.engine import executable
from repvgg.engine.codegen.jit import SCALAR_ISA, VectorIsa, host_isa
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.graph import Conv, ConvGeometry, Gate, Layer, Linear, Pool
from tests.engine.helpers import interior, isas, random_conv

BATCH = 5
ALL = range(60)  # seeds of models
WIDTHS = [*isas(), replace(SCALAR_ISA, cpu=host_isa().cpu, features=host_isa().features)]
# Each of the first models with two instruction sets, in turn, so that each of those has two models or three.
FAST = [(seed, WIDTHS[(seed + shift) % len(WIDTHS)]) for seed in range(5) for shift in (0, 1)]
GUARD_BYTES = 1024
NAN = 0x7FC0BEEF


def numbers(random: np.random.Generator, *shape: int) -> np.ndarray:
    return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def draw_conv(random: np.random.Generator, inputs: int, size: tuple[int, int], seed: int) -> Conv:
    """Draw a convolution with an output of at least one pixel."""
    kernel = int(random.choice([1, 3, 3, 3, 5]))
    padding = (int(random.integers(0, 3)), int(random.integers(0, 3)))
    steps, strides = (int(random.choice([1, 1, 2, 3])) for _ in range(2)), random.choice([1, 1, 2], 2)
    groups = int(random.choice([count for count in range(1, inputs + 1) if inputs % count == 0][:4]))
    outputs = groups * int(random.integers(1, max(2, 71 // groups)))
    geometry = ConvGeometry((kernel, kernel), tuple(map(int, strides)), padding, tuple(steps), groups)
    if min(geometry.output_size(size)) < 1:
        geometry = ConvGeometry((1, 1), groups=groups)
    return random_conv(inputs, outputs, geometry, relu=bool(random.integers(2)), seed=seed)


def draw(seed: int) -> tuple[list[Layer], tuple[int, int, int, int]]:
    """Draw the layers of a model, up to three convolutions (the second is a plain 3x3), and its input shape."""
    random = np.random.default_rng(seed)
    channels, size = int(random.integers(3, 71)), tuple(map(int, random.integers(1, 24, 2)))
    shape = (BATCH, channels, *size)
    layers: list[Layer] = []
    for number in range(int(random.integers(1, 4))):
        conv = draw_conv(random, channels, size, seed)
        if number == 1:
            conv = random_conv(channels, int(random.integers(1, 71)), ConvGeometry((3, 3), padding=(1, 1)), seed=seed)
        layers.append(conv)
        channels, size = conv.weight.shape[0], conv.geometry.output_size(size)
        if random.integers(3) == 0:
            down, up = numbers(random, 5, channels), numbers(random, channels, 5)
            layers.append(Gate("gate", down, numbers(random, 5), up, numbers(random, channels), bool(number)))
    if random.integers(2):
        outputs = int(random.integers(1, 71))
        layers += [Pool("pool"), Linear("linear", numbers(random, outputs, channels), numbers(random, outputs))]
    return layers, shape


def computed(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """Run the layers in PyTorch in float64."""
    for layer in layers:
        x = _computed(layer, x)
        if not isinstance(layer, Pool) and layer.relu:
            x = x.relu()
    return x


def _computed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, Pool):
        return x.mean((2, 3))
    if isinstance(layer, Gate):
        down, first, up, second = map(wide, (layer.down, layer.down_bias, layer.up, layer.up_bias))
        factors = F.linear(F.linear(x.mean((2, 3)), down, first).relu(), up, second).sigmoid()
        return x * factors[:, :, None, None]
    if isinstance(layer, Linear):
        return F.linear(x, wide(layer.weight), wide(layer.bias))
    geometry = layer.geometry
    where = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return F.conv2d(x, wide(layer.weight), wide(layer.bias), *where)


def wide(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).double()


def network_of(seed: int, layers: list[Layer], shape: tuple[int, int, int, int], isa: VectorIsa) -> CompiledModel:
    """Compile with threads and precision that depend on the seed."""
    return CompiledModel(layers, shape, isa, 1 + seed % 3, "medium" if seed % 2 else "high")


def assert_right(network: CompiledModel, layers: list[Layer], x: torch.Tensor) -> None:
    wanted = computed(layers, x.double())
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(network(x).double(), wanted, rtol=0, atol=1e-4 * scale)  # F(5x5) among them


# Red zones


class Zones:
    """Arena with canaries around each array."""

    def __init__(self) -> None:
        self.zones: list[np.ndarray] = []

    def zeros(self, floats: int) -> np.ndarray:
        raw = np.full(4 * floats + 2 * GUARD_BYTES + 64, 0xFF, np.uint8)
        begin = GUARD_BYTES + (-(raw.ctypes.data + GUARD_BYTES)) % 64
        for zone in (raw[begin - GUARD_BYTES : begin], raw[begin + 4 * floats : begin + 4 * floats + GUARD_BYTES]):
            zone.view(np.uint32)[:] = NAN
            self.zones.append(zone.view(np.uint32))
        out = raw[begin : begin + 4 * floats].view(np.float32)
        out[:] = 0
        return out

    def aligned_copy(self, values: np.ndarray) -> np.ndarray:
        out = self.zeros(values.size)
        out[:] = values
        return out

    def assert_intact(self) -> None:
        assert self.zones
        assert all((zone == NAN).all() for zone in self.zones)


def poison(network: CompiledModel) -> None:
    """Write NaN wherever a call has to write; borders, which have to stay zero, are left."""
    for one in network._executables:
        for buffer in one.plan.buffers:
            interior(buffer.layout, one._memory[buffer.number])[...] = np.nan


def check_zones(monkeypatch, seed: int, isa: VectorIsa) -> None:
    zones = Zones()
    monkeypatch.setattr(executable, "Arena", lambda: zones)
    layers, shape = draw(seed)
    network = network_of(seed, layers, shape, isa)
    torch.manual_seed(seed)
    for batch in (BATCH, 1, 4, 2, 3):
        poison(network)
        assert_right(network, layers, torch.randn(batch, *shape[1:]))
        zones.assert_intact()
    assert len(network._executables) == 1


@pytest.mark.parametrize(("seed", "isa"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in FAST])
def test_red_zones(monkeypatch, seed, isa):
    check_zones(monkeypatch, seed, isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", WIDTHS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("seed", ALL)
def test_red_zones_of_many(monkeypatch, seed, isa):
    check_zones(monkeypatch, seed, isa)


def test_red_zones_detect_writes():
    """One float beyond either end."""
    zones = Zones()
    memory = zones.zeros(20)
    zones.assert_intact()
    for place in (-1, 20):
        beyond = (ctypes.c_float * 1).from_address(memory.ctypes.data + 4 * place)
        before, beyond[0] = beyond[0], 1.0
        with pytest.raises(AssertionError):
            zones.assert_intact()
        beyond[0] = before
        assert np.isnan(before)


# Fences


class Fences:
    """Arena whose arrays end at a page without permissions, or begin after one."""

    def __init__(self, behind: bool) -> None:
        self._behind, self._maps = behind, []
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def zeros(self, floats: int) -> np.ndarray:
        page, size = mmap.PAGESIZE, 4 * floats
        room = -(-max(size, 1) // page) * page
        memory = mmap.mmap(-1, room + 2 * page)
        self._maps.append(memory)
        raw = np.frombuffer(memory, np.uint8)
        for place in (0, page + room):
            assert self._protect(raw.ctypes.data + place, page, 0) == 0
        begin = page + (room - -(-size // 64) * 64 if self._behind else 0)
        return raw[begin : begin + size].view(np.float32)

    def aligned_copy(self, values: np.ndarray) -> np.ndarray:
        out = self.zeros(values.size)
        out[:] = values
        return out


def survives(work) -> bool:
    """Whether a forked child survives ``work``."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


fenced = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect of Linux"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def run_fenced(seed: int, isa: VectorIsa, behind: bool) -> None:
    fences = Fences(behind)
    executable.Arena = lambda: fences  # in a forked child: not restored
    layers, shape = draw(seed)
    network = network_of(seed, layers, shape, isa)
    for batch in (BATCH, 1, 3):
        x = np.random.default_rng(seed).standard_normal((batch, *shape[1:])).astype(np.float32)
        given = fences.aligned_copy(x.ravel()).reshape(x.shape)
        assert_right(network, layers, torch.from_numpy(given))


@pytest.mark.parametrize("isa", WIDTHS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
class TestFences:
    pytestmark = fenced

    def test_some(self, isa, behind):
        for seed in (seed for seed, other in FAST if other == isa):
            assert survives(lambda seed=seed: run_fenced(seed, isa, behind)), seed

    @pytest.mark.slow
    def test_many(self, isa, behind):
        for seed in ALL:
            assert survives(lambda seed=seed: run_fenced(seed, isa, behind)), seed


@pytest.mark.parametrize(("behind", "place"), [(True, 32), (False, -1)])
class TestFencesDetect:
    pytestmark = fenced

    def test_reads_and_writes(self, behind, place):
        def touch(write: bool, at: int) -> None:
            memory = Fences(behind).zeros(32)
            there = ctypes.c_float.from_address(memory.ctypes.data + 4 * at)
            there.value = 1.0 if write else there.value

        for write, at in itertools.product((True, False), (place, 5)):
            assert survives(lambda write=write, at=at: touch(write, at)) == (at == 5)
