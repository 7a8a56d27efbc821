"""Which way a convolution is computed, found by measuring: the table's best few in turn, on this very machine.

A layer is measured alone, on memory like that of the network: first the ways to compute each part of its image, then
the best covers of the whole image, beside the direct kernel. All that are compared run in turns, and what falls behind
drops out, so that a machine whose speed swings does no way an injustice.
"""

from __future__ import annotations

import heapq
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np

from repvgg.engine.codegen.disk_cache import CHOICE, cache_folder, digest, keep, read_kept
from repvgg.engine.executable import Runner, Shape
from repvgg.engine.graph import Conv, ConvGeometry, Layer
from repvgg.engine.kernels.base import any_weights
from repvgg.engine.planner.algorithms import (
    LOSSES,
    Choice,
    Machine,
    Part,
    Rectangle,
    Size,
    every_cover,
    may_use_winograd,
)
from repvgg.engine.planner.cost_model import choose, costed_parts, every_choice
from repvgg.engine.planner.memory_plan import at_once
from repvgg.engine.planner.plan import Ways, plan
from repvgg.engine.runtime.memory import read_input
from repvgg.engine.runtime.thread_pool import ThreadPool

Question: TypeAlias = tuple[ConvGeometry, Size]

_COVERS = 4  # that are looked into
_WAYS = 6  # for each part of an image
_MOST = 2**26  # floats of the weights of one way; several ways are in memory at a time
_SMALL = 0.1  # of a cover's time: parts that are as the table says
_FLUSH = 2**23  # floats that are read between two turns of a batch that is small
_COPIES = 2  # of a layer that is measured
_FEW = 4  # images of such a batch
_ROUNDS = ((2, 1.3), (3, 1.1), (6, 1.0))  # turns, and how far behind the best one may then be
_FINAL = ((4, 1.1), (8, 1.0))


@final
class Searched:
    """A chooser: as measured, or by the table where nothing was.

    Args:
        found: what was measured.
    """

    def __init__(self, found: dict[Question, Choice | None]) -> None:
        self._found = found

    def __call__(self, geometry: ConvGeometry, size: Size, machine: Machine) -> Choice | None:
        """See :func:`repvgg.engine.planner.algorithms.choose`."""
        question = (geometry, size)
        return self._found[question] if question in self._found else choose(geometry, size, machine)


def search(layers: Sequence[Layer], shape: Shape, machine: Machine, pool: ThreadPool) -> Searched:
    """Measure all convolutions of a network that more than one way computes.

    What was measured before is read from the disk, and what is measured now is kept there; see
    :mod:`repvgg.engine.planner.autotune`.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`.
        shape: the largest batch, channels, height and width.
        machine: what computes.
        pool: the threads that do.
    """
    found: dict[Question, Choice | None] = {}
    for geometry, size in _questions(layers, shape, machine):
        known = recall(geometry, size, machine)
        if known is None:
            known = (_fastest_choice(geometry, size, machine, pool),)
            remember(geometry, size, machine, known[0])
        found[geometry, size] = known[0]
    return Searched(found)


def _questions(layers: Sequence[Layer], shape: Shape, machine: Machine) -> list[Question]:
    """The convolutions of a network, each kind once."""
    asked: dict[Question, None] = {}

    def note(geometry: ConvGeometry, size: Size, machine: Machine) -> Choice | None:
        if may_use_winograd(geometry, size, machine):
            asked[geometry, size] = None
        return None

    plan(layers, shape, machine, Ways(note, any_weights))
    return list(asked)


def _fastest_choice(geometry: ConvGeometry, size: Size, machine: Machine, pool: ThreadPool) -> Choice | None:
    """The best of the table's best covers, with the best way for each of their parts, or None for the direct kernel."""
    field = _Field(geometry, size, machine, pool)
    every = [one for one in every_choice(size, geometry.stride[0], machine) if _floats(one, size) <= _MOST]
    table = heapq.nsmallest(_COVERS, every, key=lambda choice: choice.cycles)
    large = {part.rectangle for choice in table for part in choice.parts if part.cycles > _SMALL * choice.cycles}
    found = {rectangle: field.best_part(rectangle) for rectangle in sorted(large)}
    improved = [Choice(tuple(found.get(part.rectangle, part) for part in choice.parts)) for choice in table]
    return field.best([*dict.fromkeys([*improved, *table[:1]]), None], _FINAL)


