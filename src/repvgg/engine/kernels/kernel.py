"""What every kernel is to the planner, and the signature of the function that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from repvgg.engine.ir import Function, Index

POINTERS = (("ptr", "source"), ("ptr", "target"), ("ptr", "weights"), ("ptr", "bias"))

#: A kernel's function computes units [begin, end) of the work on a batch; whoever calls it counts the units.
UNITS = (*POINTERS, ("i64", "batch"), ("i64", "begin"), ("i64", "end"))


class Kernel(Protocol):
    """Everything that the code of one kind of layer depends on: a frozen value, so that equal layers share code."""

    @property
    def words(self) -> str:
        """What it does, for a profile."""
        ...

    @property
    def units_of_image(self) -> int:
        """Pieces of work for each image of a batch, or for each block of a :class:`repvgg.engine.plan.Step`."""
        ...

    @property
    def muls(self) -> int:
        """Multiplications for each of those."""
        ...

    def functions(self, name: str) -> list[Function]:
        """The function called ``name``, which takes :data:`UNITS`, after those that it calls."""
        ...


def call_panel(
    write: Function, part: Index, panels: int, functions: Sequence[Function], arguments: Sequence[tuple[str, Index]]
) -> None:
    """Call the second of two functions for the last panel of a group, which may be narrower, else the first."""
    is_last = write.value(f"icmp eq i64 {part}, {panels - 1}")
    is_other = write.value(f"xor i1 {is_last}, true")
    for condition, function in ((is_other, functions[0]), (is_last, functions[1])):
        with write.when(condition):
            write.call(function.name, arguments)
