"""Autotuning: measure the cost model's best candidates for each convolution on this machine, and cache the fastest.

A convolution is measured alone, on buffers like those of the network: first the candidates for each region of the
image, then the best partitions of the whole image and the direct kernel. Candidates are measured in turns, so that a
transient slowdown of the machine affects all of them equally, and slow ones drop out early.

The result is cached on disk with the machine code, one file for each convolution (``selection_cache.py``).
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence
from typing import final

import numpy as np

from repvgg.engine.executable import Executable
from repvgg.engine.graph import RELU, Conv, Graph, Shape, chain, infer_shapes
from repvgg.engine.kernels.base import placeholder_weights
from repvgg.engine.planner.algorithms import (
    ConvAlgorithm,
    ConvProblem,
    Selector,
    Target,
    TileRegion,
    WinogradRegion,
    supports_winograd,
)
from repvgg.engine.planner.cost_model import candidate_algorithms, costed_regions
from repvgg.engine.planner.plan import BatchChunks, assemble, chunk_batch, conv_problems
from repvgg.engine.planner.selection_cache import read_cached, select_cached, write_cached
from repvgg.engine.runtime.memory import view_input
from repvgg.engine.runtime.thread_pool import ThreadPool

_MAX_PARTITIONS = 4  # of the image
_MAX_CANDIDATES = 6  # for each region
_MAX_WEIGHT_FLOATS = 2**26  # 256 MiB for one candidate; those compared are in memory at the same time
_MIN_REGION_SHARE = 0.1  # of an algorithm's estimate; the cost model decides on smaller regions
# A turn runs the layer this often, each time with separate weights; only the last run is timed. The first one leaves
# the caches in the state that the preceding layer of a network would, and wakes the threads.
_REPEATS = 2
# At small batches, the other layers of a network evict all weights of a layer between two calls: turns read 32 MiB.
_SMALL_BATCH = 4  # images
_EVICTION_FLOATS = 2**23
# Rounds of (turns, limit): candidates that take more than ``limit`` times as long as the fastest drop out afterwards.
_REGION_ROUNDS = ((2, 1.3), (3, 1.1), (6, 1.0))
_FINAL_ROUNDS = ((4, 1.1), (8, 1.0))


def autotune(graph: Graph, input_shapes: Sequence[Shape], target: Target, pool: ThreadPool) -> Selector:
    """Measure the convolutions of a network that have several candidates, and return a selector of the fastest.

    For convolutions that were not measured, the selector uses the cost model.

    Args:
        graph: see :func:`repvgg.engine.frontend.read`.
        input_shapes: (N, C, H, W) of each input, where N is the largest batch.
        target: what to plan for.
        pool: the threads to measure with.
    """
    batch = input_shapes[0][0]
    shapes = infer_shapes(graph, [(height, width) for _, _, height, width in input_shapes])
    problems = conv_problems(graph, shapes, chunk_batch(graph, shapes, batch), batch)
    found: dict[ConvProblem, ConvAlgorithm | None] = {}
    for problem in dict.fromkeys(problems):  # equal layers once
        if problem is None or not supports_winograd(problem, target):
            continue
        cached = read_cached(problem, target)
        if cached is None:
            cached = (_fastest_algorithm(problem, target, pool),)
            write_cached(problem, target, cached[0])
        found[problem] = cached[0]

    def select(problem: ConvProblem, target: Target) -> ConvAlgorithm | None:
        return found[problem] if problem in found else select_cached(problem, target)

    return select


def _fastest_algorithm(problem: ConvProblem, target: Target, pool: ThreadPool) -> ConvAlgorithm | None:
    """Find the fastest algorithm by measuring; None is the direct kernel."""
    bench = ConvBench(problem, target, pool)
    candidates = [one for one in candidate_algorithms(problem, target) if _fits_memory(one, problem)]
    shortlist = heapq.nsmallest(_MAX_PARTITIONS, candidates, key=lambda algorithm: algorithm.estimated_cycles)
    regions = {
        region.tiles
        for algorithm in shortlist
        for region in algorithm.regions
        if region.estimated_cycles > _MIN_REGION_SHARE * algorithm.estimated_cycles
    }
    fastest = {tiles: bench.fastest_region(tiles) for tiles in sorted(regions)}
    tuned = [
        ConvAlgorithm(tuple(fastest.get(region.tiles, region) for region in algorithm.regions))
        for algorithm in shortlist
    ]
    return bench.fastest([*dict.fromkeys([*tuned, *shortlist[:1]]), None], _FINAL_ROUNDS)


def _fits_memory(algorithm: ConvAlgorithm, problem: ConvProblem) -> bool:
    elements = sum(region.winograd.filter_elements(on_the_fly=region.on_the_fly) for region in algorithm.regions)
    return elements * problem.num_filters <= _MAX_WEIGHT_FLOATS


@final
class _Trial:
    """One candidate and the durations of its turns."""

    def __init__(self, algorithm: ConvAlgorithm | None, executable: Executable, batch: int) -> None:
        self.algorithm, self._executable, self._batch = algorithm, executable, batch
        self._seconds: list[float] = []

    @property
    def score(self) -> float:
        """The mean of the faster half of its turns, in seconds: a busy machine only ever adds to a duration."""
        fast = sorted(self._seconds)[: -(-len(self._seconds) // 2)]
        return sum(fast) / len(fast)

    def turn(self, pool: ThreadPool) -> None:
        """Time one run of the layer, after an untimed one; see :data:`_REPEATS`."""
        steps = self._executable.step_addresses
        first_timed = 1 + len(steps) // _REPEATS  # after the input reorder, which is not repeated
        pool.run(steps.start, first_timed, self._batch)
        start = time.perf_counter()
        pool.run(steps[first_timed], len(steps) - first_timed, self._batch)
        self._seconds.append(time.perf_counter() - start)


@final
class ConvBench:
    """Measures candidates for one convolution."""

    def __init__(self, problem: ConvProblem, target: Target, pool: ThreadPool) -> None:
        self._problem, self._target, self._pool = problem, target, pool
        geometry = problem.geometry
        weight_shape = (problem.out_channels, problem.group_in_channels, *geometry.kernel)
        weight = np.broadcast_to(np.float32(0), weight_shape)  # only its shape matters: placeholders are packed
        conv = Conv(weight, np.zeros(problem.out_channels, np.float32), geometry, RELU)
        self._graph = chain([conv], problem.in_channels)
        axes = zip(
            problem.output_size, geometry.stride, geometry.kernel, geometry.dilation, geometry.padding, strict=True
        )
        height, width = (
            count * stride + dilation * (kernel - 1) - 2 * pad for count, stride, kernel, dilation, pad in axes
        )
        image = np.random.default_rng(0).standard_normal((1, problem.in_channels, height, width), np.float32)
        self._images = np.broadcast_to(image, (problem.batch, *image.shape[1:]))
        # Written, not just allocated: unwritten pages all map to one page of zeros, which evicts nothing.
        self._evicting = np.ones(_EVICTION_FLOATS, np.float32) if problem.batch <= _SMALL_BATCH else None

    def fastest_region(self, tiles: TileRegion) -> WinogradRegion:
        """Measure the candidates of a region with the best estimates, of each schedule, and return the fastest."""
        # Of each schedule, because the estimates are least comparable between schedules.
        by_schedule: dict[str, list[WinogradRegion]] = {}
        for region in costed_regions(tiles, self._problem, self._target):
            by_schedule.setdefault(region.schedule, []).append(region)
        per_schedule = _MAX_CANDIDATES // len(by_schedule) + 1
        best = [heapq.nsmallest(per_schedule, regions, key=_estimate) for _, regions in sorted(by_schedule.items())]
        shortlist = heapq.nsmallest(_MAX_CANDIDATES, itertools.chain(*best), key=_estimate)
        fastest = self.fastest([ConvAlgorithm((region,)) for region in shortlist])
        assert fastest is not None  # the direct kernel was not among them
        return fastest.regions[0]

    def fastest(
        self, algorithms: Sequence[ConvAlgorithm | None], rounds: Sequence[tuple[int, float]] = _REGION_ROUNDS
    ) -> ConvAlgorithm | None:
        """Measure algorithms in turns; slow ones drop out after each round."""
        trials = [self._trial(algorithm) for algorithm in algorithms]
        for turns, limit in rounds:
            for trial in trials * turns:
                if self._evicting is not None:
                    self._evicting.sum()
                trial.turn(self._pool)
            fastest = min(trial.score for trial in trials)
            self._pool.quiesce()  # a worker may still be reading a step table, which is freed with its trial
            trials = [trial for trial in trials if trial.score <= limit * fastest]
        return min(trials, key=lambda trial: trial.score).algorithm

    def measure(self, algorithms: Sequence[ConvAlgorithm | None], turns: int) -> list[float]:
        """Measure algorithms in turns; return the duration of each in seconds, the mean of the faster half."""
        trials = [self._trial(algorithm) for algorithm in algorithms]
        for trial in trials * turns:
            if self._evicting is not None:
                self._evicting.sum()
            trial.turn(self._pool)
        self._pool.quiesce()  # as above
        return [trial.score for trial in trials]

    def _trial(self, algorithm: ConvAlgorithm | None) -> _Trial:
        shape = self._images.shape
        plan = assemble(
            self._graph,
            [shape],
            infer_shapes(self._graph, [shape[2:]]),
            BatchChunks(0, shape[0]),  # the problem's batch is what a chunk holds
            [algorithm],
            self._target.isa,
            placeholder_weights,
            _REPEATS,
        )
        executable = Executable(plan)
        executable.set_inputs([view_input(self._images, self._problem.in_channels)])
        steps = executable.step_addresses
        self._pool.run(steps.start, len(steps), self._problem.batch)
        return _Trial(algorithm, executable, self._problem.batch)


def _estimate(region: WinogradRegion) -> float:
    return region.estimated_cycles
