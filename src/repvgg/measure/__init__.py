"""What a model costs: one walk over its ops, the counts read off it, and speed and memory measured side by side."""

from repvgg.measure.counts import Counts, count
from repvgg.measure.denormals import Denormals, count_denormals
from repvgg.measure.environment import IDENTITY, environment
from repvgg.measure.latency import Ratio, Timing, compare, measured, ratio, summarize
from repvgg.measure.memory import MemoryStep, held_memory
from repvgg.measure.profile import Profile, Row, profile
from repvgg.measure.protocol import (
    INTERLEAVED,
    PAPER,
    PROTOCOLS,
    OnFailure,
    Reading,
    SpeedProtocol,
    memory_watched,
    take_readings,
)
from repvgg.measure.setting import Setting
from repvgg.measure.stopwatch import Call, CudaEvents, Stopwatch, WallClock
from repvgg.measure.walk import Op, Walk, walk

__all__ = [
    "IDENTITY",
    "INTERLEAVED",
    "PAPER",
    "PROTOCOLS",
    "Call",
    "Counts",
    "CudaEvents",
    "Denormals",
    "MemoryStep",
    "OnFailure",
    "Op",
    "Profile",
    "Ratio",
    "Reading",
    "Row",
    "Setting",
    "SpeedProtocol",
    "Stopwatch",
    "Timing",
    "Walk",
    "WallClock",
    "compare",
    "count",
    "count_denormals",
    "environment",
    "held_memory",
    "measured",
    "memory_watched",
    "profile",
    "ratio",
    "summarize",
    "take_readings",
    "walk",
]
