"""Both stopwatches, on a clock and on events that the test moves by hand."""

import pytest
import torch

from repvgg.measure import CudaEvents, RunSettings, WallClock
from tests.measure.helpers import Clock


class Gpu:
    """A queue of work: calls return at once, the work is done when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queued: list[float] = []
        self.waits: list[int] = []  # how much work was queued each time that somebody waited

    def launch(self, milliseconds: float) -> None:
        self.queued.append(milliseconds)

    def event(self):
        return Event(self)


class Event:
    """Takes its place in the queue, and the time when the queue has come there."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.place = gpu, None

    def record(self) -> None:
        self.place = len(self.gpu.queued)

    def synchronize(self) -> None:
        self.gpu.waits.append(self.place)

    def elapsed_time(self, end) -> float:
        assert self.gpu.waits[-1] == end.place, "asked for before it was waited for"
        return sum(self.gpu.queued[self.place : end.place])


def test_the_wall_clock_reads_all_calls_together():
    clock = Clock()
    assert WallClock(clock)(clock.candidate("a", 0.25), 8) == 2.0


@pytest.mark.parametrize(("waits", "times"), [(False, [3]), (True, [1, 2, 3])])
def test_events_take_milliseconds_between_them(waits, times):
    gpu = Gpu()
    assert CudaEvents(waits, gpu.event)(lambda: gpu.launch(500.0), 3) == 1.5
    assert gpu.waits == times, "latency waits for each answer, throughput for the last one"


def test_what_was_queued_before_is_not_counted():
    gpu = Gpu()
    gpu.launch(1e6)
    assert CudaEvents(event=gpu.event)(lambda: gpu.launch(2000.0), 1) == 2.0


def test_the_device_decides_on_the_stopwatch():
    assert RunSettings().stopwatch(1) == WallClock()
    assert RunSettings(device="cuda").stopwatch(1) == CudaEvents(waits=True)
    assert RunSettings(device="cuda").stopwatch(8) == CudaEvents(waits=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_events_of_a_real_gpu():
    images = torch.randn(64, 64, 56, 56, device="cuda")
    assert CudaEvents()(lambda: images @ images, 4) > CudaEvents()(lambda: None, 4)
