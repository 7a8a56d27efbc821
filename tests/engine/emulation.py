"""Kernels and networks as ARM64 code in an emulator, for the same test bodies as the instruction sets of this machine.

Debian: ``apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross``. These tests are ``slow``, and skipped
where the emulator or the cross compiler is missing.
"""

import atexit
import itertools
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import repvgg.deploy
from repvgg.deploy.c_comparison import EmulatedExample
from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import VectorIsa, compile_to_relocatable
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.graph import Graph, Shape, infer_shapes
from repvgg.engine.library.build import RUNTIME, build_library
from repvgg.engine.library.targets import CPU_TARGETS
from repvgg.engine.nested import map_structure
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.plan import plan

ARM = CPU_TARGETS["aarch64"]
EXAMPLE = Path(repvgg.deploy.__path__[0]) / "c_templates" / "example.c"
KERNEL_RUNNER = Path(__file__).with_name("run_kernel.c")
NEEDS_EMULATOR = pytest.mark.skipif(
    not ARM.is_native and (ARM.emulator is None or ARM.compiler is None),
    reason="needs qemu-aarch64 and aarch64-linux-gnu-gcc",
)
MARKS = [pytest.mark.slow, NEEDS_EMULATOR]


def emulated_isas() -> list[VectorIsa]:
    """Return the instruction sets that run in an emulator here: NEON, unless this machine has it."""
    return [] if ARM.is_native else [ARM.isa]


def is_emulated(isa: Any) -> bool:
    return isa in emulated_isas()


def isa_parameters(native: Sequence[VectorIsa]) -> list[Any]:
    """Return instruction sets as test parameters; those that are emulated are marked."""
    emulated = [pytest.param(isa, id=isa.name, marks=MARKS) for isa in emulated_isas()]
    return [*(pytest.param(isa, id=isa.name) for isa in native), *emulated]


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="repvgg-emulation-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _object(source: Path) -> Path:
    """Compile a C source of the tests or of the library to an object file, once."""
    out = _folder() / f"{source.stem}.o"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(RUNTIME)]
    subprocess.run([str(ARM.compiler), *flags, "-c", "-o", str(out), str(source)], check=True)
    return out


def _link(program: Path, *files: Path) -> None:
    command = [str(ARM.compiler), "-static", "-pthread", "-o", str(program), *map(str, files)]
    subprocess.run(command, check=True)


_numbers = itertools.count()


def run_kernel(
    kernel: Any, arrays: Sequence[np.ndarray], target: int, batch: int, cuts: Sequence[int], isa: VectorIsa
) -> None:
    """Run the units of a kernel between each two cuts, the last ones first; write ``arrays[target]``."""
    base = _folder() / f"kernel{next(_numbers)}"
    code, program, job, result = (base.with_suffix(suffix) for suffix in (".o", ".program", ".job", ".result"))
    code.write_bytes(compile_to_relocatable([build_module(kernel.emit("kernel"))], isa, {"kernel"}))
    _link(program, _object(KERNEL_RUNNER), code)
    head = [batch, len(cuts) - 1, *cuts, *(array.nbytes for array in arrays)]
    job.write_bytes(np.array(head, np.int64).tobytes() + b"".join(array.tobytes() for array in arrays))
    done = subprocess.run([str(ARM.emulator), str(program), str(job), str(result)], check=False, timeout=250)
    assert done.returncode == 0, "3: memory around an array was written to"
    arrays[target][...] = np.frombuffer(result.read_bytes(), arrays[target].dtype).reshape(arrays[target].shape)
    for file in (code, program, job, result):
        file.unlink()


class EmulatedModel:
    """A network as an ARM64 program, called like a compiled model; batches up to that of ``shapes``."""

    def __init__(
        self, graph: Graph, shapes: Sequence[Shape], isa: VectorIsa, threads: int = 1, precision: Any = "high"
    ) -> None:
        folder = Path(tempfile.mkdtemp(dir=_folder()))
        weakref.finalize(self, shutil.rmtree, folder)
        built = build_library(plan(graph, shapes, Target(isa, threads, precision)), folder, ARM, threads=threads)
        _link(folder / "example", _object(EXAMPLE), built.archive)
        values = infer_shapes(graph, [shape[2:] for shape in shapes])
        outputs = [output.shape_of(values[output.value]) for output in graph.outputs]
        self._run, self._structure = EmulatedExample(folder / "example", str(ARM.emulator), folder, outputs), graph

    def __call__(self, *inputs: Any) -> Any:
        found = self._run(*inputs)
        return map_structure(lambda place: found[place] if type(place) is int else place, self._structure.structure)


def compile_for(
    graph: Graph, shapes: Sequence[Shape], isa: VectorIsa | None, threads: int = 1, precision: Any = "high"
) -> Any:
    """Return a network for an instruction set, as code of this process or in an emulator."""
    if is_emulated(isa):
        return EmulatedModel(graph, shapes, isa, threads, precision)
    return CompiledModel(graph, shapes, isa, threads, precision)
