"""Table 1 of the paper: how fast convolutions of 1x1 to 7x7 are, for the arithmetic that they do.

    repvgg study table1

Expected on 2 cores: a minute. Where the 3x3 is no denser than the others, nothing here uses the Winograd algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from repvgg.measure import INTERLEAVED, Call, OnFailure, RunSettings
from repvgg.studies.candidates import PLAIN, Candidate
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.networks import check_counts, ready_calls
from repvgg.studies.paper import TABLE_1, TABLE_1_BATCH, TABLE_1_CHANNELS, TABLE_1_SIZE, KernelSpeed
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.speeds import OUT_OF_MEMORY, Speeds, measure_rounds
from repvgg.studies.study import OnProgress, Outcome, Study
from repvgg.studies.tables import Column, Table, Value

_SCALE = {"cpu": (1, 512), "cuda": (TABLE_1_BATCH, TABLE_1_CHANNELS)}  # batch, channels: the paper's take a CPU minutes
_ROUNDS = 10  # as the paper


@dataclass(frozen=True)
class KernelSettings:
    """What may be chosen.

    Attributes:
        setting: where, and in which numbers.
        batch: images of a call; without it 1 on a CPU and the paper's 32 on a GPU.
        channels: in and out; without it 512 on a CPU and the paper's 2048 on a GPU.
        size: height and width of the image.
        rounds: how often each kernel is timed.

    Raises:
        UsageError: a number below 1.
    """

    setting: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    channels: int | None = None
    size: int = TABLE_1_SIZE
    rounds: int = _ROUNDS

    def __post_init__(self) -> None:
        check_counts(batch=self.batch, channels=self.channels, size=self.size, rounds=self.rounds)


def _resolve(settings: KernelSettings) -> KernelSettings:
    batch, channels = _SCALE[settings.setting.device]
    return replace(settings, batch=settings.batch or batch, channels=settings.channels or channels)


def _name(kernel: int) -> str:
    return f"{kernel}x{kernel}"


def _measure(settings: KernelSettings, cells: Cells, on_progress: OnProgress) -> None:
    batch = settings.batch or 1
    protocol = replace(INTERLEAVED, rounds=settings.rounds)
    groups = [[_name(row.kernel) for row in TABLE_1]]

    def make_calls(names: Sequence[str], on_failure: OnFailure) -> Mapping[str, Call]:
        wanted = [_candidate(row.kernel, settings) for row in TABLE_1 if _name(row.kernel) in names]
        return ready_calls(wanted, settings.setting, batch, on_failure)

    measure_rounds(groups, make_calls, cells, settings.setting, protocol, batch, on_progress)


def _candidate(kernel: int, settings: KernelSettings) -> Candidate:
    channels, size = settings.channels or 1, settings.size
    make = partial(nn.Conv2d, channels, channels, kernel, padding=kernel // 2, bias=False)
    return Candidate(_name(kernel), _name(kernel), PLAIN, make, (channels, size, size))


def macs_of(kernel: int, settings: KernelSettings) -> int:
    """Multiply-adds of one call: N · H · W · k² · C², products with the padding's zeros counted."""
    batch, channels = settings.batch or 1, settings.channels or 1
    return batch * settings.size**2 * kernel**2 * channels**2


def _outcome(settings: KernelSettings, values: Mapping[str, Cell]) -> Outcome:
    speeds = Speeds.of(values, settings.batch or 1)
    density = {row.kernel: _tflops(row.kernel, settings, speeds) for row in TABLE_1}
    return Outcome(_lead(density), (_table(settings, speeds, density),), (_picture(density),))


def _tflops(kernel: int, settings: KernelSettings, speeds: Speeds) -> float | None:
    """2 · MACs / seconds / 10¹²: here the paper counts a multiply-add as two operations."""
    timing = speeds.timing(_name(kernel))
    return None if timing is None else 2 * macs_of(kernel, settings) / timing.median_seconds / 1e12


