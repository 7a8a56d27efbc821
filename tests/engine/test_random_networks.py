"""Random networks against float64, in memory with canaries around each buffer."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repvgg.engine import executable
from repvgg.engine.frontend import read
from tests.engine.emulation import NEEDS_EMULATOR, compile_for, emulated_isas, is_emulated
from tests.engine.helpers import isas
from tests.engine.random_networks import RandomNetwork
from tests.engine.test_memory_safety import WIDTHS, Zones, poison

PRECISIONS = ("highest", "highest", "highest", "high")  # Winograd kernels take ten times as long to compile
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def check(data: st.DataObject, size: int, monkeypatch, widths) -> None:
    def integers(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    model = RandomNetwork(integers, integers(1, size), integers(0, 999)).eval()
    batch, threads = integers(1, 33), integers(1, 2)
    shapes = [(batch, *model.input_shape)]
    zones = Zones()
    with monkeypatch.context() as patch:
        patch.setattr(executable, "Arena", lambda: zones)
        isa, precision = widths[integers(0, len(widths) - 1)], PRECISIONS[integers(0, 3)]
        network = compile_for(read(model, shapes), shapes, isa, threads, precision)
    for count in sorted({batch, integers(1, batch)}, reverse=True):
        if not is_emulated(isa):
            poison(network)
        x = torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(count))
        wanted, bounds = model.error_bound(x)
        for found, exact, bound in zip(network(x), wanted, bounds, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=bound)
        zones.assert_intact()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=30, **QUIET)
@given(data=st.data())
def test_random_networks(monkeypatch, data):
    check(data, 3, monkeypatch, isas()[-1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, **QUIET)
@given(data=st.data())
def test_many_random_networks(monkeypatch, data):
    check(data, 12, monkeypatch, WIDTHS)


@pytest.mark.slow
@NEEDS_EMULATOR
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=50, **QUIET)
@given(data=st.data())
def test_random_networks_in_an_emulator(monkeypatch, data):
    """On ARM64, with up to two threads."""
    check(data, 8, monkeypatch, emulated_isas() or isas())
