"""A network as a table of steps in memory, and the one function that runs it: a call for the whole network.

A row of the table is eight i64: the function, four pointers (see ``kernels.kernel.UNITS``), units for each block,
images in a block, and one to spare.
"""

from __future__ import annotations

from repvgg.engine.ir import Function, Value
from repvgg.engine.kernels.kernel import UNITS

WORDS = 8
RUN = "run"


def run_function() -> Function:
    """``run(ptr steps, i64 count, i64 batch)``: one step after the other, on one thread."""
    write = Function(RUN, (("ptr", "steps"), ("i64", "count"), ("i64", "batch")), 1)
    with write.loop(0, "%count") as steps:
        first = write.mul(steps.index, WORDS)
        function, source, target, weights, bias = (_word(write, "ptr", first, place) for place in range(5))
        units, block = (_word(write, "i64", first, place) for place in (5, 6))
        filled = write.value(f"sub i64 {write.add('%batch', block)}, 1")
        blocks, _ = write.divide(filled, block)
        values = (source, target, weights, bias, blocks, 0, write.mul(units, blocks))
        arguments = ", ".join(f"{kind} {value}" for (kind, _), value in zip(UNITS, values, strict=True))
        write.line(f"call void {function}({arguments})")
    return write


def _word(write: Function, kind: str, first: str | int, place: int) -> Value:
    address = write.value(f"getelementptr i64, ptr %steps, i64 {write.add(first, place)}")
    return write.value(f"load {kind}, ptr {address}")
