"""Export to a C library: a folder with the library, its header, an example and build files, compared before it is kept.

The engine compiles it (:mod:`repvgg.engine.library`); :mod:`repvgg.deploy.c_comparison` runs and compares it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal, final

from torch import Tensor, nn

from repvgg._files import atomic_folder, check_output_folder
from repvgg.checkpoints import Metadata
from repvgg.deploy.c_comparison import compare_library
from repvgg.deploy.c_runner import LibraryRunner, notes_file
from repvgg.deploy.notes import write_notes
from repvgg.deploy.preprocessing import notes_of
from repvgg.deploy.targets import TARGETS, Exported, ExportRequest, Shape
from repvgg.engine.frontend import read
from repvgg.engine.graph import Graph, infer_shapes
from repvgg.engine.library.build import RUNTIME, BuiltLibrary, build_library, check_name
from repvgg.engine.library.targets import NATIVE, CpuTarget, cpu_target
from repvgg.engine.planner.algorithms import Precision, Target, check_precision
from repvgg.engine.planner.machine_costs import machine_costs
from repvgg.engine.planner.plan import plan
from repvgg.engine.planner.selection_cache import select_cached
from repvgg.engine.runtime.thread_pool import thread_count
from repvgg.errors import UsageError
from repvgg.verify import Evidence

_TEMPLATES = Path(__file__).with_name("c_templates")
_PROCESSORS = {
    "x86-64-v4": "processors with AVX-512 (most Intel servers since 2017, AMD since Zen 4)",
    "x86-64-v3": "processors with AVX2 and FMA (Intel since Haswell, AMD since Zen)",
    "x86-64-v2": "processors with SSE4.2 (nearly all of x86-64 since 2009)",
    "aarch64": "64-bit ARM processors (ARMv8-A with NEON)",
}


@final
@dataclass(frozen=True)
class CExport:
    """A C library that was written.

    Attributes:
        path: the folder.
        target: the processors.
        evidence: of the comparison with the reference; None if it was not run.
        ran: how it was run, or why not, in words.
        remarks: what is missing, a sentence each.
        library_bytes: size of the static archive.
        weights_bytes: of the packed weights.
    """

    path: Path
    target: CpuTarget
    evidence: Evidence | None
    ran: str
    remarks: tuple[str, ...]
    library_bytes: int
    weights_bytes: int


def export(request: ExportRequest) -> Exported:
    """Write the folder of a request; the target "c" of the table."""
    options = dict(request.options)
    options["weights"] = options.pop("packed_weights", "embedded")
    done = export_c(
        request.reference,
        request.plain,
        request.out,
        [request.input_shape],
        images=request.images,
        overwrite=request.overwrite,
        notes=notes_of(request.notes, request.preprocessing),
        **options,
    )
    size = f"{_size(done.library_bytes)} with the weights"
    if options["weights"] == "file":
        size = f"{_size(done.library_bytes)} and {_size(done.weights_bytes)} of weights"
    images = " x ".join(map(str, request.input_shape))
    most = options.get("max_batch", 1)
    number = "one image" if most == 1 else f"up to {most} images"
    contents = f"a library for {done.target.name}, {size}, {number} of {images} at once"
    return Exported(done.path, contents, done.evidence, (done.ran, *done.remarks))


def load(path: Path, threads: int | None = None) -> LibraryRunner:
    """Open a library or the folder of one; see :class:`repvgg.deploy.c_runner.LibraryRunner`."""
    return LibraryRunner(path, threads)


def export_c(
    reference: nn.Module,
    plain: nn.Module,
    folder: str | os.PathLike[str],
    input_shapes: Sequence[Shape],
    *,
    target: str = NATIVE,
    max_batch: int = 1,
    threads: int | None = None,
    weights: Literal["embedded", "file"] = "embedded",
    name: str = "model",
    precision: Precision = "high",
    images: Sequence[Tensor] = (),
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> CExport:
    """Compile ``plain`` to a C library that needs no Python, and keep it only if it equals ``reference``.

    The folder gets ``libNAME.a``, ``libNAME.so`` (where there is a linker), ``NAME.h``, ``example.c``,
    ``CMakeLists.txt``, a ``README.md``, notes in ``NAME.json``, and ``NAME.weights`` if the weights are not inside of
    the library.

    Args:
        reference: the function as it should be.
        plain: what is compiled; see :func:`repvgg.engine.compile`.
        folder: its parent folder exists.
        input_shapes: (C, H, W) of an image of each input.
        target: a name of :data:`repvgg.engine.library.targets.CPU_TARGETS`, or "native".
        max_batch: the largest number of images of a call.
        threads: by default, and what the algorithms are selected for; None for those of this process.
        weights: inside of the library, or in a file next to it.
        name: of the library; its functions begin with it.
        precision: see :func:`repvgg.engine.compile`.
        images: batches of real images of the first input, to compare on beside images that reveal errors at borders.
        overwrite: replace an exported folder.
        notes: texts about the network for its README: "source", "weights".

    Raises:
        UsageError: an argument is invalid, or the weights are too large to embed.
        UnsupportedError: the engine does not support some calls of the model.
        OutputError: the folder cannot be written, or exists and ``overwrite`` is not set.
        ExportError: the linker failed, or the library does not run.
        EquivalenceError: the library computes another function.
    """
    check_output_folder(folder, TARGETS["c"].replaceable, overwrite=overwrite)
    check_name(name)
    cpu = cpu_target(target)
    if max_batch < 1:
        raise UsageError(f"The largest batch has at least one image, not {max_batch}.")
    if weights not in ("embedded", "file"):
        raise UsageError(f"Weights are 'embedded' or in a 'file', not {weights!r}.")
    check_precision(precision)
    count = thread_count(threads)
    shapes = [(max_batch, *shape) for shape in input_shapes]
    graph = read(plain, shapes)
    prepared = plan(graph, shapes, Target(cpu.isa, count, precision, machine_costs(cpu.isa)), select_cached)
    network = type(reference).__name__
    with atomic_folder(folder, TARGETS["c"].replaceable, overwrite=overwrite) as part:
        built = build_library(
            prepared,
            part,
            cpu,
            name=name,
            version=f"repvgg {_version()}, {cpu.name}, {network}",
            threads=count,
            embed_weights=weights == "embedded",
        )
        _write_sources(part, name, embedded=weights == "embedded")
        write_notes(notes_file(part / f"lib{name}.so"), f"lib{name}.so", notes or {})
        evidence, ran = compare_library(reference, graph, built, shapes, images)
        size = built.archive.stat().st_size
        remarks = () if built.shared else (_no_linker(built),)
        done = CExport(Path(folder), cpu, evidence, ran, remarks, size, built.weights_bytes)
        text = _readme(part, done, network, _tensors(graph, shapes), shapes[0][0], count, notes or {})
        (part / "README.md").write_text(text, encoding="utf-8")
    return done


def _version() -> str:
    from repvgg import __version__

    return __version__


def _no_linker(built: BuiltLibrary) -> str:
    tools = " or ".join(command[0] for command in built.target.linkers)
    return f"lib{built.name}.so was not written: there is no linker for {built.target.architecture} here ({tools})."


# Texts


def _named(text: str, name: str) -> str:
    """Replace the name of the library in C and CMake."""
    text = text.replace("REPVGG_MODEL_H", f"REPVGG_{name.upper()}_H")
    text = re.sub(r"\bMODEL(?=_)", name.upper(), text)
    return re.sub(r"\bmodel(?=\b|_)|(?<=\blib)model\b", name, text)


def _write_sources(folder: Path, name: str, *, embedded: bool) -> None:
    header = _named((RUNTIME / "model.h").read_text(encoding="utf-8"), name)
    (folder / f"{name}.h").write_text(header, encoding="utf-8")
    example = (_TEMPLATES / "example.c").read_text(encoding="utf-8")
    if not embedded:
        example = example.replace("#define WEIGHTS NULL", '#define WEIGHTS "model.weights" /* in this folder */')
    (folder / "example.c").write_text(_named(example, name), encoding="utf-8")
    cmake = (_TEMPLATES / "CMakeLists.txt").read_text(encoding="utf-8")
    (folder / "CMakeLists.txt").write_text(_named(cmake, name), encoding="utf-8")


def _tensors(graph: Graph, shapes: Sequence[tuple[int, int, int, int]]) -> list[str]:
    """Return a line for each input and output."""
    values = infer_shapes(graph, [shape[2:] for shape in shapes])
    lines = [f"- input {number}: float32 (N, {', '.join(map(str, shape[1:]))})" for number, shape in enumerate(shapes)]
    for number, output in enumerate(graph.outputs):
        shape = output.shape_of(values[output.value])
        lines.append(f"- output {number}: float32 ({', '.join(map(str, ('N', *shape)))})")
    return lines


def _readme(
    folder: Path,
    done: CExport,
    network: str,
    tensors: Sequence[str],
    max_images: int,
    threads: int,
    notes: Mapping[str, str],
) -> str:
    name = next(folder.glob("lib*.a")).stem.removeprefix("lib")
    about = {
        f"lib{name}.a": "static library",
        f"lib{name}.so": "shared library",
        f"{name}.weights": "weights: pass its path to the function that creates a network",
        f"{name}.h": "interface",
        f"{name}.json": "what is known about the network, for `repvgg predict`",
        "example.c": "a program that runs images",
        "CMakeLists.txt": "the library as a target of CMake",
    }
    written = {folder / file: what for file, what in about.items() if (folder / file).exists()}
    files = [f"| `{file.name}` | {what}, {_size(file.stat().st_size)} |" for file, what in written.items()]
    if done.evidence is None:
        comparison = f"**Not compared with the source:** {done.ran}"
    else:
        comparison = (
            f"Compared with the source in float64: relative error {done.evidence.relative:.1e}, "
            f"{done.evidence.tolerance:.1e} allowed ({done.evidence.tolerance_origin}); {done.ran}"
        )
    origin = [f"- {key}: {value}" for key, value in notes.items() if key in ("source", "weights")]
    return Template((_TEMPLATES / "README.md").read_text(encoding="utf-8")).substitute(
        name=name,
        network=network,
        version=_version(),
        target=done.target.name,
        processors=_PROCESSORS[done.target.name],
        files="\n".join(files),
        tensors="\n".join([*origin, *tensors]),
        max_images=max_images,
        threads=f"{threads} {'thread' if threads == 1 else 'threads'}",
        preprocessing=_preprocessing(notes),
        comparison=comparison,
    )


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def _preprocessing(notes: Mapping[str, str]) -> str:
    """Return how pixels become inputs, where the header of a checkpoint says it."""
    metadata = Metadata.from_header(dict(notes), "the source")
    classes = metadata.classes if metadata else ()
    names = f" Output k is the logit of class k: {', '.join(classes)}." if classes else ""
    if metadata is None or not metadata.mean:
        return f"The library takes images as the network was trained on them: normalize pixels first.{names}"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (metadata.mean, metadata.std))
    return f"Inputs are `(pixel - mean) / std` per channel, pixels in [0, 1], mean {mean}, std {std}.{names}"
