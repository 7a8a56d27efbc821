"""The disk cache of algorithms: those measured by autotuning, and those selected by the cost model.

A file holds JSON: "direct", or a list with one entry for each region. Reading it only looks up one of the current
candidates, so a wrong or malicious file can at worst select a slow one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from repvgg.engine.codegen.disk_cache import TUNING_SUFFIX, entry_key, read_entry, write_entry
from repvgg.engine.planner.algorithms import (
    ERROR_GROWTH_LIMITS,
    ConvAlgorithm,
    ConvProblem,
    Schedule,
    Target,
    TileRegion,
    WinogradRegion,
    candidate_regions,
    image_partitions,
    supports_winograd,
)
from repvgg.engine.planner.cost_model import estimate_cycles, select_algorithm

_DIRECT = "direct"
# The staged schedule is called "product" in files, its name when the format was introduced.
_SCHEDULE_NAMES: dict[Schedule, str] = {"staged": "product", "fused": "fused"}


@lru_cache(maxsize=1024)  # most layers of a network repeat the problem of another
def select_cached(problem: ConvProblem, target: Target) -> ConvAlgorithm | None:
    """Return what the cost model selects, from the disk if it was asked before: the search takes up to 0.3 s."""
    if not supports_winograd(problem, target):
        return None
    kind = "estimated", repr(target.costs), cost_model_version()
    found = read_cached(problem, target, *kind)
    if found is None:
        found = (select_algorithm(problem, target),)
        write_cached(problem, target, found[0], *kind)
    return found[0]


@cache
def cost_model_version() -> str:
    """Return a digest of the code that estimates, so that another version of it selects anew."""
    digest = hashlib.sha256()
    for name in ("algorithms.py", "cost_model.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def read_cached(problem: ConvProblem, target: Target, *kind: str) -> tuple[ConvAlgorithm | None] | None:
    """Return a tuple of the cached algorithm, which is None for the direct kernel; or None if there is no entry.

    ``kind`` is part of the key; it is empty for entries of autotuning.
    """
    content = read_entry(_cache_key(problem, target, *kind), TUNING_SUFFIX)
    try:
        found: Any = None if content is None else json.loads(content)
    except ValueError:
        return None
    if found == _DIRECT:
        return (None,)
    if not isinstance(found, list):
        return None
    for partition in image_partitions(problem, target):
        if len(found) == len(partition):
            regions = list(_matches(partition, found, problem, target))
            if len(regions) == len(partition):
                return (ConvAlgorithm(tuple(regions)),)
    return None


def write_cached(problem: ConvProblem, target: Target, algorithm: ConvAlgorithm | None, *kind: str) -> None:
    """Cache the algorithm of a convolution."""
    content = _DIRECT if algorithm is None else [_encode(region) for region in algorithm.regions]
    write_entry(_cache_key(problem, target, *kind), TUNING_SUFFIX, json.dumps(content).encode())


def _cache_key(problem: ConvProblem, target: Target, *kind: str) -> bytes:
    size = problem.in_channels, problem.out_channels, problem.output_size, problem.batch, problem.groups
    # The error budget is part of the key, because a larger one admits tiles that were never measured.
    limit = ERROR_GROWTH_LIMITS[target.precision]
    machine = astuple(target.isa), target.threads, target.precision
    return entry_key(*map(str, (astuple(problem.geometry), size, machine, limit)), *kind)


def _matches(
    partition: Sequence[TileRegion], found: Sequence[Any], problem: ConvProblem, target: Target
) -> Iterator[WinogradRegion]:
    """Yield the candidate for each entry of a file, up to the first entry without one."""
    for tiles, encoded in zip(partition, found, strict=True):
        if not isinstance(encoded, list) or encoded[:2] != [list(span) for span in tiles]:
            return
        match = next((one for one in candidate_regions(tiles, problem, target) if _encode(one) == encoded), None)
        if match is None:
            return
        yield replace(match, estimated_cycles=estimate_cycles(match, problem, target))


def _encode(region: WinogradRegion) -> list[Any]:
    rows, columns = (list(span) for span in region.tiles)
    schedule, tile = _SCHEDULE_NAMES[region.schedule], region.tile
    splits, tiles_per_block = region.out_channel_splits, region.tiling.tiles_per_block
    return [rows, columns, schedule, region.on_the_fly, splits, tile.mr, tile.nr, tiles_per_block]
