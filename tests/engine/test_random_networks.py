"""Random networks against float64, in an arena with canaries around it that is full of NaN before each run."""

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from repvgg.engine import executable
from repvgg.engine.frontend import read
from tests.engine.emulation import NEEDS_EMULATOR, compile_for, emulated_isas, is_emulated
from tests.engine.helpers import isas
from tests.engine.random_networks import RandomNetwork
from tests.engine.test_memory_safety import WIDTHS, Zones, poison

PRECISIONS = ("highest", "highest", "highest", "high")  # Winograd kernels take ten times as long to compile
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
FAST_EXAMPLES, FAST_NETWORKS = 20, 5
SLOW_BLOCKS, BLOCK_EXAMPLES = 20, 50


class Several(nn.Module):
    """Networks side by side, each with an input of its own: one compilation for all of them."""

    def __init__(self, networks: list[RandomNetwork]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *images: torch.Tensor) -> list[list[torch.Tensor]]:
        return [network(x) for network, x in zip(self.networks, images, strict=True)]


def check(data: st.DataObject, size: int, monkeypatch, widths, count: int | None = None) -> None:
    """Check a network, or ``count`` of them side by side."""

    def integers(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    networks = [RandomNetwork(integers, integers(1, size), integers(0, 999)).eval() for _ in range(count or 1)]
    batch, threads = integers(1, 33), integers(1, 2)
    shapes = [(batch, *network.input_shape) for network in networks]
    model = networks[0] if count is None else Several(networks)
    zones = Zones()
    with monkeypatch.context() as patch:
        patch.setattr(executable, "Arena", lambda: zones)
        isa, precision = widths[integers(0, len(widths) - 1)], PRECISIONS[integers(0, 3)]
        compiled = compile_for(read(model, shapes), shapes, isa, threads, precision)
    for images in sorted({batch, integers(1, batch)}, reverse=True):
        if not is_emulated(isa):
            poison(compiled)
        generator = torch.Generator().manual_seed(images)
        inputs = [torch.randn(images, *network.input_shape, generator=generator) for network in networks]
        found = compiled(*inputs)
        for network, x, outputs in zip(networks, inputs, [found] if count is None else found, strict=True):
            wanted, bounds = network.error_bound(x)
            for one, exact, bound in zip(outputs, wanted, bounds, strict=True):
                torch.testing.assert_close(one.double(), exact, rtol=0, atol=bound)
        zones.assert_intact()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=FAST_EXAMPLES, **QUIET)
@given(data=st.data())
def test_random_networks(monkeypatch, data):
    check(data, 2, monkeypatch, isas()[-1:], FAST_NETWORKS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(SLOW_BLOCKS))
def test_many_random_networks(monkeypatch, block):
    @seed(block)
    @settings(max_examples=BLOCK_EXAMPLES, **QUIET)
    @given(data=st.data())
    def some(data):
        check(data, 12, monkeypatch, WIDTHS)

    some()


@pytest.mark.slow
@NEEDS_EMULATOR
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=50, **QUIET)
@given(data=st.data())
def test_random_networks_in_an_emulator(monkeypatch, data):
    """On ARM64, with up to two threads."""
    check(data, 8, monkeypatch, emulated_isas() or isas())