def _lead(density: Mapping[int, float | None]) -> str:
    ours, paper = _over_pointwise(density), _over_pointwise({row.kernel: row.tflops for row in TABLE_1})
    if ours[3] is None:
        return "The 3x3 convolution was not measured."
    return f"A 3x3 convolution is {ours[3]:.2f} times as dense as a 1x1 here; in the paper it is {paper[3]:.2f} times."


def _over_pointwise(density: Mapping[int, float | None]) -> dict[int, float | None]:
    """How many times as dense as the 1x1."""
    base = density[1]
    return {kernel: value / base if value and base else None for kernel, value in density.items()}


def _table(settings: KernelSettings, speeds: Speeds, density: Mapping[int, float | None]) -> Table:
    columns = (
        Column("kernel", "Kernel size"),
        Column("paper_flops_billions", "Theoretical FLOPs, paper (B)", 1),
        Column("flops_billions", "Theoretical FLOPs here (B)", 2),
        Column("paper_milliseconds", "Time usage, paper (ms)", 1),
        Column("milliseconds", "Time usage here (ms)", 2),
        Column("milliseconds_q1", "lower quartile", 2),
        Column("milliseconds_q3", "upper quartile", 2),
        Column("paper_tflops", "Theoretical TFLOPS, paper", 2),
        Column("tflops", "Theoretical TFLOPS here", 3),
    )
    rows = tuple(_row(row, settings, speeds, density[row.kernel]) for row in TABLE_1)
    notes = (
        f"Here: batch {settings.batch}, {settings.channels} channels in and out, {settings.size} x {settings.size}, "
        f"{speeds.rounds} rounds. Paper: batch {TABLE_1_BATCH}, {TABLE_1_CHANNELS} channels, {TABLE_1_SIZE} x "
        f"{TABLE_1_SIZE}.",
        "As in the paper, a multiply-add is one operation among the FLOPs and two among the TFLOPS.",
    )
    return Table("table1", "Convolutions by the size of their kernel", columns, rows, notes)


def _row(row: KernelSpeed, settings: KernelSettings, speeds: Speeds, tflops: float | None) -> tuple[Value, ...]:
    timing = speeds.timing(_name(row.kernel))
    times: tuple[Value, ...] = (OUT_OF_MEMORY if _name(row.kernel) in speeds.lost else None, None, None)
    if timing:
        times = tuple(1e3 * seconds for seconds in (timing.median_seconds, timing.q1, timing.q3))
    macs = macs_of(row.kernel, settings) / 1e9
    return (
        f"{row.kernel} × {row.kernel}",
        row.flops_billions,
        macs,
        row.milliseconds,
        *times,
        row.tflops,
        tflops,
    )


def _picture(density: Mapping[int, float | None]) -> Chart:
    ours, paper = _over_pointwise(density), _over_pointwise({row.kernel: row.tflops for row in TABLE_1})
    bars = [Bar(f"{kernel} × {kernel}", ours[kernel], paper[kernel]) for kernel in ours]
    title = "Arithmetic a second, against a 1 × 1 kernel"
    draw = partial(draw_bars, title=title, unit="times that of 1 × 1", bars=bars, line_at=1.0)
    return Chart("table1", "Arithmetic a second of each kernel size against the 1x1, here and in the paper", draw)


STUDY = Study(
    name="table1",
    title="Table 1: convolutions from 1x1 to 7x7",
    about=(
        "The four convolutions are timed interleaved, stride 1, without bias, on one random image of many channels: "
        "every round takes the time of each once. Times are medians over the rounds. Sizes scale with the device; the "
        "paper's figures are of cuDNN 7.5 on a GTX 1080 Ti, whose 3x3 runs by the Winograd algorithm."
    ),
    settings=KernelSettings,
    resolve=_resolve,
    measure=_measure,
    outcome=_outcome,
)
