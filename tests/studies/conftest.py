"""Studies of speed without real networks, clocks or charts."""

import pytest

from repvgg.measure import RunSettings
from repvgg.studies import base, network_speed
from tests.studies.helpers import SECONDS, FakeStopwatch, Tiny, fake_counts


@pytest.fixture
def quick(monkeypatch):
    """Replace every network by one that takes the paper's time; return how to set another stopwatch."""

    def use(stopwatch):
        monkeypatch.setattr(RunSettings, "stopwatch", lambda settings, batch: stopwatch)
        return stopwatch

    monkeypatch.setattr(network_speed, "deployed", lambda name: Tiny(SECONDS[name], name))
    monkeypatch.setattr(network_speed, "count_cell", fake_counts)
    monkeypatch.setattr(base, "write_chart", lambda folder, chart: "<svg/>")  # drawing would be most of the time
    use(FakeStopwatch())
    return use
