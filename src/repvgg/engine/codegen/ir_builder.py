"""Builder of LLVM IR as text: integer arithmetic, float vectors, loops. It is independent of convolutions.

Each instruction is appended as a line; a value is its SSA name. Loops are tested at the bottom and carry their vector
accumulators in phi nodes, so the IR states the register blocking and nothing is left to the auto-vectorizer.
Building text needs no llvmlite, and the text is the key of the disk cache.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, final

Value: TypeAlias = str  # SSA name or constant
Index: TypeAlias = "str | int"  # an i64: an SSA name, or known when the IR is built

_FLOAT_BYTES = 4  # alignment of loads and stores: pixels of 3 channels begin at any float
_L2_HINT, _L1_HINT = 2, 3  # locality operand of llvm.prefetch


@final
@dataclass(eq=False)
class Loop:
    """A loop whose body is being built."""

    index: Value  # the induction variable
    carried: list[Value]  # loop-carried vectors at the start of an iteration
    next: list[Value] = field(default_factory=list)  # the same at its end; the body assigns them

    @property
    def results(self) -> list[Value]:
        """The loop-carried vectors after the loop."""
        return self.next  # the loop is tested at its end: the last iteration's values dominate what follows


@final
class IRBuilder:
    """Builds one function that returns void.

    Args:
        name: of the function.
        parameters: (type, name) of each, such as ``("ptr", "source")``.
        width: floats in a vector.
        internal: whether only functions of the same module call it.
        inlined: whether LLVM may copy it into its callers.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[str, str]],
        width: int,
        *,
        internal: bool = False,
        inlined: bool = True,
    ) -> None:
        self.name, self.width = name, width
        self._inlined = inlined
        self._shared: dict[str, IRBuilder] = {}
        self.vector = f"<{width} x float>"
        self._internal = internal
        self._parameters = ", ".join(f"{kind} %{name}" for kind, name in parameters)
        self._lines: list[str] = []
        self._num_values = 0
        self._num_labels = 0
        self._block = "entry"
        self._declared: set[str] = set()

    def text(self) -> str:
        linkage = "internal " if self._internal else ""
        bits = 32 * self.width
        # Without these, LLVM splits 512-bit vectors on processors that it tunes for 256 bits (Skylake, Ice Lake).
        vectors = f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        attributes = f"nounwind {vectors}" if self._inlined else f"nounwind noinline {vectors}"
        head = f"define {linkage}void @{self.name}({self._parameters}) {attributes} {{\nentry:"
        return "\n".join([head, *self._lines, "  ret void", "}"]) + "\n"

    def declarations(self) -> set[str]:
        """Return the declarations of external functions that the function calls."""
        return set(self._declared)

    def declare(self, text: str) -> None:
        self._declared.add(f"{text}\n")

    # Instructions

    def emit(self, text: str) -> None:
        """Append an instruction without a result."""
        self._lines.append(f"  {text}")

    def assign(self, text: str) -> Value:
        """Append an instruction and return the name of its result."""
        self._num_values += 1
        name = f"%v{self._num_values}"
        self.emit(f"{name} = {text}")
        return name

    # Integers and addresses. Constants are folded, so kernels need not distinguish them from values.

    def add(self, left: Index, right: Index) -> Index:
        if isinstance(left, int) and isinstance(right, int):
            return left + right
        if 0 in (left, right):
            return right if left == 0 else left
        return self.assign(f"add i64 {left}, {right}")

    def mul(self, left: Index, right: Index) -> Index:
        if isinstance(left, int) and isinstance(right, int):
            return left * right
        if 0 in (left, right):
            return 0
        if 1 in (left, right):
            return right if left == 1 else left
        return self.assign(f"mul i64 {left}, {right}")

    def divmod(self, left: Index, right: Index) -> tuple[Value, Value]:
        """Return quotient and remainder of two unsigned i64."""
        return self.assign(f"udiv i64 {left}, {right}"), self.assign(f"urem i64 {left}, {right}")

    def offset(self, pointer: Value, floats: Index) -> Value:
        """Return the address ``floats`` floats after ``pointer``."""
        return pointer if floats == 0 else self.assign(f"getelementptr inbounds float, ptr {pointer}, i64 {floats}")

    def select_pointer(self, condition: Value, pointer: Value, other: Value) -> Value:
        """Return one of two addresses, without a branch."""
        return self.assign(f"select i1 {condition}, ptr {pointer}, ptr {other}")

    def scratch(self, floats: int) -> Value:
        """Return stack memory aligned to a cache line. For the entry block only: in a loop, the stack would grow."""
        return self.assign(f"alloca [{floats} x float], align 64")

    # Vectors

    def load(self, pointer: Value, offset: Index = 0, count: int | None = None) -> Value:
        """Load a vector, or its first ``count`` floats and zeros; it need not be aligned."""
        address = self.offset(pointer, offset)
        if count is None or count == self.width:
            return self.assign(f"load {self.vector}, ptr {address}, align {_FLOAT_BYTES}")
        name = f"@llvm.masked.load.v{self.width}f32.p0"
        self.declare(f"declare {self.vector} {name}(ptr, i32 immarg, <{self.width} x i1>, {self.vector})")
        mask = f"<{self.width} x i1> <{self._first_lanes(count)}>"
        return self.assign(
            f"call {self.vector} {name}(ptr {address}, i32 {_FLOAT_BYTES}, {mask}, {self.vector} zeroinitializer)"
        )

    def store(self, vector: Value, pointer: Value, offset: Index = 0, count: int | None = None) -> None:
        """Store a vector, or its first ``count`` floats."""
        address = self.offset(pointer, offset)
        if count is None or count == self.width:
            self.emit(f"store {self.vector} {vector}, ptr {address}, align {_FLOAT_BYTES}")
            return
        # A constant mask: one masked store with AVX-512 and AVX2, scalar stores elsewhere.
        name = f"@llvm.masked.store.v{self.width}f32.p0"
        self.declare(f"declare void {name}({self.vector}, ptr, i32 immarg, <{self.width} x i1>)")
        mask = f"<{self.width} x i1> <{self._first_lanes(count)}>"
        self.emit(f"call void {name}({self.vector} {vector}, ptr {address}, i32 {_FLOAT_BYTES}, {mask})")

    def _first_lanes(self, count: int) -> str:
        return ", ".join(f"i1 {str(lane < count).lower()}" for lane in range(self.width))

    def store_float(self, number: float, pointer: Value, offset: int = 0) -> None:
        """Store a constant."""
        self.emit(f"store float {float_text(number)}, ptr {self.offset(pointer, offset)}, align {_FLOAT_BYTES}")

    def broadcast(self, pointer: Value, offset: Index = 0) -> Value:
        """Load a float into all lanes of a vector."""
        return self.splat(self.assign(f"load float, ptr {self.offset(pointer, offset)}, align {_FLOAT_BYTES}"))

    def splat(self, scalar: Value) -> Value:
        """Copy a float into all lanes of a vector."""
        # LLVM folds this idiom into a broadcasting load, or an embedded broadcast operand of AVX-512.
        first = self.assign(f"insertelement {self.vector} poison, float {scalar}, i64 0")
        zeros = f"<{self.width} x i32> zeroinitializer"
        return self.assign(f"shufflevector {self.vector} {first}, {self.vector} poison, {zeros}")

    def constant(self, number: str) -> Value:
        """Return a vector with a constant, as :func:`float_text` spells it, in all lanes."""
        return f"<{', '.join([f'float {number}'] * self.width)}>"

    def fma(self, left: Value, right: Value, addend: Value) -> Value:
        """Return ``left · right + addend``, with one rounding where the processor has an FMA, else with two."""
        # Not llvm.fma, which calls fmaf of the C library for each lane on processors without an FMA instruction.
        name = f"@llvm.fmuladd.v{self.width}f32"
        self.declare(f"declare {self.vector} {name}({self.vector}, {self.vector}, {self.vector})")
        return self.assign(
            f"call {self.vector} {name}({self.vector} {left}, {self.vector} {right}, {self.vector} {addend})"
        )

    def relu(self, vector: Value) -> Value:
        """Replace negative lanes by zero."""
        # Not maxnum, which would return 0 for NaN: PyTorch's ReLU passes NaN on.
        return self.where("olt", vector, "zeroinitializer", "zeroinitializer", vector)

    def where(self, comparison: str, left: Value, right: Value, yes: Value, no: Value) -> Value:
        """Select lanes of ``yes`` where a comparison ("olt", …) of ``left`` and ``right`` holds, else of ``no``."""
        condition = self.assign(f"fcmp {comparison} {self.vector} {left}, {right}")
        return self.assign(f"select <{self.width} x i1> {condition}, {self.vector} {yes}, {self.vector} {no}")

    def binary(self, operation: str, left: Value, right: Value) -> Value:
        """Apply ``fadd``, ``fsub``, ``fmul`` or ``fdiv`` to two vectors."""
        return self.assign(f"{operation} {self.vector} {left}, {right}")

    def call_vector(self, name: str, vector: Value) -> Value:
        """Apply an intrinsic that has an instruction on all targets, such as ``llvm.sqrt``."""
        function = f"@{name}.v{self.width}f32"
        self.declare(f"declare {self.vector} {function}({self.vector})")
        return self.assign(f"call {self.vector} {function}({self.vector} {vector})")

    def number(self, number: float) -> Value:
        """Return a vector with a number, rounded to float32, in all lanes."""
        return self.constant(float_text(number))

    def prefetch(self, pointer: Value, offset: Index = 0, *, l1: bool = False, write: bool = False) -> None:
        """Prefetch a cache line to L2, to L1, or to L1 in exclusive state for writing. Any address is allowed."""
        self.declare("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        address, locality = self.offset(pointer, offset), _L1_HINT if l1 or write else _L2_HINT
        self.emit(f"call void @llvm.prefetch.p0(ptr {address}, i32 {write:d}, i32 {locality}, i32 1)")

    # Control flow

    def call(self, name: str, arguments: Sequence[tuple[str, Index]]) -> None:
        """Call a function of the same module that has no result."""
        self.emit(f"call void @{name}({', '.join(f'{kind} {value}' for kind, value in arguments)})")

    def call_shared(
        self,
        name: str,
        arguments: Sequence[tuple[str, str, Index]],
        build: Callable[[IRBuilder], None],
    ) -> None:
        """Call a function that is compiled once for all calls of this name in a module, and never inlined.

        Args:
            name: it has to state everything that the code depends on.
            arguments: (type, name of the parameter, value) of each.
            build: builds its body.
        """
        if name not in self._shared:
            parameters = [(kind, parameter) for kind, parameter, _ in arguments]
            self._shared[name] = IRBuilder(name, parameters, self.width, internal=True, inlined=False)
            build(self._shared[name])
        self.call(name, [(kind, value) for kind, _, value in arguments])

    def with_shared(self) -> Iterator[IRBuilder]:
        """Yield the shared functions that this one calls, directly or not, and then itself."""
        for function in self._shared.values():
            yield from function.with_shared()
        yield self

    @contextmanager
    def loop(
        self, begin: Index, end: Index, step: int = 1, carried: Sequence[Value] = (), *, runs: bool = False
    ) -> Iterator[Loop]:
        """Build the body of ``for (index = begin; index < end; index += step)`` inside of the ``with`` block.

        ``runs`` promises that the loop runs at least once, for bounds that are not known here.

        Raises:
            ValueError: known bounds leave no iteration, or vectors are carried through a loop with unknown bounds,
                which may have no iteration (the carried values would be undefined after it).
        """
        known = isinstance(begin, int) and isinstance(end, int)
        if (known and int(begin) >= int(end)) or (carried and not known and not runs):
            raise ValueError(f"A loop from {begin} to {end} cannot carry {len(carried)} values.")
        number = self._new_label()
        if not known and not runs:  # a loop that is tested at its end runs at least once, so skip it if it is empty
            some = self.assign(f"icmp ult i64 {begin}, {end}")
            self.emit(f"br i1 {some}, label %some{number}, label %after{number}")
            self._begin(f"some{number}", jump=False)
        before, head = self._block, self._begin(f"loop{number}")
        names = [f"%c{number}.{place}" for place in range(len(carried))]
        loop = Loop(f"%i{number}", names, list(names))
        marker = len(self._lines)
        yield loop
        following = self.assign(f"add nuw nsw i64 {loop.index}, {step}")
        again = self.assign(f"icmp ult i64 {following}, {end}")
        # Phi nodes must come first in the block, but name values from its end: insert them now.
        phis = [f"  {loop.index} = phi i64 [{begin}, %{before}], [{following}, %{self._block}]"]
        for name, first, value in zip(names, carried, loop.next, strict=True):
            phis.append(f"  {name} = phi {self.vector} [{first}, %{before}], [{value}, %{self._block}]")
        self._lines[marker:marker] = phis
        self.emit(f"br i1 {again}, label %{head}, label %after{number}")
        self._begin(f"after{number}", jump=False)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Build what runs if an i1 is true inside of the ``with`` block."""
        number = self._new_label()
        self.emit(f"br i1 {condition}, label %then{number}, label %after{number}")
        self._begin(f"then{number}", jump=False)
        yield
        self._begin(f"after{number}")

    def _new_label(self) -> int:
        self._num_labels += 1
        return self._num_labels

    def _begin(self, label: str, *, jump: bool = True) -> str:
        """Begin a basic block; ``jump`` there from the current one."""
        if jump:
            self.emit(f"br label %{label}")
        self._lines.append(f"{label}:")
        self._block = label
        return label


def float_text(number: float) -> str:
    """Spell a number, rounded to float32, as IR does: the bits of the float64 of the same value."""
    bits = struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<f", number))[0]))[0]
    return f"0x{bits:016X}"


def build_module(functions: Sequence[IRBuilder]) -> str:
    """Return the IR of a module of functions, with the shared functions and the declarations that they need."""
    distinct: dict[str, IRBuilder] = {}
    for function in functions:
        for one in function.with_shared():
            distinct.setdefault(one.name, one)
    declared = set[str]().union(*(one.declarations() for one in distinct.values()))
    return "\n".join(["".join(sorted(declared)), *(one.text() for one in distinct.values())])
