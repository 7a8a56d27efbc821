"""Export a network to every target: a folder of files, and a table of their sizes, errors and latencies."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal, final

import torch
from torch import Tensor

from repvgg._files import atomic_folder, check_output_folder
from repvgg._serde import to_json
from repvgg.deploy.targets import TARGETS, Exported, ExportRequest, ExportTarget, export, target_module
from repvgg.errors import EquivalenceError, ExportError, MissingDependencyError, RepvggError, first_line
from repvgg.measure import INTERLEAVED, REST_SECONDS, take_samples

TABLE = "export.json"
_PAGE = "README.md"
_WARMUP_SECONDS = 0.2

Status = Literal["equal", "not run", "different", "failed", "not installed"]


@final
@dataclass(frozen=True)
class Row:
    """A target in the table.

    Attributes:
        target: its name.
        status: whether the file was written and is equal to the source where it ran.
        reason: why it was not run or not written, a clause; how it was compared otherwise.
        file: its name in the folder; "" if there is none.
        size: of all its files, in bytes.
        error: relative error on border images; None where it was not run.
        photograph_error: on photographs.
        tolerance: of both.
        milliseconds: for one image: quartiles; None where it was not run.
        batch: what it takes, in words.
        inputs: shapes by name.
        outputs: names.
        operators: of its graph, in words.
        remarks: what else is known.
    """

    target: str
    status: Status
    reason: str
    file: str = ""
    size: int | None = None
    error: float | None = None
    photograph_error: float | None = None
    tolerance: float | None = None
    milliseconds: tuple[float, float, float] | None = None
    batch: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    operators: str = ""
    remarks: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class ExportTable:
    """What ``--to all`` wrote.

    Attributes:
        source: of the network.
        image: its shape (C, H, W), in words.
        precision: of the files.
        threads: with which the latencies were measured.
        rows: one for each target.
    """

    source: str
    image: str
    precision: str
    threads: int
    rows: tuple[Row, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table as text, with its titles."""
        titles = ("target", "file", "MB", "error, borders", "error, photographs", "ms an image", "result")
        return [titles, *(_cells(row) for row in self.rows)]

    def markdown(self) -> str:
        """Return the table as a Markdown page."""
        titles, *rows = self.cells()
        align = ["---", "---", *["---:"] * 4, "---"]
        lines = [f"| {' | '.join(cells)} |" for cells in (titles, align, *rows)]
        allowed = sorted({row.tolerance for row in self.rows if row.tolerance is not None})
        limits = " to ".join(f"{one:.1e}" for one in dict.fromkeys((*allowed[:1], *allowed[-1:])))
        about = (
            f"{self.source}, images of {self.image}, {self.precision}. Errors are `max|y - y64| / max|y64|` against "
            f"the source in float64; allowed: {limits or 'nothing was run'}. Latencies are medians for one image with "
            f"{self.threads} {'thread' if self.threads == 1 else 'threads'}, all files in the same rounds."
        )
        details = [f"- **{row.target}**: {_details(row)}" for row in self.rows if row.file]
        return "\n".join(["# Exported files", "", about, "", *lines, "", *details, ""])


def _cells(row: Row) -> tuple[str, ...]:
    numbers = [
        "" if row.size is None else f"{row.size / 1e6:.2f}",
        *("" if error is None else f"{error:.1e}" for error in (row.error, row.photograph_error)),
        "" if row.milliseconds is None else f"{row.milliseconds[1]:.2f}",
    ]
    return row.target, row.file, *numbers, row.status if row.status == "equal" else f"{row.status}: {row.reason}"


def _details(row: Row) -> str:
    parts = [
        row.batch,
        f"inputs {', '.join(f'{name} ({shape})' for name, shape in row.inputs.items())}" * bool(row.inputs),
    ]
    parts += [f"outputs {', '.join(row.outputs)}" * bool(row.outputs), row.operators, *row.remarks]
    return "; ".join(part.rstrip(".") for part in parts if part)


