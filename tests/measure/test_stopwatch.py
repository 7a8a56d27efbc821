"""Both stopwatches, on a fake clock and on fake events."""

import pytest
import torch

from repvgg.measure import CudaEvents, RunSettings, WallClock
from tests.measure.helpers import Clock


class Gpu:
    """A queue of work: calls return immediately, and the work is done when the host waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queued: list[float] = []
        self.waits: list[int] = []  # length of the queue at each wait

    def launch(self, milliseconds: float) -> None:
        self.queued.append(milliseconds)

    def event(self):
        return Event(self)


class Event:
    """Marks a position in the queue."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.position = gpu, None

    def record(self) -> None:
        self.position = len(self.gpu.queued)

    def synchronize(self) -> None:
        self.gpu.waits.append(self.position)

    def elapsed_time(self, end) -> float:
        assert self.gpu.waits[-1] == end.position, "read before it was waited for"
        return sum(self.gpu.queued[self.position : end.position])


def test_wall_clock_times_all_calls_together():
    clock = Clock()
    assert WallClock(clock)(clock.candidate("a", 0.25), 8) == 2.0


@pytest.mark.parametrize(("waits", "times"), [(False, [3]), (True, [1, 2, 3])])
def test_events_measure_milliseconds_between_them(waits, times):
    gpu = Gpu()
    assert CudaEvents(waits, gpu.event)(lambda: gpu.launch(500.0), 3) == 1.5
    assert gpu.waits == times, "latency waits for each result, throughput for the last one"


def test_work_queued_before_does_not_count():
    gpu = Gpu()
    gpu.launch(1e6)
    assert CudaEvents(event=gpu.event)(lambda: gpu.launch(2000.0), 1) == 2.0


def test_device_selects_the_stopwatch():
    assert RunSettings().stopwatch(1) == WallClock()
    assert RunSettings(device="cuda").stopwatch(1) == CudaEvents(waits=True)
    assert RunSettings(device="cuda").stopwatch(8) == CudaEvents(waits=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_events_on_a_gpu():
    images = torch.randn(64, 64, 56, 56, device="cuda")
    assert CudaEvents()(lambda: images @ images, 4) > CudaEvents()(lambda: None, 4)
