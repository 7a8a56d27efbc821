"""Overhead of the stopwatch on a network of one layer: the time that 'repvgg bench' reports, against a bare loop.

    python benchmarks/bench_overhead.py [--rounds 40] [--threads 1]

For each layer, rounds alternate between two timings of the same calls: the stopwatch as ``bench`` uses it (a call
without arguments through ``functools.partial``), and ``model(images)`` in a plain loop between two readings of the
clock. "reported" is how much longer the first one is, as the median over the rounds with quartiles. "idle" is the share
of a whole session, warm-up excluded, that is spent outside of the timed calls. Both should stay below 2%.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor, nn

from repvgg.measure import SpeedProtocol, WallClock, environment, take_samples
from repvgg.measure.timing import quartiles

LAYERS = {
    "Conv2d(3, 8, 3), 32 x 32": (nn.Conv2d(3, 8, 3), (1, 3, 32, 32)),
    "Conv2d(64, 64, 3), 56 x 56": (nn.Conv2d(64, 64, 3), (1, 64, 56, 56)),
    "Linear(512, 1000)": (nn.Linear(512, 1000), (1, 512)),
}
SAMPLE_SECONDS = 0.01  # as in bench


def bare_loop(model: nn.Module, images: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        model(images)
    return time.perf_counter() - start


def reported(model: nn.Module, images: Tensor, rounds: int) -> tuple[float, float, float, float]:
    """Return the quartiles of (stopwatch / bare loop), and the seconds of a call."""
    stopwatch, call = WallClock(), partial(model, images)
    calls = 1
    while bare_loop(model, images, calls) < SAMPLE_SECONDS:
        calls *= 2
    ratios, seconds = [], []
    for index in range(rounds):
        # Alternate the order, so that neither timing always finds the caches as the other one left them.
        timers = [lambda: stopwatch(call, calls), lambda: bare_loop(model, images, calls)]
        found = [timers[(index + position) % 2]() for position in range(2)]
        ours, bare = found if index % 2 == 0 else found[::-1]
        ratios.append(ours / bare)
        seconds.append(bare / calls)
    return (*quartiles(ratios), quartiles(seconds)[1])


def idle(model: nn.Module, images: Tensor, rounds: int) -> float:
    """Return the share of the rounds that is spent outside of the timed calls."""
    inside, marks = [0.0], []

    def stopwatch(call: object, calls: int) -> float:
        seconds = WallClock()(call, calls)  # type: ignore[arg-type]
        inside[0] += seconds
        return seconds

    def mark(_: object) -> None:
        marks.append((time.perf_counter(), inside[0]))

    take_samples({"layer": partial(model, images)}, SpeedProtocol(rounds=rounds), mark, stopwatch=stopwatch)
    (start, before), (end, after) = marks[0], marks[-1]
    return 1.0 - (after - before) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'layer':30} {'us a call':>10} {'reported, q1 median q3':>24} {'idle':>8}")
    with torch.inference_mode():
        for name, (model, shape) in LAYERS.items():
            model, images = model.eval(), torch.randn(shape)
            q1, median, q3, seconds = reported(model, images, arguments.rounds)
            spread = f"{100 * (q1 - 1):+.2f}% {100 * (median - 1):+.2f}% {100 * (q3 - 1):+.2f}%"
            share = idle(model, images, arguments.rounds)
            print(f"{name:30} {1e6 * seconds:10.1f} {spread:>24} {100 * share:7.2f}%")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))


if __name__ == "__main__":
    main()
