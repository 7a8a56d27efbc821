"""Calibration: fit the costs of the cost model to this processor, once, where they were fitted on another one.

Some convolutions are measured with several algorithms each, as autotuning does. Groups of costs are then scaled so that
estimates are proportional to the durations: the scales minimize ::

    Σ (log duration - log estimate - mean)² / NOISE² + Σ (log scale)² / SPREAD²

by coordinate descent. The second sum keeps a scale near 1 where the measurements say little about it. The
fit is kept only if it is closer, and chooses algorithms that are as fast among those measured, or faster.

The result is kept on disk by processor, instruction set and number of threads. ``REPVGG_CALIBRATE=off`` switches
calibration off; without a cache folder, there is none either.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, TypeAlias, final

from repvgg import _cache
from repvgg.engine.codegen.disk_cache import TUNING_SUFFIX, entry_key, read_entry, write_entry
from repvgg.engine.codegen.jit import VectorIsa, host_isa
from repvgg.engine.graph import ConvGeometry
from repvgg.engine.planner.algorithms import ConvAlgorithm, ConvProblem, Target, WinogradRegion, image_partitions
from repvgg.engine.planner.autotune import ConvBench
from repvgg.engine.planner.cost_model import costed_regions, estimate_cycles, estimate_direct_cycles
from repvgg.engine.planner.machine_costs import FITTED_PROCESSORS, MachineCosts, machine_costs
from repvgg.engine.planner.selection_cache import cost_model_version
from repvgg.engine.runtime.thread_pool import ThreadPool
from repvgg.measure.settings import processor_name

CALIBRATE_VARIABLE = "REPVGG_CALIBRATE"

_PADDED = ConvGeometry((3, 3), padding=(1, 1))
#: (channels, height and width, images): from large maps with few channels to small ones whose weights come from memory.
PROBLEMS = tuple(
    ConvProblem(_PADDED, channels, channels, (size, size), images)
    for channels, size, images in ((64, 56, 1), (256, 14, 1), (128, 28, 4))
)
_TURNS = 8  # runs of each candidate, in turns
# With fewer, transforms of filters on the fly are no candidates: each takes 0.3 s to compile.
_ON_THE_FLY_CHANNELS = 256

#: Costs that are scaled together, because few measurements tell them apart.
_GROUPS: tuple[tuple[str, ...], ...] = (
    ("input_transform_cycles",),
    ("output_transform_cycles",),
    ("direct_factor",),
    ("k_block_cycles", "accumulate_cycles"),
    ("on_the_fly_cycles", "interleaved_cycles"),
    ("memory_bytes_per_cycle",),
    ("l3_reread_bytes_per_cycle", "l2_reread_bytes_per_cycle"),
    (
        *("tiles_write_bytes_per_cycle", "tiles_shared_bytes_per_cycle", "tiles_prefetched_bytes_per_cycle"),
        *("tiles_l3_read_bytes_per_cycle", "tiles_memory_read_bytes_per_cycle"),
    ),
)
_NOISE, _SPREAD = 0.08, 0.35  # of logarithms
_EQUAL = 0.02  # difference of logarithms of durations that measurements do not tell from 0
_STEPS = (0.3, 0.1, 0.03)  # of the descent, in logarithms
_MAX_SWEEPS = 20
MAX_SCALE = 8.0  # of a cost in a file, and its inverse: others are no measurements

Algorithms: TypeAlias = Sequence[ConvAlgorithm | None]


@final
@dataclass(frozen=True)
class Measurement:
    """The durations of some algorithms for a convolution, in seconds."""

    problem: ConvProblem
    algorithms: tuple[ConvAlgorithm | None, ...]
    seconds: tuple[float, ...]

    def estimates(self, target: Target) -> list[float]:
        return [_estimate(algorithm, self.problem, target) for algorithm in self.algorithms]


def calibrated_costs(
    isa: VectorIsa,
    threads: int,
    pool: ThreadPool,
    measure: Callable[[Target, ThreadPool], list[Measurement]] | None = None,
) -> MachineCosts | None:
    """Return the costs of this processor; None if those of :func:`machine_costs` are for it, or calibration is off.

    They are read from the disk; if they are not there, a calibration takes some seconds. A file that is broken, or has
    absurd costs, is measured again; of two processes that calibrate at once, the second uses the file of the first.

    Args:
        isa: what to generate code for.
        threads: of the pool.
        pool: the threads to measure with.
        measure: replaces :func:`measure_problems` in tests.
    """
    if not is_calibration_wanted(isa):
        return None
    prior = machine_costs(isa)
    machine = (isa.name, isa.cpu, isa.features, processor_name(), str(threads))
    key = entry_key("calibration", *machine, repr(prior), cost_model_version())
    found = _read(key, prior)
    if found is None:
        target = Target(isa, threads, costs=prior)
        measured = fit_costs((measure or measure_problems)(target, pool), target)
        found = _read(key, prior)
        if found is None:
            found = measured
            write_entry(key, TUNING_SUFFIX, json.dumps(asdict(found)).encode())
    return found


def is_calibration_wanted(isa: VectorIsa) -> bool:
    """Return whether costs are to be fitted: none are built in for this processor, and the result can be kept."""
    if os.environ.get(CALIBRATE_VARIABLE, "").lower() in ("off", "0", "no", "false"):
        return False
    # Without a cache, each process would calibrate. Code for another processor tells nothing about its speed there.
    has_cache = _cache.cache_folder("engine") is not None
    return has_cache and isa == host_isa() and (isa.name, isa.cpu) not in FITTED_PROCESSORS


def _read(key: bytes, prior: MachineCosts) -> MachineCosts | None:
    content = read_entry(key, TUNING_SUFFIX)
    try:
        values = {} if content is None else json.loads(content)
        found = {name: float(values[name]) for name in asdict(prior)}
    except (ValueError, KeyError, TypeError):
        return None
    for name, value in asdict(prior).items():
        if not 1 / MAX_SCALE <= found[name] / value <= MAX_SCALE:  # also false for NaN
            return None
        if isinstance(value, int) and found[name] != value:  # capacities are not scaled
            return None
    scaled: dict[str, Any] = {name: found[name] for group in _GROUPS for name in group}
    return replace(prior, **scaled)


# Measuring


def measure_problems(target: Target, pool: ThreadPool) -> list[Measurement]:
    """Measure :data:`PROBLEMS` with a few algorithms each."""
    measured = []
    for problem in PROBLEMS:
        algorithms = candidates_for(problem, target)
        seconds = ConvBench(problem, target, pool).measure(algorithms, _TURNS)
        measured.append(Measurement(problem, tuple(algorithms), tuple(seconds)))
    return measured


def candidates_for(problem: ConvProblem, target: Target) -> Algorithms:
    """Return the direct kernel, and the best estimates of each schedule, with and without on-the-fly filters."""
    best: dict[tuple[str, bool], WinogradRegion] = {}
    for regions in image_partitions(problem, target):
        if len(regions) > 1:
            continue
        for region in costed_regions(regions[0], problem, target):
            kind = region.schedule, region.on_the_fly
            if region.on_the_fly and problem.in_channels < _ON_THE_FLY_CHANNELS:
                continue
            if kind not in best or region.estimated_cycles < best[kind].estimated_cycles:
                best[kind] = region
    return [None, *(ConvAlgorithm((region,)) for _, region in sorted(best.items(), key=lambda one: one[0]))]


# Fitting


def fit_costs(measured: Sequence[Measurement], target: Target) -> MachineCosts:
    """Fit costs to measurements, beginning with those of the target; return these if no others are better."""
    logs = [0.0] * len(_GROUPS)

    def scaled(logs: Sequence[float]) -> Target:
        values = asdict(target.costs)
        scales = {
            name: values[name] * math.exp(log) for group, log in zip(_GROUPS, logs, strict=True) for name in group
        }
        return replace(target, costs=replace(target.costs, **scales))

    def loss(logs: Sequence[float]) -> float:
        return misfit(measured, scaled(logs)) / _NOISE**2 + sum(log**2 for log in logs) / _SPREAD**2

    limit, least = math.log(MAX_SCALE), loss(logs)
    for step in _STEPS:
        for _ in range(_MAX_SWEEPS):
            before = least
            for at in range(len(logs)):
                for change in (step, -step):
                    tried = [*logs[:at], max(-limit, min(limit, logs[at] + change)), *logs[at + 1 :]]
                    if (found := loss(tried)) < least:
                        logs, least = tried, found
                        break
            if least == before:
                break
    fitted = scaled(logs)
    closer = misfit(measured, fitted) < misfit(measured, target)
    chooses_as_well = regret(measured, fitted) <= regret(measured, target) + _EQUAL
    return fitted.costs if closer and chooses_as_well else target.costs


def misfit(measured: Sequence[Measurement], target: Target) -> float:
    """Return the sum of the squared deviations of log(duration / estimate) from their mean."""
    logs = [
        math.log(seconds / estimate)
        for one in measured
        for seconds, estimate in zip(one.seconds, one.estimates(target), strict=True)
    ]
    mean = fmean(logs)
    return sum((log - mean) ** 2 for log in logs)


def regret(measured: Sequence[Measurement], target: Target) -> float:
    """Return how much longer the algorithms of the least estimates take than the fastest: the mean of logarithms."""
    return fmean(
        math.log(min(zip(one.estimates(target), one.seconds, strict=True))[1] / min(one.seconds)) for one in measured
    )


def _estimate(algorithm: ConvAlgorithm | None, problem: ConvProblem, target: Target) -> float:
    if algorithm is None:
        return estimate_direct_cycles(problem, target)
    return sum(estimate_cycles(region, problem, target) for region in algorithm.regions)
