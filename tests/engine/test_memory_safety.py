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

from repvgg.engine import executable
from repvgg.engine.codegen.jit import SCALAR_ISA, VectorIsa, host_isa
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.kernels.border import BorderKernel
from repvgg.engine.planner.steps import Plan
from tests.engine.helpers import interior, isas
from tests.engine.random_networks import RandomNetwork

BATCH = 5
ALL = range(60)  # seeds of models
WIDTHS = [*isas(), replace(SCALAR_ISA, cpu=host_isa().cpu, features=host_isa().features)]
# Each of the first models with two instruction sets, in turn, so that each of those has two models or three.
FAST = [(seed, WIDTHS[(seed + shift) % len(WIDTHS)]) for seed in range(5) for shift in (0, 1)]
GUARD_BYTES = 1024
NAN = 0x7FC0BEEF


def draw(seed: int) -> RandomNetwork:
    """Draw a network of eight operations."""
    random = np.random.default_rng(seed)
    return RandomNetwork(lambda low, high: int(random.integers(low, high + 1)), 8, seed).eval()


def network_of(seed: int, model: RandomNetwork, isa: VectorIsa) -> CompiledModel:
    """Compile with threads and precision that depend on the seed."""
    shapes = [(BATCH, *model.input_shape)]
    return CompiledModel(read(model, shapes), shapes, isa, 1 + seed % 3, "medium" if seed % 2 else "high")


def assert_right(network: CompiledModel, model: RandomNetwork, x: torch.Tensor) -> None:
    wanted, bounds = model.error_bound(x)
    for found, exact, bound in zip(network(x), wanted, bounds, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=bound)


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


def apart(plan: Plan, arena) -> list[np.ndarray]:
    """Allocate each buffer alone, so that a zone surrounds each."""
    return [arena.zeros(buffer.floats) for buffer in plan.buffers]


def poison(network: CompiledModel) -> None:
    """Write NaN wherever a call has to write; borders that are zeroed once and for all are left."""
    for one in network._executables:
        cleared = {step.target for step in one.plan.steps if isinstance(step.kernel, BorderKernel)}
        for buffer in one.plan.buffers:
            memory, layout = one._memory[buffer.number], buffer.layout
            if buffer in cleared or not layout.has_border:
                memory[:] = np.nan
            else:
                interior(replace(layout, channels=layout.pixel_stride), memory)[...] = np.nan


def check_zones(monkeypatch, seed: int, isa: VectorIsa) -> None:
    zones = Zones()
    monkeypatch.setattr(executable, "Arena", lambda: zones)
    monkeypatch.setattr(executable, "allocate", apart)
    model = draw(seed)
    network = network_of(seed, model, isa)
    torch.manual_seed(seed)
    for batch in (BATCH, 1, 4, 2, 3):
        poison(network)
        assert_right(network, model, torch.randn(batch, *model.input_shape))
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
    executable.Arena, executable.allocate = lambda: fences, apart  # in a forked child: not restored
    model = draw(seed)
    network = network_of(seed, model, isa)
    for batch in (BATCH, 1, 3):
        x = np.random.default_rng(seed).standard_normal((batch, *model.input_shape)).astype(np.float32)
        given = fences.aligned_copy(x.ravel()).reshape(x.shape)
        assert_right(network, model, torch.from_numpy(given))


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
