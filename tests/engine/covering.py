"""Which combinations of test parameters run each time, and which are marked ``slow``.

LLVM takes a second for a large Winograd kernel, so the full product of tile sizes, schedules, instruction sets and
shapes takes minutes. A fault of the code generator shows with one value of a parameter or with two together: the fast
suite runs a covering set, in which every two values of different parameters meet, and ``make slow`` the others.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from repvgg.engine.codegen.jit import VectorIsa
from tests.engine.emulation import MARKS, is_emulated

#: Maps the values of a combination to the traits of which every two are to meet.
View = Callable[..., tuple[Any, ...]]


def covering(*axes: Iterable[Any], views: Sequence[View] | None = None) -> list[Any]:
    """Return the product of the axes as pytest parameters; those outside of a pairwise covering set are ``slow``.

    The choice is greedy, in the order of the product, so it is the same in each run.

    Args:
        axes: the values of each parameter; a plain tuple stands for the values of several parameters.
        views: the traits to pair, by default the values themselves. A view of one trait covers its values alone.
    """
    combinations = list(itertools.product(*axes))
    # What runs in an emulator is slow, and covers nothing of this processor.
    emulated = [any(map(is_emulated, _spread(one))) for one in combinations]
    goals = [
        set() if foreign else _goals(_spread(one), views or [lambda *values: values])
        for one, foreign in zip(combinations, emulated, strict=True)
    ]
    uncovered, fast = set().union(*goals), set()
    while uncovered:
        best = max(range(len(goals)), key=lambda at: len(goals[at] & uncovered))
        fast.add(best)
        uncovered -= goals[best]
    return [
        pytest.param(
            *_spread(one),
            id="-".join(map(_label, _spread(one))),
            marks=[] if at in fast else MARKS if emulated[at] else [pytest.mark.slow],
        )
        for at, one in enumerate(combinations)
    ]


def _goals(values: Sequence[Any], views: Sequence[View]) -> set[tuple[Any, ...]]:
    """Return every two traits of a combination, with their places."""
    return {
        (number, *pair)
        for number, view in enumerate(views)
        for traits in [view(*values)]
        for pair in itertools.combinations(enumerate(traits), min(2, len(traits)))
    }


def _spread(combination: Iterable[Any]) -> list[Any]:
    return [value for part in combination for value in (part if type(part) is tuple else (part,))]


def _label(value: Any) -> str:
    return value.name if isinstance(value, VectorIsa) else str(value)
