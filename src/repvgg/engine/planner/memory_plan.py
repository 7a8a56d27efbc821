"""Memory planning: all buffers of a plan in one arena, where those that do not live at the same time overlap.

Buffers are placed by size, the largest first, each into the smallest gap between those that live at the same time, or,
where that is possible, at the place of an earlier buffer of the same layout. Kernels rely on borders of zeros. A
border is zero when the arena is allocated, and nothing writes to it, but for a buffer of another layout at the same
place: then a step writes the zeros again before the buffer is used.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, final

from repvgg.engine.planner.steps import Buffer
from repvgg.engine.runtime.memory import ALIGNMENT, FLOAT_BYTES, round_up

_ALIGNED_FLOATS = ALIGNMENT // FLOAT_BYTES


@final
@dataclass(frozen=True)
class BufferAccess:
    """The buffers that a step reads and the one that it writes."""

    reads: tuple[Buffer, ...]
    writes: Buffer

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (*self.reads, self.writes)


class Lifetime(NamedTuple):
    """The first and the last step that uses a buffer."""

    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


Lifetimes: TypeAlias = dict[Buffer, Lifetime]


@final
@dataclass(frozen=True)
class MemoryPlan:
    """Where buffers are.

    Attributes:
        placed: the buffer with its offset in the arena, by the virtual one; equal ones are one buffer.
        floats: the size of the arena.
        largest_live_set: a lower bound of that size: floats of the buffers that live at the same time, at most.
        cleared: for each step, placed buffers whose borders have to be zeroed before it.
    """

    placed: dict[Buffer, Buffer]
    floats: int
    largest_live_set: int
    cleared: tuple[tuple[Buffer, ...], ...]


def lifetimes_of(accesses: Sequence[BufferAccess], num_chunked: int = 0, returned: Sequence[Buffer] = ()) -> Lifetimes:
    """Return the lifetime of each buffer.

    Args:
        accesses: those of all steps, in execution order.
        num_chunked: steps that are repeated for each chunk of the batch; what lives after them lives in all of them.
        returned: buffers that live to the end.
    """
    found: Lifetimes = {}
    for position, access in enumerate(accesses):
        for buffer in access.buffers:
            first = found[buffer].first if buffer in found else position
            found[buffer] = Lifetime(first, position)
    found |= {buffer: Lifetime(found[buffer].first, len(accesses)) for buffer in returned}
    return {
        buffer: Lifetime(0, last) if first < num_chunked <= last else Lifetime(first, last)
        for buffer, (first, last) in found.items()
    }


def plan_memory(accesses: Sequence[BufferAccess], num_chunked: int = 0, returned: Sequence[Buffer] = ()) -> MemoryPlan:
    """Place all buffers of some steps. Arguments as of :func:`lifetimes_of`."""
    lifetimes = lifetimes_of(accesses, num_chunked, returned)
    bound = _largest_live_set(lifetimes, len(accesses))
    best: dict[Buffer, int] = {}
    size = 0
    for order in _ORDERS:
        offsets = _place(sorted(lifetimes, key=lambda buffer: order(buffer, lifetimes[buffer])), lifetimes)
        end = max((offset + _size(buffer) for buffer, offset in offsets.items()), default=0)
        if not best or end < size:
            best, size = offsets, end
        if size == bound:
            break
    numbers: dict[Buffer, Buffer] = {}
    placed = {}
    for buffer in lifetimes:  # by first use
        key = replace(buffer, number=0, offset=best[buffer])
        placed[buffer] = numbers.setdefault(key, replace(key, number=len(numbers)))
    return MemoryPlan(placed, size, bound, _cleared(accesses, placed))


#: Orders in which buffers are placed: by size, or by size and how long they live; of equal ones, the first used first.
_ORDERS: tuple[Callable[[Buffer, Lifetime], tuple[int, int]], ...] = (
    lambda buffer, life: (-_size(buffer), life.first),
    lambda buffer, life: (-_size(buffer) * (life.last - life.first + 1), life.first),
    lambda buffer, life: (life.first, -_size(buffer)),
)


def _size(buffer: Buffer) -> int:
    return round_up(buffer.floats, _ALIGNED_FLOATS)


def _largest_live_set(lifetimes: Lifetimes, num_steps: int) -> int:
    changes = [0] * (num_steps + 2)
    for buffer, life in lifetimes.items():
        changes[life.first] += _size(buffer)
        changes[life.last + 1] -= _size(buffer)
    return max(itertools.accumulate(changes))


def _place(order: Sequence[Buffer], lifetimes: Lifetimes) -> dict[Buffer, int]:
    """Return the offset of each buffer, placed in this order."""
    offsets: dict[Buffer, int] = {}
    same: dict[Buffer, list[int]] = {}  # offsets of placed buffers, by layout and length
    for buffer in order:
        life, size = lifetimes[buffer], _size(buffer)
        busy: list[tuple[int, int]] = []
        for other, offset in offsets.items():
            if life.overlaps(lifetimes[other]):
                bisect.insort(busy, (offset, offset + _size(other)))
        gaps, end = [], 0
        for begin, after in busy:
            if begin - end >= size:
                gaps.append((end, begin))
            end = max(end, after)
        kind = replace(buffer, number=0)
        known = [at for at in same.get(kind, ()) if any(begin <= at and at + size <= after for begin, after in gaps)]
        known += [at for at in same.get(kind, ()) if at >= end]
        if known:
            offsets[buffer] = min(known)
        else:
            offsets[buffer] = min(gaps, key=lambda gap: gap[1] - gap[0], default=(end, end))[0]
        same.setdefault(kind, []).append(offsets[buffer])
    return offsets


def _cleared(accesses: Sequence[BufferAccess], placed: dict[Buffer, Buffer]) -> tuple[tuple[Buffer, ...], ...]:
    """Return the buffers whose borders each step has to zero first.

    The borders that a run relies on are zeroed in the same run, so that they are right for any number of images.
    """
    every = list(dict.fromkeys(placed.values()))
    sharing = {one: [other for other in every if other is not one and _overlap(one, other)] for one in every}
    clean: set[Buffer] = set()
    seen: set[Buffer] = set()
    cleared: list[tuple[Buffer, ...]] = []
    for access in accesses:
        before = []
        for virtual in access.buffers:
            if virtual in seen:
                continue
            seen.add(virtual)
            buffer = placed[virtual]
            if buffer.layout.has_border and sharing[buffer] and buffer not in clean:
                before.append(buffer)
            clean.add(buffer)
            clean.difference_update(sharing[buffer])
        cleared.append(tuple(dict.fromkeys(before)))
    return tuple(cleared)


def _overlap(one: Buffer, other: Buffer) -> bool:
    return one.offset < other.offset + other.floats and other.offset < one.offset + one.floats
