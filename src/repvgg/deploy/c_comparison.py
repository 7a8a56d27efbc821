"""Run a C library and compare it with the network that it was made of, in float64.

A library for this machine is loaded. One for another architecture is linked with the example program and run in an
emulator, if there is a cross compiler and an emulator; otherwise it is compiled only, and the result says so.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from repvgg._calls import Call
from repvgg.engine.graph import Graph, infer_shapes
from repvgg.engine.library.build import BuiltLibrary
from repvgg.engine.library.loaded import load, load_archive
from repvgg.engine.library.targets import NATIVE, cpu_target
from repvgg.engine.nested import map_structure
from repvgg.errors import ExportError, first_line
from repvgg.verify import Evidence, border_inputs, verify

_EMULATION_SECONDS = 3600

Shapes = Sequence[tuple[int, int, int, int]]
Run = Callable[..., Any]


def compare_library(
    reference: nn.Module, graph: Graph, built: BuiltLibrary, shapes: Shapes, images: Sequence[Tensor] = ()
) -> tuple[Evidence | None, str]:
    """Compare a library with a reference, where it can run.

    It runs on images that reveal errors at borders, one and as many as it takes, and on the given ones.

    Args:
        reference: the function as it should be.
        graph: what was compiled.
        built: the library, in its folder with ``example.c``.
        shapes: (N, C, H, W) of each input, where N is the largest batch.
        images: batches of the first input.

    Returns:
        The evidence, which passed, or None; and how the library ran, or why not, in a sentence.

    Raises:
        EquivalenceError: the library computes another function.
        ExportError: it does not run.
    """
    with TemporaryDirectory() as temporary:
        run, how = _runner(graph, built, shapes, Path(temporary))
        if run is None:
            return None, how

        def candidate(*inputs: Tensor) -> Any:
            found = run(*inputs)
            outputs = found if isinstance(found, tuple) else (found,)
            return map_structure(lambda place: outputs[place] if type(place) is int else place, graph.structure)

        largest = shapes[0][0]
        calls = [
            Call(
                tuple(border_inputs((batch, *shape[1:]), batches=1, seed=seed)[0] for seed, shape in enumerate(shapes))
            )
            for batch in sorted({largest, 1}, reverse=True)
        ]
        calls += [Call((part,)) for batch in images for part in torch.split(batch, largest)]
        return verify(reference, candidate, calls).raise_if_failed(), how


def _runner(graph: Graph, built: BuiltLibrary, shapes: Shapes, temporary: Path) -> tuple[Run | None, str]:
    """Return a function that runs the library, and how; or None, and why it cannot run here."""
    target = built.target
    if target.is_native:
        if target.level > cpu_target(NATIVE).level:
            return None, f"compiled, not run: this processor lacks instructions of {target.name}."
        if built.shared is not None:
            return load(built.shared, weights=built.weights), f"{built.shared.name} was loaded and run on this machine."
        library = load_archive(built.archive, weights=built.weights)
        return library, f"{built.archive.name} was loaded by LLVM and run on this machine."
    if target.emulator is None or target.compiler is None:
        tools = f"qemu-{target.architecture} and {target.architecture}-linux-gnu-gcc"
        return None, f"compiled, not run: {tools} are needed to run it here."
    values = infer_shapes(graph, [shape[2:] for shape in shapes])
    outputs = [output.shape_of(values[output.value]) for output in graph.outputs]
    program = compile_example(built, temporary)
    return EmulatedExample(program, target.emulator, built.archive.parent, outputs), f"it ran in {target.emulator}."


def compile_example(built: BuiltLibrary, folder: Path) -> Path:
    """Compile ``example.c`` next to a library, and link both into a program without shared libraries.

    Raises:
        ExportError: there is no compiler, or it failed.
    """
    compiler = built.target.compiler
    if compiler is None:
        raise ExportError(f"There is no C compiler for {built.target.architecture} here.")
    program = folder / "example"
    sources = [str(built.archive.parent / "example.c"), str(built.archive)]
    command = [compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    done = subprocess.run([*command, "-o", str(program), *sources], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{compiler} could not link the library: {first_line(done.stderr)}.")
    return program


@final
class EmulatedExample:
    """The example program of a library in an emulator, as a function of images.

    Args:
        program: by :func:`compile_example`.
        emulator: the command that runs it.
        folder: of the library, where the program finds its weights.
        outputs: the shape of each output for one image.
    """

    def __init__(self, program: Path, emulator: str, folder: Path, outputs: Sequence[tuple[int, ...]]) -> None:
        self._program, self._emulator, self._folder, self._outputs = program, emulator, folder, outputs

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs. Raises ExportError if the program fails or takes too long."""
        given, found = self._program.with_suffix(".in"), self._program.with_suffix(".out")
        with given.open("wb") as file:
            for one in inputs:
                file.write(np.ascontiguousarray(one.numpy(), np.float32).data)
        count = len(inputs[0])
        command = [self._emulator, *map(str, (self._program, given, found, count))]
        try:
            done = subprocess.run(
                command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=_EMULATION_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"The library ran for more than {_EMULATION_SECONDS} s in {self._emulator}: use fewer images, or "
                "export for a smaller batch."
            ) from error
        if done.returncode:
            reason = first_line(done.stderr or f"exit code {done.returncode}")
            raise ExportError(f"The library does not run in {self._emulator}: {reason}.")
        numbers, at, outputs = np.fromfile(found, np.float32), 0, []
        for shape in self._outputs:
            size = count * int(np.prod(shape))
            outputs.append(torch.from_numpy(numbers[at : at + size].reshape(count, *shape)))
            at += size
        return tuple(outputs)