def export_all(
    request: ExportRequest,
    *,
    rounds: int = 20,
    names: Sequence[str] | None = None,
    on_target: Callable[[str], None] = lambda name: None,
) -> ExportTable:
    """Export a network to all targets into a new folder, ``request.out``, with the table as JSON and Markdown.

    A target whose package is missing, or that cannot hold the network, is a row that says so.

    Args:
        request: what to export; its options are ignored.
        rounds: how often each file is timed.
        names: of the targets; None takes all.
        on_target: called with the name of each target before it is written.

    Raises:
        OutputError: the folder cannot be written, or exists and ``overwrite`` is not set.
        ExportError: no target could be written.
    """
    check_output_folder(request.out, TABLE, overwrite=request.overwrite)
    with atomic_folder(request.out, TABLE, overwrite=request.overwrite) as folder:
        rows = []
        for name in names or TARGETS:
            on_target(name)
            rows.append(_row(name, request, folder))
            gc.collect()  # converters keep several copies of the network alive in cycles
        if not any(row.file for row in rows):
            raise ExportError(f"No file could be written: {rows[0].target}: {rows[0].reason}.")
        image = request.images[0][:1] if request.images else torch.zeros(1, *request.input_shape)
        rows = _with_latencies(rows, folder, image.float(), rounds)
        table = ExportTable(
            request.notes.get("source", type(request.reference).__name__),
            " x ".join(map(str, request.input_shape)),
            request.precision,
            torch.get_num_threads(),
            tuple(rows),
        )
        (folder / TABLE).write_text(to_json(table) + "\n", encoding="utf-8")
        (folder / _PAGE).write_text(table.markdown(), encoding="utf-8")
    return table


def file_name(name: str) -> str:
    """Return what a target's file or folder is called in the folder: ``model``, and the suffix.

    Where an earlier target has files of the same suffix, such as the weights of OpenVINO and ncnn, the name of the
    target is in it.
    """
    target = TARGETS[name]
    if not target.suffix:
        return name
    earlier = takewhile(lambda other: other != name, TARGETS)
    taken = {suffix for other in earlier for suffix in TARGETS[other].suffixes}
    return f"model{'' if taken.isdisjoint(target.suffixes) else f'.{name}'}{target.suffix}"


def _row(name: str, request: ExportRequest, folder: Path) -> Row:
    target = TARGETS[name]
    if request.precision not in target.precisions:
        return Row(name, "failed", f"it is written in {', '.join(target.precisions)} only")
    if request.with_preprocessing and name in ("c", "web"):
        return Row(name, "failed", "it has no preprocessing in the graph yet")
    before = _sizes(folder)
    out = folder / file_name(name)
    try:
        done = export(name, replace(request, out=out, overwrite=False, options={}))
    except MissingDependencyError as error:
        return Row(name, "not installed", first_line(error))
    except EquivalenceError as error:
        return Row(name, "different", first_line(error))
    except RepvggError as error:
        return Row(name, "failed", first_line(error))
    size = sum(_sizes(folder).values()) - sum(before.values())
    return _row_of(name, target, done, out.name, size)


def _row_of(name: str, target: ExportTarget, done: Exported, file: str, size: int) -> Row:
    evidence = done.evidence
    worst = max((one for one in (evidence, done.photographs) if one), key=lambda one: one.tolerance, default=None)
    return Row(
        name,
        "equal" if evidence and target.runtime else "not run",
        f"ran in {target.runtime}" if evidence and target.runtime else target.why_not_run or " ".join(done.remarks),
        file,
        size,
        None if evidence is None else evidence.relative,
        None if done.photographs is None else done.photographs.relative,
        None if worst is None else worst.tolerance,
        None,
        done.contents,
        done.inputs,
        done.outputs,
        str(done.inventory or ""),
        done.remarks,
    )


def _sizes(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _with_latencies(rows: Sequence[Row], folder: Path, image: Tensor, rounds: int) -> list[Row]:
    """Return the rows with the quartiles of the latencies of those that run here."""
    runs: dict[str, Callable[[], Any]] = {}
    for row in rows:
        if row.status == "equal":
            runner = _runner(row.target, folder / row.file)
            runs[row.target] = lambda runner=runner: runner(image)  # type: ignore[misc]  # bound now, not later
    if not runs:
        return list(rows)
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def keep(sample: Any) -> None:
        for name, value in sample.items():
            seconds[name].append(value)

    protocol = replace(INTERLEAVED, rounds=max(2, rounds), warmup_seconds=_WARMUP_SECONDS, rest_seconds=REST_SECONDS)
    take_samples(runs, protocol, keep)

    def quartiles(name: str) -> tuple[float, float, float] | None:
        if name not in seconds:
            return None
        low, middle, high = (1e3 * value for value in quantiles(seconds[name], n=4, method="inclusive"))
        return low, middle, high

    return [replace(row, milliseconds=quartiles(row.target)) for row in rows]


def _runner(name: str, path: Path) -> Callable[[Tensor], Any]:
    runner: Callable[[Tensor], Any] = target_module(name).load(path, torch.get_num_threads())
    return runner
