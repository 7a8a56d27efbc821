"""Speed of the parts of a block: convolutions by kernel size (Table 1), and RepVGG-B0 without some branches (Table 6).

    repvgg study table1
    repvgg study table6-speed

Expected on 2 cores: a minute for table1. A 3x3 that is no denser than the others does not
run by a Winograd algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from repvgg.blocks import BranchSum
from repvgg.measure import INTERLEAVED, PAPER, RunSettings
from repvgg.models import create_model, spec_of
from repvgg.studies.base import OnProgress, Outcome, Study, check_positive
from repvgg.studies.candidates import PLAIN, TRAIN, Candidate
from repvgg.studies.paper import (
    TABLE_1,
    TABLE_1_BATCH,
    TABLE_1_CHANNELS,
    TABLE_1_SIZE,
    TABLE_4,
    TABLE_6,
    KernelSpeed,
)
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.store import Cell, CellStore
from repvgg.studies.tables import SPEED_COLUMNS, Column, Table, Value, with_quartiles
from repvgg.studies.timing import OUT_OF_MEMORY, Speeds, measure_candidates

# Batch and channels; the paper's would take a CPU minutes per call.
_KERNEL_SCALE = {"cpu": (1, 512), "cuda": (TABLE_1_BATCH, TABLE_1_CHANNELS)}


@dataclass(frozen=True)
class KernelSettings:
    """Settings of Table 1.

    Attributes:
        run: device, dtype, memory format and threads.
        batch: images in a call; default: 1 on a CPU and the paper's 32 on a GPU.
        channels: input and output channels; default: 512 on a CPU and the paper's 2048 on a GPU.
        size: height and width of the image.
        rounds: how often each kernel is timed; default: 10, as in the paper.

    Raises:
        UsageError: a number is below 1.
    """

    run: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    channels: int | None = None
    size: int = TABLE_1_SIZE
    rounds: int = 10

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, channels=self.channels, size=self.size, rounds=self.rounds)


def _resolve_kernels(settings: KernelSettings) -> KernelSettings:
    batch, channels = _KERNEL_SCALE[settings.run.device]
    return replace(settings, batch=settings.batch or batch, channels=settings.channels or channels)


def _kernel_name(kernel: int) -> str:
    return f"{kernel}x{kernel}"


def _measure_kernels(settings: KernelSettings, store: CellStore, on_progress: OnProgress) -> None:
    channels, size = settings.channels or 1, settings.size
    candidates = {}
    for row in TABLE_1:
        name, kernel = _kernel_name(row.kernel), row.kernel
        # "Same" padding, so that every kernel size computes outputs of the same shape.
        make = partial(nn.Conv2d, channels, channels, kernel, padding=kernel // 2, bias=False)
        candidates[name] = Candidate(name, name, PLAIN, make, (channels, size, size))
    protocol = replace(INTERLEAVED, rounds=settings.rounds)
    measure_candidates([list(candidates)], candidates, store, settings.run, protocol, settings.batch or 1, on_progress)


def macs_of(kernel: int, settings: KernelSettings) -> int:
    """Return the multiply-adds of one call: N · H · W · k² · C², products with the zeros of the padding included."""
    batch, channels = settings.batch or 1, settings.channels or 1
    return batch * settings.size**2 * kernel**2 * channels**2


def _kernel_outcome(settings: KernelSettings, values: Mapping[str, Cell]) -> Outcome:
    speeds = Speeds.from_cells(values, settings.batch or 1)
    tflops = {row.kernel: _tflops(row.kernel, settings, speeds) for row in TABLE_1}
    ours, paper = _over_1x1(tflops), _over_1x1({row.kernel: row.tflops for row in TABLE_1})
    lead = (
        "The 3x3 convolution was not measured."
        if ours[3] is None
        else f"A 3x3 convolution is {ours[3]:.2f} times as dense as a 1x1 here; in the paper it is {paper[3]:.2f} "
        "times."
    )
    bars = [Bar(f"{kernel} × {kernel}", ours[kernel], paper[kernel]) for kernel in ours]
    title = "Arithmetic a second, against a 1 × 1 kernel"
    draw = partial(draw_bars, title=title, unit="times that of 1 × 1", bars=bars, line_at=1.0)
    chart = Chart("table1", "Arithmetic a second of each kernel size against the 1x1, here and in the paper", draw)
    return Outcome(lead, (_kernel_table(settings, speeds, tflops),), (chart,))


def _tflops(kernel: int, settings: KernelSettings, speeds: Speeds) -> float | None:
    timing = speeds.timing(_kernel_name(kernel))
    # In this column the paper counts a multiply-add as two operations.
    return None if timing is None else 2 * macs_of(kernel, settings) / timing.median_seconds / 1e12


def _over_1x1(tflops: Mapping[int, float | None]) -> dict[int, float | None]:
    base = tflops[1]  # of the 1x1
    return {kernel: value / base if value and base else None for kernel, value in tflops.items()}


def _kernel_table(settings: KernelSettings, speeds: Speeds, tflops: Mapping[int, float | None]) -> Table:
    columns = (
        Column("kernel", "Kernel size"),
        Column("paper_flops_billions", "Theoretical FLOPs, paper (B)", 1),
        Column("flops_billions", "Theoretical FLOPs here (B)", 2),
        Column("paper_milliseconds", "Time usage, paper (ms)", 1),
        *with_quartiles("milliseconds", "Time usage here (ms)", 2),
        Column("paper_tflops", "Theoretical TFLOPS, paper", 2),
        Column("tflops", "Theoretical TFLOPS here", 3),
    )
    rows = tuple(_kernel_row(row, settings, speeds, tflops[row.kernel]) for row in TABLE_1)
    notes = (
        f"Here: batch {settings.batch}, {settings.channels} channels in and out, {settings.size} x {settings.size}, "
        f"{speeds.rounds} rounds. Paper: batch {TABLE_1_BATCH}, {TABLE_1_CHANNELS} channels, {TABLE_1_SIZE} x "
        f"{TABLE_1_SIZE}.",
        "As in the paper, a multiply-add is one operation among the FLOPs and two among the TFLOPS.",
    )
    return Table("table1", "Convolutions by the size of their kernel", columns, rows, notes)


def _kernel_row(row: KernelSpeed, settings: KernelSettings, speeds: Speeds, tflops: float | None) -> tuple[Value, ...]:
    name = _kernel_name(row.kernel)
    timing = speeds.timing(name)
    times: tuple[Value, ...] = (OUT_OF_MEMORY if name in speeds.failures else None, None, None)
    if timing:
        times = tuple(1e3 * seconds for seconds in (timing.median_seconds, timing.q1, timing.q3))
    return (
        f"{row.kernel} × {row.kernel}",
        row.flops_billions,
        macs_of(row.kernel, settings) / 1e9,
        row.milliseconds,
        *times,
        row.tflops,
        tflops,
    )


_BRANCH_MODEL = "repvgg_b0"
_BRANCH_BATCH = {"cpu": 8, "cuda": PAPER.batch}


@dataclass(frozen=True)
class BranchSettings:
    """Settings of the speed column of Table 6.

    Attributes:
        run: device, dtype, memory format and threads.
        batch: images in a call; default: 8 on a CPU and the paper's 128 on a GPU.
        rounds: how often each form is timed.
        input_size: height and width of the images.

    Raises:
        UsageError: a number is below 1.
    """

    run: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    rounds: int = INTERLEAVED.rounds
    input_size: int = 224

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, rounds=self.rounds, input_size=self.input_size)


@dataclass(frozen=True)
class _Form:
    """A row: the branches that blocks have besides the 3x3; None in the converted form."""

    name: str
    identity: bool | None
    pointwise: bool | None
    top1_percent: float
    paper_images_per_second: float


# Table 6 has no row for the converted network: its speed and accuracy are those of Table 4.
_CONVERTED = next(
    _Form("converted", None, None, row.top1_percent, row.images_per_second)
    for row in TABLE_4
    if row.model == _BRANCH_MODEL
)
_FORMS = (
    *(
        _Form(
            "-".join(["dense", *["identity"] * row.identity, *["pointwise"] * row.pointwise]),
            row.identity,
            row.pointwise,
            row.top1_percent,
            row.images_per_second,
        )
        for row in TABLE_6
    ),
    _CONVERTED,
)
_FULL = "dense-identity-pointwise"  # the row with all branches
_PAPER_FULL_SPEED = TABLE_6[-1].images_per_second


def _resolve_branches(settings: BranchSettings) -> BranchSettings:
    return replace(settings, batch=settings.batch or _BRANCH_BATCH[settings.run.device])


def _measure_branches(settings: BranchSettings, store: CellStore, on_progress: OnProgress) -> None:
    image = (3, settings.input_size, settings.input_size)
    candidates = {
        form.name: Candidate(
            form.name, _BRANCH_MODEL, PLAIN if form is _CONVERTED else TRAIN, partial(_build, form), image
        )
        for form in _FORMS
    }
    protocol = replace(INTERLEAVED, rounds=settings.rounds)
    measure_candidates([list(candidates)], candidates, store, settings.run, protocol, settings.batch or 1, on_progress)


def _build(form: _Form) -> nn.Module:
    """Build the network with random weights, in eval mode, and remove branches from every block."""
    model = create_model(spec_of(_BRANCH_MODEL), plain=form is _CONVERTED).eval()
    branches = {"identity": form.identity, "pointwise": form.pointwise}
    removed = {name for name, present in branches.items() if present is False}  # None: converted, no branches
    # A list, because deleting branches changes the modules that are being iterated.
    for block in [module for module in model.modules() if isinstance(module, BranchSum)]:
        for name in removed & set(block):  # blocks that change the shape have no identity
            del block[name]
    return model


def _branch_outcome(settings: BranchSettings, values: Mapping[str, Cell]) -> Outcome:
    speeds = Speeds.from_cells(values, settings.batch or 1)
    here = speeds.speedup(_CONVERTED.name, _FULL)
    paper = _CONVERTED.paper_images_per_second / _PAPER_FULL_SPEED
    lead = (
        f"Conversion makes RepVGG-B0 {here:.2f} times as fast here; by the paper's tables {paper:.2f} times."
        if here
        else "The full block and the converted one were not both measured."
    )
    bars = [
        Bar(_label(form), speeds.speedup(form.name, _FULL), form.paper_images_per_second / _PAPER_FULL_SPEED)
        for form in _FORMS
    ]
    title = "RepVGG-B0 without some of its branches"
    draw = partial(draw_bars, title=title, unit="times as fast as with all branches", bars=bars, line_at=1.0)
    chart = Chart("table6-speed", "Speed of RepVGG-B0 with branches removed against the full block", draw)
    return Outcome(lead, (_branch_table(speeds),), (chart,))


def _label(form: _Form) -> str:
    if form is _CONVERTED:
        return "converted\nto one 3×3"
    branches = [name for name, present in (("identity", form.identity), ("1×1", form.pointwise)) if present]
    return "\n+ ".join(["3×3", " + ".join(branches)]) if branches else "3×3 alone"


def _branch_table(speeds: Speeds) -> Table:
    columns = (
        Column("form", "RepVGG-B0"),
        Column("identity", "Identity branch"),
        Column("pointwise", "1×1 branch"),
        Column("paper_top1_percent", "Accuracy, paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 0),
        *SPEED_COLUMNS,
        Column("paper_speed_up", "× full block, paper", 2),
        Column("speed_up", "× full block here", 2),
    )
    rows = tuple(
        (
            "converted" if form is _CONVERTED else "before conversion",
            form.identity,
            form.pointwise,
            form.top1_percent,
            form.paper_images_per_second,
            *speeds.cells(form.name),
            form.paper_images_per_second / _PAPER_FULL_SPEED,
            speeds.speedup(form.name, _FULL),
        )
        for form in _FORMS
    )
    notes = (
        speeds.extent,
        "Before conversion: batch norms are not folded. The converted form is not in the paper's Table 6; its speed is "
        "that of Table 4.",
    )
    return Table("table6-speed", "Speed with branches removed", columns, rows, notes)


STUDIES = (
    Study(
        name="table1",
        title="Table 1: convolutions from 1x1 to 7x7",
        about=(
            "The four convolutions are timed interleaved, stride 1, without bias, on one random image of many "
            "channels: every round times each of them once. Times are medians over the rounds. Sizes depend on the "
            "device; the paper's figures are of cuDNN 7.5 on a GTX 1080 Ti, which runs the 3x3 by the Winograd "
            "algorithm."
        ),
        settings=KernelSettings,
        resolve=_resolve_kernels,
        measure=_measure_kernels,
        outcome=_kernel_outcome,
    ),
    Study(
        name="table6-speed",
        title="Table 6, speed: RepVGG-B0 before conversion, branches removed",
        about=(
            "All forms are timed interleaved: every round times each of them once. Speeds are medians over the rounds; "
            "speed-ups are computed within rounds. Weights are random; accuracies are the paper's."
        ),
        settings=BranchSettings,
        resolve=_resolve_branches,
        measure=_measure_branches,
        outcome=_branch_outcome,
    ),
)
