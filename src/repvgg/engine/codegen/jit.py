"""From IR to machine code in this process, by llvmlite.

Which vectors a processor has: the widths and register counts that the kernels are written for.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, final

from repvgg.errors import UsageError, require

_OPTIMIZE = 2


def object_code(ir: str, isa: Isa) -> bytes:
    """Machine code of a module of IR, as an object file.

    Loops are neither vectorized nor unrolled: the kernels say themselves what they want.

    Raises:
        MissingDependencyError: llvmlite is not installed.
        RuntimeError: the IR is malformed, or LLVM has no such processor.
    """
    machine, module = _optimized(ir, isa)
    code: bytes = machine.emit_object(module)
    return code


def assembly(ir: str, isa: Isa) -> str:
    """The same as text, for those who look for spills. See :func:`object_code` for the errors."""
    machine, module = _optimized(ir, isa)
    text: str = machine.emit_assembly(module)
    return text


def _optimized(ir: str, isa: Isa) -> tuple[Any, Any]:
    machine, binding = _machine(isa), require("llvmlite.binding", "engine")
    module = binding.parse_assembly(ir)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=_OPTIMIZE)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine, module


def _machine(isa: Isa) -> Any:
    binding = require("llvmlite.binding", "engine")
    if isa.triple:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
    else:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(isa.triple or binding.get_process_triple())
    return target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, jit=True)


@final
class Code:
    """Machine code that is ready to be called; its memory goes when the last reference to it does.

    Args:
        objects: object files made by :func:`object_code` for this processor.
        isa: what they were made for.
    """

    def __init__(self, objects: Iterable[bytes], isa: Isa) -> None:
        binding = require("llvmlite.binding", "engine")
        empty = binding.parse_assembly("")
        self._engine = binding.create_mcjit_compiler(empty, _machine(isa))
        for code in objects:
            self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        weakref.finalize(self, self._engine.close).atexit = False  # a daemon thread may be inside until the very end

    def address(self, name: str) -> int:
        """Where a function begins.

        Raises:
            KeyError: there is none of that name.
        """
        address: int = self._engine.get_function_address(name)
        if not address:
            raise KeyError(name)
        return address


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
