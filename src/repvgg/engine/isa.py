"""Which vectors a processor has: the widths and register counts that the kernels are written for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import final

from repvgg.errors import UsageError, require


@final
@dataclass(frozen=True)
class Isa:
    """The vectors of a processor, and the processor that machine code is made for.

    Attributes:
        name: of the set of instructions.
        width: floats in a vector.
        registers: vectors that the processor can hold.
        cpu: as LLVM calls the processor.
        features: as LLVM lists what it can do, "+fma,-avx512f"; "" for all that ``cpu`` stands for.
        triple: as LLVM calls the platform; "" for this one.
    """

    name: str
    width: int
    registers: int
    cpu: str
    features: str = ""
    triple: str = ""


#: What code can be made for anywhere, whatever processor makes it.
GENERIC: dict[str, Isa] = {
    "avx512": Isa("avx512", 16, 32, "x86-64-v4"),
    "avx2": Isa("avx2", 8, 16, "x86-64-v3"),
    "sse2": Isa("sse2", 4, 16, "x86-64"),
    "neon": Isa("neon", 4, 32, "cortex-a76", triple="aarch64-unknown-linux-gnu"),
}
#: For processors that nobody has written widths for: float by float.
SCALAR = Isa("scalar", 1, 16, "")
_AVX512 = ("avx512f", "avx512vl", "avx512dq", "avx512bw")


def host_isa() -> Isa:
    """The vectors of this processor; single floats where it is neither an x86-64 nor an ARM64.

    Raises:
        UsageError: the system is none of Linux and macOS.
        MissingDependencyError: llvmlite is not installed.
    """
    if sys.platform not in ("linux", "darwin"):
        raise UsageError(f"The engine runs on Linux and macOS, not on {sys.platform}: use PyTorch here.")
    binding = require("llvmlite.binding", "engine")
    machine = binding.get_default_triple().partition("-")[0]
    cpu, able = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    features = able.flatten()
    if machine in ("aarch64", "arm64"):
        return Isa("neon", 4, 32, cpu, features)
    if machine != "x86_64":
        return replace(SCALAR, cpu=cpu, features=features)
    kind = (
        "avx512"
        if all(able.get(name) for name in _AVX512)
        else "avx2"
        if able.get("avx2") and able.get("fma")
        else "sse2"
    )
    generic = GENERIC[kind]
    return Isa(kind, generic.width, generic.registers, cpu, features)