@final
class _Trial:
    """One way to compute a layer, and how long its turns took."""

    def __init__(self, choice: Choice | None, runner: Runner, batch: int) -> None:
        self.choice, self._runner, self._batch = choice, runner, batch
        self._seconds: list[float] = []

    @property
    def score(self) -> float:
        """The mean of the faster half of its turns, in seconds."""
        fast = sorted(self._seconds)[: -(-len(self._seconds) // 2)]
        return sum(fast) / len(fast)

    def turn(self, pool: ThreadPool) -> None:
        """Compute the layer once, after a copy of it with other weights.

        That one leaves in the caches what the layer before does in a network, and the other threads awake.
        """
        rows = self._runner.rows
        copy = 1 + len(rows) // _COPIES
        pool.run(rows.start, copy, self._batch)
        start = time.perf_counter()
        pool.run(rows[copy], len(rows) - copy, self._batch)
        self._seconds.append(time.perf_counter() - start)


@final
class _Field:
    """Where the ways to compute one layer are measured."""

    def __init__(self, geometry: ConvGeometry, size: Size, machine: Machine, pool: ThreadPool) -> None:
        self._size, self._stride, self._machine, self._pool = size, geometry.stride[0], machine, pool
        weight = np.broadcast_to(np.float32(0), (size.outputs, size.channels, *geometry.kernel))
        self._layer = Conv("layer", weight, np.zeros(size.outputs, np.float32), geometry, relu=True)
        axes = zip(size.image, geometry.stride, geometry.kernel, geometry.padding, strict=True)
        height, width = (count * stride + kernel - 1 - 2 * pad for count, stride, kernel, pad in axes)
        image = np.random.default_rng(0).standard_normal((1, size.inputs, height, width), np.float32)
        self._images = np.broadcast_to(image, (size.batch, *image.shape[1:]))
        self._others = np.ones(_FLUSH, np.float32) if size.batch <= _FEW else None

    def best_part(self, rectangle: Rectangle) -> Part:
        """The best way for some tiles, of the table's best few of each kind."""
        every = list(costed_parts(rectangle, self._size, self._stride, self._machine))
        ways = {part.way for part in every}
        few = [
            heapq.nsmallest(_WAYS // len(ways) + 1, (part for part in every if part.way == way), key=_cycles)
            for way in sorted(ways)
        ]
        best = self.best([Choice((part,)) for part in heapq.nsmallest(_WAYS, itertools.chain(*few), key=_cycles)])
        assert best is not None  # it is one of those
        return best.parts[0]

    def best(self, choices: Sequence[Choice | None], rounds: Sequence[tuple[int, float]] = _ROUNDS) -> Choice | None:
        """The fastest of some ways, in turns, of which those that fall behind drop out."""
        trials = [self._trial(choice) for choice in choices]
        for turns, limit in rounds:
            for trial in trials * turns:
                if self._others is not None:  # as if the rest of a network came in between
                    self._others.sum()
                trial.turn(self._pool)
            fastest = min(trial.score for trial in trials)
            trials = [trial for trial in trials if trial.score <= limit * fastest]
            self._pool.quiesce()
        return min(trials, key=lambda trial: trial.score).choice

    def _trial(self, choice: Choice | None) -> _Trial:
        def this(geometry: ConvGeometry, size: Size, machine: Machine) -> Choice | None:
            return choice

        runner = Runner([self._layer], self._images.shape, self._machine, (), Ways(this, any_weights, at_once, _COPIES))
        runner.take(read_input(self._images, self._size.inputs))
        self._pool.run(runner.rows.start, len(runner.rows), self._size.batch)
        return _Trial(choice, runner, self._size.batch)


def _floats(choice: Choice, size: Size) -> int:
    """Of all weights, about."""
    return sum(part.form.sets(late=part.late) for part in choice.parts) * size.kernels


def _cycles(part: Part) -> float:
    return part.cycles


_DIRECT = "direct"


def recall(geometry: ConvGeometry, size: Size, machine: Machine) -> tuple[Choice | None] | None:
    """How a convolution is computed the fastest, in a tuple; None where that was not measured."""
    place = _place(geometry, size, machine)
    kept = read_kept(*place) if place else None
    try:
        said: Any = None if kept is None else json.loads(kept)
    except ValueError:
        return None
    if said == _DIRECT:
        return (None,)
    stride = geometry.stride[0]
    for rectangles in every_cover(size, stride, machine) if isinstance(said, list) else ():
        if len(said) == len(rectangles):
            pairs = zip(rectangles, said, strict=True)
            parts = [_found(rectangle, entry, size, stride, machine) for rectangle, entry in pairs]
            if all(parts):
                return (Choice(tuple(part for part in parts if part)),)
    return None


def remember(geometry: ConvGeometry, size: Size, machine: Machine, choice: Choice | None) -> None:
    """Keep how a convolution is computed the fastest, for :func:`recall`."""
    place = _place(geometry, size, machine)
    if place:
        said = _DIRECT if choice is None else [_entry(part.rectangle, part) for part in choice.parts]
        keep(*place, json.dumps(said).encode())


def _place(geometry: ConvGeometry, size: Size, machine: Machine) -> tuple[Path, bytes] | None:
    """The file, and what it begins with."""
    folder = cache_folder()
    if folder is None:
        return None
    asked = astuple(geometry), astuple(size), astuple(machine), LOSSES[machine.precision]
    key = digest(*map(str, asked))
    return folder / f"{key.hex()}{CHOICE}", key


def _found(rectangle: Rectangle, entry: Any, size: Size, stride: int, machine: Machine) -> Part | None:
    """The way for some tiles that an entry stands for."""
    if not isinstance(entry, list) or entry[:2] != [list(run) for run in rectangle]:
        return None
    every = costed_parts(rectangle, size, stride, machine)
    return next((part for part in every if _entry(rectangle, part) == entry), None)


def _entry(rectangle: Rectangle, part: Part) -> list[Any]:
    """A way for some tiles, as JSON has it."""
    runs, tile = (list(run) for run in rectangle), part.tile
    return [*runs, part.way, part.late, part.splits, tile.pixels, tile.vectors, part.tiling.piece]
