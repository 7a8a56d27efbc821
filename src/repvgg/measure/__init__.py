"""What a model costs: one walk over its ops, the counts read off it, and latency measured side by side."""

from repvgg.measure.counts import Counts, count
from repvgg.measure.latency import Timing, compare, environment
from repvgg.measure.profile import Profile, Row, profile
from repvgg.measure.walk import Op, Walk, walk

__all__ = [
    "Counts",
    "Op",
    "Profile",
    "Row",
    "Timing",
    "Walk",
    "compare",
    "count",
    "environment",
    "profile",
    "walk",
]
