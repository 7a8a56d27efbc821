"""Writing LLVM IR as text: values, loops and vectors of single floats. It knows no kernel.

A function is written line by line; a value is the name that IR gives it. Loops are tested at their end, and carry
their accumulators in phi nodes, so that what is written is what runs: nothing is left to an auto-vectorizer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, final

Value: TypeAlias = str
Index: TypeAlias = "str | int"  # an i64: computed, or known while the IR is written

_FLOAT_BYTES = 4


@final
@dataclass(eq=False)
class Loop:
    """A loop that is being written.

    Attributes:
        index: the value of the counter.
        carried: what is carried, as the body finds it.
        next: what the next round finds; the body sets it if anything is carried.
        results: what is carried, behind the loop.
    """

    index: Value
    carried: list[Value]
    next: list[Value] = field(default_factory=list)

    @property
    def results(self) -> list[Value]:
        """What is carried, behind the loop."""
        return self.next


@final
class Function:
    """One function of IR on vectors of ``width`` floats, being written.

    Args:
        name: its name.
        parameters: types and names, as in ``("ptr", "source")``.
        width: floats in a vector.
        internal: whether nobody outside of the module calls it.
    """

    def __init__(self, name: str, parameters: Sequence[tuple[str, str]], width: int, *, internal: bool = False) -> None:
        self.name, self.width = name, width
        self.vector = f"<{width} x float>"
        self._internal = internal
        self._parameters = ", ".join(f"{kind} %{name}" for kind, name in parameters)
        self._lines: list[str] = []
        self._values = 0
        self._labels = 0
        self._block = "entry"
        self._declared: set[str] = set()

    def text(self) -> str:
        """The whole function, which returns nothing."""
        linkage = "internal " if self._internal else ""
        bits = 32 * self.width
        vectors = f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        head = f"define {linkage}void @{self.name}({self._parameters}) nounwind {vectors} {{\nentry:"
        return "\n".join([head, *self._lines, "  ret void", "}"]) + "\n"

    def declarations(self) -> set[str]:
        """What the function calls that is defined nowhere in the module."""
        return set(self._declared)

    def declare(self, text: str) -> None:
        """Say what a function looks like that is called and defined elsewhere."""
        self._declared.add(f"{text}\n")

    # Values

    def line(self, text: str) -> None:
        """An instruction without a value."""
        self._lines.append(f"  {text}")

    def value(self, text: str) -> Value:
        """An instruction with a value, whose name is returned."""
        self._values += 1
        name = f"%v{self._values}"
        self.line(f"{name} = {text}")
        return name

    def add(self, left: Index, right: Index) -> Index:
        """Sum of two i64; known numbers are added while writing."""
        if isinstance(left, int) and isinstance(right, int):
            return left + right
        if 0 in (left, right):
            return right if left == 0 else left
        return self.value(f"add i64 {left}, {right}")

    def mul(self, left: Index, right: Index) -> Index:
        """Product of two i64; known numbers are multiplied while writing."""
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        if 0 in (left, right):
            return 0
        if 1 in (left, right):
            return right if left == 1 else left
        return self.value(f"mul i64 {left}, {right}")

    def divide(self, left: Index, right: Index) -> tuple[Value, Value]:
        """Quotient and rest of two i64 that are not negative."""
        return self.value(f"udiv i64 {left}, {right}"), self.value(f"urem i64 {left}, {right}")

    def at(self, pointer: Value, offset: Index) -> Value:
        """The address of a float so many floats behind ``pointer``."""
        return pointer if offset == 0 else self.value(f"getelementptr inbounds float, ptr {pointer}, i64 {offset}")

    # Vectors

    def load(self, pointer: Value, offset: Index = 0) -> Value:
        """A vector, wherever it lies."""
        return self.value(f"load {self.vector}, ptr {self.at(pointer, offset)}, align {_FLOAT_BYTES}")

    def store(self, vector: Value, pointer: Value, offset: Index = 0, count: int | None = None) -> None:
        """Store a vector, or its first ``count`` numbers only."""
        address = self.at(pointer, offset)
        if count is None or count == self.width:
            self.line(f"store {self.vector} {vector}, ptr {address}, align {_FLOAT_BYTES}")
            return
        name = f"@llvm.masked.store.v{self.width}f32.p0"
        self.declare(f"declare void {name}({self.vector}, ptr, i32 immarg, <{self.width} x i1>)")
        mask = ", ".join(f"i1 {str(lane < count).lower()}" for lane in range(self.width))
        self.line(
            f"call void {name}({self.vector} {vector}, ptr {address}, i32 {_FLOAT_BYTES}, <{self.width} x i1> <{mask}>)"
        )

    def store_number(self, number: float, pointer: Value, offset: int = 0) -> None:
        """Store a known float."""
        self.line(f"store float {float_text(number)}, ptr {self.at(pointer, offset)}, align {_FLOAT_BYTES}")

    def broadcast(self, pointer: Value, offset: Index = 0) -> Value:
        """A float from memory, in all places of a vector."""
        return self.splat(self.value(f"load float, ptr {self.at(pointer, offset)}, align {_FLOAT_BYTES}"))

    def splat(self, scalar: Value) -> Value:
        """A float, in all places of a vector."""
        first = self.value(f"insertelement {self.vector} poison, float {scalar}, i64 0")
        zeros = f"<{self.width} x i32> zeroinitializer"
        return self.value(f"shufflevector {self.vector} {first}, {self.vector} poison, {zeros}")

    def constant(self, number: str) -> Value:
        """A vector of one number, as IR spells it."""
        return f"<{', '.join([f'float {number}'] * self.width)}>"

    def fma(self, left: Value, right: Value, addend: Value) -> Value:
        """``left · right + addend``, rounded once where the processor can."""
        name = f"@llvm.fmuladd.v{self.width}f32"
        self.declare(f"declare {self.vector} {name}({self.vector}, {self.vector}, {self.vector})")
        return self.value(
            f"call {self.vector} {name}({self.vector} {left}, {self.vector} {right}, {self.vector} {addend})"
        )

    def relu(self, vector: Value) -> Value:
        """Zero in the place of negative numbers; NaN stays NaN, as in PyTorch."""
        negative = self.value(f"fcmp olt {self.vector} {vector}, zeroinitializer")
        return self.value(
            f"select <{self.width} x i1> {negative}, {self.vector} zeroinitializer, {self.vector} {vector}"
        )

    def binary(self, operation: str, left: Value, right: Value) -> Value:
        """``fadd``, ``fsub`` or ``fmul`` of two vectors."""
        return self.value(f"{operation} {self.vector} {left}, {right}")

    def prefetch(self, pointer: Value, offset: Index = 0, *, near: bool = False, write: bool = False) -> None:
        """Have the line of an address brought close; an address of nothing does no harm.

        It comes to the second cache; ``near`` to the first; to ``write``, as a line that nobody else has.
        """
        self.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        at = self.at(pointer, offset)
        self.line(f"call void @llvm.prefetch.p0(ptr {at}, i32 {write:d}, i32 {3 if near or write else 2}, i32 1)")

    def choose(self, condition: Value, pointer: Value, other: Value) -> Value:
        """One of two addresses, without a branch."""
        return self.value(f"select i1 {condition}, ptr {pointer}, ptr {other}")

    def scratch(self, floats: int) -> Value:
        """Memory of this call, aligned to cache lines; only in the first lines of a function."""
        return self.value(f"alloca [{floats} x float], align 64")

    def call(self, name: str, arguments: Sequence[tuple[str, Index]]) -> None:
        """Call a function of the module that returns nothing."""
        self.line(f"call void @{name}({', '.join(f'{kind} {value}' for kind, value in arguments)})")

    # Flow

    @contextmanager
    def loop(self, begin: Index, end: Index, step: int = 1, carried: Sequence[Value] = ()) -> Iterator[Loop]:
        """Write the body of ``for (index = begin; index < end; index += step)``.

        Only a loop whose bounds are known, and that runs at least once, can carry vectors.
        """
        known = isinstance(begin, int) and isinstance(end, int)
        if (known and int(begin) >= int(end)) or (carried and not known):
            raise ValueError(f"A loop from {begin} to {end} cannot carry {len(carried)} values.")
        number = self._new_label()
        if not known:
            self._guard(begin, end, number)
        before, head = self._block, self._begin(f"loop{number}")
        names = [f"%c{number}.{place}" for place in range(len(carried))]
        loop = Loop(f"%i{number}", names, list(names))
        marker = len(self._lines)
        yield loop
        step_to = self.value(f"add nuw nsw i64 {loop.index}, {step}")
        again = self.value(f"icmp ult i64 {step_to}, {end}")
        phis = [f"  {loop.index} = phi i64 [{begin}, %{before}], [{step_to}, %{self._block}]"]
        for name, first, following in zip(names, carried, loop.next, strict=True):
            phis.append(f"  {name} = phi {self.vector} [{first}, %{before}], [{following}, %{self._block}]")
        self._lines[marker:marker] = phis
        self.line(f"br i1 {again}, label %{head}, label %after{number}")
        self._begin(f"after{number}", jump=False)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Write what happens only where an i1 is true."""
        number = self._new_label()
        self.line(f"br i1 {condition}, label %then{number}, label %after{number}")
        self._begin(f"then{number}", jump=False)
        yield
        self._begin(f"after{number}")

    def _guard(self, begin: Index, end: Index, number: int) -> None:
        """Skip a loop that would not run at all."""
        some = self.value(f"icmp ult i64 {begin}, {end}")
        self.line(f"br i1 {some}, label %some{number}, label %after{number}")
        self._begin(f"some{number}", jump=False)

    def _new_label(self) -> int:
        self._labels += 1
        return self._labels

    def _begin(self, label: str, *, jump: bool = True) -> str:
        if jump:
            self.line(f"br label %{label}")
        self._lines.append(f"{label}:")
        self._block = label
        return label


def float_text(number: float) -> str:
    """A number as IR spells it, rounded to a float."""
    bits = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<f", number))[0]))[0]
    return f"0x{bits:016X}"


def module(functions: Sequence[Function]) -> str:
    """The text of a module of functions, with the declarations that they need."""
    declared = set[str]().union(*(function.declarations() for function in functions))
    return "\n".join(["".join(sorted(declared)), *(function.text() for function in functions)])
