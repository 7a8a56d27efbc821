"""Just-in-time compiler: LLVM IR to machine code in this process, by llvmlite; and the instruction sets it targets."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from repvgg.errors import UsageError, require

_IR_OPT_LEVEL, _CODEGEN_OPT_LEVEL = 2, 3  # as of `opt` and `llc`
# All of x86-64-v4 but CD: AVX-512 F alone (Knights Landing) lacks the 256-bit forms and float logic.
_AVX512 = ("avx512f", "avx512vl", "avx512dq", "avx512bw")


@final
@dataclass(frozen=True)
class VectorIsa:
    """A vector instruction set, and the processor that LLVM generates code for."""

    name: str  # "avx512", "avx2", "sse2", "neon" or "scalar"
    width: int  # floats in a vector register
    registers: int  # architectural vector registers
    cpu: str  # LLVM's name of the processor
    features: str = ""  # LLVM's feature string, such as "+fma,-avx512f"; "" for the defaults of ``cpu``
    triple: str = ""  # LLVM's name of the platform; "" for this one


#: Baseline processors, for code that is compiled on any machine: tests inspect their assembly.
GENERIC_ISAS: dict[str, VectorIsa] = {
    "avx512": VectorIsa("avx512", 16, 32, "x86-64-v4"),
    "avx2": VectorIsa("avx2", 8, 16, "x86-64-v3"),
    "sse2": VectorIsa("sse2", 4, 16, "x86-64"),
    "neon": VectorIsa("neon", 4, 32, "cortex-a76", triple="aarch64-unknown-linux-gnu"),
}
#: For architectures other than x86-64 and ARM64: one float at a time.
SCALAR_ISA = VectorIsa("scalar", 1, 16, "")


def host_isa() -> VectorIsa:
    """Return the widest vector instruction set of this processor.

    Raises:
        UsageError: the system is neither Linux nor macOS.
        MissingDependencyError: llvmlite is not installed.
    """
    if sys.platform not in ("linux", "darwin"):
        raise UsageError(f"The engine runs on Linux and macOS, not on {sys.platform}: use PyTorch here.")
    binding = require("llvmlite.binding", "engine")
    architecture = binding.get_default_triple().partition("-")[0]
    cpu, available = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    features = available.flatten()
    if architecture in ("aarch64", "arm64"):
        return VectorIsa("neon", 4, 32, cpu, features)
    if architecture != "x86_64":
        return replace(SCALAR_ISA, cpu=cpu, features=features)
    if all(available.get(name) for name in _AVX512):
        name = "avx512"
    else:
        name = "avx2" if available.get("avx2") and available.get("fma") else "sse2"
    generic = GENERIC_ISAS[name]
    return VectorIsa(name, generic.width, generic.registers, cpu, features)


def compile_to_object(ir: str, isa: VectorIsa) -> bytes:
    """Compile a module of IR to an object file.

    Raises:
        MissingDependencyError: llvmlite is not installed.
        RuntimeError: the IR is malformed, or LLVM has no such processor.
    """
    machine, module = _optimize(ir, isa)
    code: bytes = machine.emit_object(module)
    return code


def compile_to_relocatable(modules: Sequence[str], isa: VectorIsa, exported: Collection[str]) -> bytes:
    """Link modules of IR and compile them to an object file for a linker: code that runs at any address.

    Args:
        modules: IR; functions of one may call those of another.
        isa: ``triple`` names the platform.
        exported: functions that other objects may refer to; all others become local.

    Raises:
        MissingDependencyError: llvmlite is not installed.
        RuntimeError: the IR is malformed, or LLVM has no such processor.
    """
    binding, machine = require("llvmlite.binding", "engine"), _target_machine(isa, relocatable=True)
    binding.initialize_native_asmparser()  # library.c asks x86 processors what they are, which takes inline assembly
    linked = None
    for ir in modules:
        module = binding.parse_assembly(ir)
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        if linked is None:
            linked = module
        else:
            linked.link_in(module)
    assert linked is not None
    for function in linked.functions:
        if not function.is_declaration and function.name not in exported:
            function.linkage = "internal"
    _run_passes(machine, linked)
    code: bytes = machine.emit_object(linked)
    return code


def compile_to_assembly(ir: str, isa: VectorIsa) -> str:
    """Compile a module of IR to assembly, to search it for register spills. Raises as :func:`compile_to_object`."""
    machine, module = _optimize(ir, isa)
    text: str = machine.emit_assembly(module)
    return text


def _optimize(ir: str, isa: VectorIsa) -> tuple[Any, Any]:
    """Parse and optimize IR; return the target machine and the module."""
    machine, binding = _target_machine(isa), require("llvmlite.binding", "engine")
    module = binding.parse_assembly(ir)
    # The IR names no target: the same text is compiled for any processor.
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    _run_passes(machine, module)
    return machine, module


def _run_passes(machine: Any, module: Any) -> None:
    """Verify and optimize a module."""
    binding = require("llvmlite.binding", "engine")
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=_IR_OPT_LEVEL)
    # Kernels are vectorized, and unrolled to fill the register file: more of either would spill registers.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)


def _target_machine(isa: VectorIsa, *, relocatable: bool = False) -> Any:
    binding = require("llvmlite.binding", "engine")
    if isa.triple:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
    else:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    target = binding.Target.from_triple(isa.triple or binding.get_process_triple())
    options = {"reloc": "pic", "codemodel": "small"} if relocatable else {"jit": True}
    return target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=_CODEGEN_OPT_LEVEL, **options)


@final
class MachineCode:
    """Object files loaded into executable memory, which is freed with this object.

    Args:
        objects: object files by :func:`compile_to_object` for this processor.
        isa: what they were compiled for.
    """

    def __init__(self, objects: Iterable[bytes], isa: VectorIsa) -> None:
        binding = require("llvmlite.binding", "engine")
        # MCJIT needs a module, though all code comes from object files, which may be cached on disk.
        empty = binding.parse_assembly("")
        # llvmlite's memory manager keeps the sections of an object together. LLVM's own may place constants more than
        # 2 GiB away from the code that refers to them, which aborts the process.
        self._engine = binding.create_mcjit_compiler(empty, _target_machine(isa), use_lmm=True)
        for code in objects:
            self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        # Not at exit: daemon threads of the pool may run this code until the process ends.
        weakref.finalize(self, self._engine.close).atexit = False

    def address(self, name: str) -> int:
        """Return the address of a function.

        Raises:
            KeyError: there is no function of that name.
        """
        address: int = self._engine.get_function_address(name)
        if not address:
            raise KeyError(name)
        return address
