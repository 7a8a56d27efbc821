"""From IR to machine code in this process, by llvmlite."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, final

from repvgg.engine.isa import Isa
from repvgg.errors import require

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
