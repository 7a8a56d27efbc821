"""The processors that a library is compiled for, and what runs code for them here."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from repvgg.engine.codegen.jit import GENERIC_ISAS, VectorIsa, host_isa
from repvgg.errors import UsageError, did_you_mean


@final
@dataclass(frozen=True)
class CpuTarget:
    """A family of processors: any of them runs the code, others are refused when a network is created.

    Attributes:
        name: as on the command line.
        isa: the vector instructions, and the processor that LLVM generates code for.
        baseline: the same for code that runs on all processors of the architecture.
        level: of x86-64 that the kernels need; 0 if the baseline is enough.
        machine: number of the architecture in ELF files.
        architecture: "x86_64" or "aarch64", as in the names of compilers and emulators.
    """

    name: str
    isa: VectorIsa
    baseline: VectorIsa
    level: int
    machine: int
    architecture: str

    @property
    def is_native(self) -> bool:
        """Whether this machine has the architecture; it may still lack instructions."""
        return sys.platform == "linux" and platform.machine() == self.architecture

    @property
    def linkers(self) -> Sequence[Sequence[str]]:
        """Commands that may link a shared library, the preferred first."""
        cross = f"{self.architecture}-linux-gnu"
        native = [["cc"], ["gcc"], ["clang"], ["ld"]] if self.is_native else []
        return [*native, [f"{cross}-gcc"], [f"{cross}-ld"], ["ld.lld"]]

    @property
    def compiler(self) -> str | None:
        """The C compiler of this machine for the target, or None."""
        names = ["cc", "gcc", "clang"] if self.is_native else [f"{self.architecture}-linux-gnu-gcc"]
        return next(filter(shutil.which, names), None)

    @property
    def emulator(self) -> str | None:
        """The emulator of this machine for programs of another architecture, or None."""
        name = f"qemu-{self.architecture}"
        return None if self.is_native else next(filter(shutil.which, (name, f"{name}-static")), None)


def _x86(name: str, isa: str, level: int) -> CpuTarget:
    triple = "x86_64-unknown-linux-gnu"
    vectors = replace(GENERIC_ISAS[isa], cpu=name, triple=triple)
    return CpuTarget(name, vectors, replace(GENERIC_ISAS["sse2"], triple=triple), level, 62, "x86_64")


# Not the Cortex-A76 of GENERIC_ISAS: it has instructions that a Raspberry Pi 4 lacks.
_ARM = replace(GENERIC_ISAS["neon"], cpu="generic")

#: By name, the widest of an architecture first.
CPU_TARGETS: dict[str, CpuTarget] = {
    one.name: one
    for one in (
        _x86("x86-64-v4", "avx512", 4),
        _x86("x86-64-v3", "avx2", 3),
        _x86("x86-64-v2", "sse2", 2),
        CpuTarget("aarch64", _ARM, _ARM, 0, 183, "aarch64"),
    )
}
NATIVE = "native"


def cpu_target(name: str) -> CpuTarget:
    """Return a target by name; "native" is the widest one that this machine runs.

    Raises:
        UsageError: there is no such target, or "native" is none of them.
        MissingDependencyError: llvmlite is not installed, which "native" needs.
    """
    if name in CPU_TARGETS:
        return CPU_TARGETS[name]
    if name != NATIVE:
        known = (*CPU_TARGETS, NATIVE)
        advice = did_you_mean(name, known, f"choose one of {', '.join(known)}.")
        raise UsageError(f"There is no target {name!r}: {advice}")
    isa = host_isa().name
    for target in CPU_TARGETS.values():
        if target.is_native and target.isa.name == isa:
            return target
    raise UsageError(f"A library needs Linux on x86-64 or ARM64: name its target, one of {', '.join(CPU_TARGETS)}.")
