"""What a model costs: parameters, arithmetic, memory traffic, activation memory and latency."""

from repvgg.measure.denormals import Denormals, count_denormals
from repvgg.measure.memory import LiveStorageTracker, MemoryStep, held_memory
from repvgg.measure.ops import Counts, Op, Walk, count, walk
from repvgg.measure.profile import Profile, Row, profile
from repvgg.measure.settings import IDENTITY, RunSettings, environment
from repvgg.measure.timing import (
    INTERLEAVED,
    PAPER,
    PROTOCOLS,
    REST_SECONDS,
    Call,
    CudaEvents,
    OnFailure,
    Ratio,
    Sample,
    SpeedProtocol,
    Stopwatch,
    Timing,
    WallClock,
    catch_out_of_memory,
    compare,
    ratio,
    sampled_names,
    summarize,
    take_samples,
)

# Former names, kept for code that uses them.
Reading, Setting, measured = Sample, RunSettings, sampled_names
memory_watched, take_readings = catch_out_of_memory, take_samples

__all__ = [
    "IDENTITY",
    "INTERLEAVED",
    "PAPER",
    "PROTOCOLS",
    "REST_SECONDS",
    "Call",
    "Counts",
    "CudaEvents",
    "Denormals",
    "LiveStorageTracker",
    "MemoryStep",
    "OnFailure",
    "Op",
    "Profile",
    "Ratio",
    "Row",
    "RunSettings",
    "Sample",
    "SpeedProtocol",
    "Stopwatch",
    "Timing",
    "Walk",
    "WallClock",
    "catch_out_of_memory",
    "compare",
    "count",
    "count_denormals",
    "environment",
    "held_memory",
    "profile",
    "ratio",
    "sampled_names",
    "summarize",
    "take_samples",
    "walk",
]
