"""Build a C library of a plan: object files, a static archive, and a shared library where there is a linker."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

import repvgg.engine.runtime
from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import compile_to_relocatable
from repvgg.engine.executable import kernel_functions
from repvgg.engine.library.description import WEIGHTS_HEADER, NetworkData, describe_network
from repvgg.engine.library.object_file import ArchiveMember, write_archive, write_constants
from repvgg.engine.library.targets import CpuTarget
from repvgg.engine.planner.steps import Plan
from repvgg.errors import ExportError, UsageError, first_line

RUNTIME = Path(repvgg.engine.runtime.__path__[0])
FUNCTIONS = tuple(
    f"model_{name}"
    for name in (
        *("create", "run", "run_strided", "destroy", "threads", "last_error", "version", "max_images"),
        *("num_inputs", "num_outputs", "input_shape", "output_shape", "input_size", "output_size"),
    )
)
#: Code refers to embedded weights by 32-bit offsets; the rest is for the code, and for programs that link it.
MAX_EMBEDDED_BYTES = 2**31 - 2**28
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,30}")


@final
@dataclass(frozen=True)
class BuiltLibrary:
    """Files of a library.

    Attributes:
        name: of the library; its functions begin with it.
        target: the processors.
        archive: ``libNAME.a``.
        shared: ``libNAME.so``; None without a linker for the target.
        weights: the file of weights; None if the library contains them.
        weights_bytes: of the packed weights.
    """

    name: str
    target: CpuTarget
    archive: Path
    shared: Path | None
    weights: Path | None
    weights_bytes: int


def check_name(name: str) -> None:
    """Check the name of a library, with which its functions begin.

    Raises:
        UsageError: it is not a C identifier of at most 31 characters.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"Functions of the library begin with its name: {name!r} is no C identifier.")


def build_library(
    plan: Plan,
    folder: Path,
    target: CpuTarget,
    *,
    name: str = "model",
    version: str = "",
    threads: int = 0,
    embed_weights: bool = True,
) -> BuiltLibrary:
    """Compile a plan and write ``libNAME.a``, ``libNAME.so``, and ``NAME.weights`` unless they are embedded.

    Args:
        plan: made for the instructions of ``target``, with its weights.
        folder: exists.
        target: the processors.
        name: of the library; its functions begin with it.
        version: what ``model_version`` returns.
        threads: by default; 0 for one for each processor.
        embed_weights: put the weights into the library.

    Raises:
        UsageError: the weights are too large to embed, or the name is no C identifier.
        ExportError: the linker failed.
    """
    check_name(name)
    names, functions = kernel_functions(plan)
    kernels = {kernel: index for index, kernel in enumerate(names)}
    data = describe_network(plan, kernels, version=version, level=target.level, threads=threads, embedded=embed_weights)
    if embed_weights and data.weights_bytes > MAX_EMBEDDED_BYTES:
        raise UsageError(
            f"The packed weights take {data.weights_bytes / 2**30:.1f} GiB, too much to be part of a library: write "
            "them to a file next to it (--packed-weights file), or export for a smaller batch."
        )
    weights = None if embed_weights else folder / f"{name}.weights"
    with TemporaryDirectory(prefix=".objects-", dir=folder) as temporary:
        objects = Path(temporary)
        table = ", ".join(f"ptr @{function}" for function in names.values())
        kernel_table = f"@{name}_kernels = hidden constant [{len(names)} x ptr] [{table}]\n"
        code = compile_to_relocatable([build_module(functions) + kernel_table], target.isa, ())
        (objects / "kernels.o").write_bytes(code)
        interface = [_rename(_runtime_ir(one, target), name) for one in ("library", "thread_pool")]
        exported = [one.replace("model", name, 1) for one in FUNCTIONS]
        (objects / "interface.o").write_bytes(compile_to_relocatable(interface, target.baseline, exported))
        content = data.weights if embed_weights else []
        constants = {f"{name}_description": [data.description], f"{name}_weights": content}
        write_constants(objects / "data.o", target.machine, constants)
        if weights:
            _write_weights(weights, data)
        members = [
            ArchiveMember(objects / "interface.o", exported),
            ArchiveMember(objects / "kernels.o", [f"{name}_kernels"]),
            ArchiveMember(objects / "data.o", [*constants]),
        ]
        archive = folder / f"lib{name}.a"
        write_archive(archive, members)
        shared = folder / f"lib{name}.so"
        linked = _link([member.path for member in members], shared, target)
    return BuiltLibrary(name, target, archive, shared if linked else None, weights, data.weights_bytes)


def _runtime_ir(stem: str, target: CpuTarget) -> str:
    return (RUNTIME / f"{stem}.linux_{target.architecture}.ll").read_text()


def _rename(ir: str, name: str) -> str:
    return re.sub(r"@model_", f"@{name}_", ir)


def _write_weights(path: Path, data: NetworkData) -> None:
    with path.open("wb") as file:
        file.write(data.weights_id.ljust(WEIGHTS_HEADER, b"\0"))
        for one in data.weights:
            file.write(one)


def find_linker(target: CpuTarget) -> list[str] | None:
    """Return the command of a linker for a target on this machine, without files; None if there is none."""
    return next((list(command) for command in target.linkers if shutil.which(command[0])), None)


def _link(objects: list[Path], shared: Path, target: CpuTarget) -> bool:
    """Link a shared library; return False if there is no linker.

    Raises:
        ExportError: the linker failed.
    """
    linker = find_linker(target)
    if linker is None:
        return False
    is_compiler = linker[0].endswith(("cc", "clang"))
    options = (
        ["-Wl,-z,noexecstack", "-Wl,-z,relro", f"-Wl,-soname,{shared.name}", "-pthread"]
        if is_compiler
        else ["-z", "noexecstack", "-z", "relro", "-soname", shared.name]
    )
    command = [*linker, "-shared", "-o", str(shared), *map(str, objects), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{linker[0]} could not link {shared.name}: {first_line(done.stderr)}.")
    return True
