"""The speed column of Table 6 of the paper: RepVGG-B0 before conversion, with branches removed.

repvgg study table6-speed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from repvgg.blocks import BranchSum
from repvgg.measure import INTERLEAVED, PAPER, Call, OnFailure, RunSettings
from repvgg.models import create_model, spec_of
from repvgg.studies.candidates import PLAIN, TRAIN, Candidate
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.networks import check_counts, ready_calls
from repvgg.studies.paper import TABLE_4, TABLE_6
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.speeds import Speeds, measure_rounds
from repvgg.studies.study import OnProgress, Outcome, Study
from repvgg.studies.tables import Column, Table, Value

_MODEL = "repvgg_b0"
_BATCH = {"cpu": 8, "cuda": PAPER.batch}


@dataclass(frozen=True)
class BranchSettings:
    """What may be chosen.

    Attributes:
        setting: where, and in which numbers.
        batch: images of a call; without it 8 on a CPU and the paper's 128 on a GPU.
        rounds: how often each form is timed.
        input_size: height and width.

    Raises:
        UsageError: a number below 1.
    """

    setting: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    rounds: int = INTERLEAVED.rounds
    input_size: int = 224

    def __post_init__(self) -> None:
        check_counts(batch=self.batch, rounds=self.rounds, input_size=self.input_size)


@dataclass(frozen=True)
class _Form:
    """One row: which branches stand beside the 3x3, or that all of them became one convolution."""

    name: str
    identity: bool | None
    pointwise: bool | None
    top1_percent: float
    paper_images_per_second: float


_CONVERTED = next(
    _Form("converted", None, None, row.top1_percent, row.images_per_second) for row in TABLE_4 if row.model == _MODEL
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
_FULL = "dense-identity-pointwise"


def _resolve(settings: BranchSettings) -> BranchSettings:
    return replace(settings, batch=settings.batch or _BATCH[settings.setting.device])


def _measure(settings: BranchSettings, cells: Cells, on_progress: OnProgress) -> None:
    batch = settings.batch or 1
    protocol = replace(INTERLEAVED, rounds=settings.rounds)

    def make_calls(names: Sequence[str], on_failure: OnFailure) -> Mapping[str, Call]:
        wanted = [_candidate(form, settings.input_size) for form in _FORMS if form.name in names]
        return ready_calls(wanted, settings.setting, batch, on_failure)

    groups = [[form.name for form in _FORMS]]
    measure_rounds(groups, make_calls, cells, settings.setting, protocol, batch, on_progress)


def _candidate(form: _Form, size: int) -> Candidate:
    kind = PLAIN if form is _CONVERTED else TRAIN
    return Candidate(form.name, _MODEL, kind, partial(_build, form), (3, size, size))


def _build(form: _Form) -> nn.Module:
    """The network with random weights, in eval mode; what is removed is removed from every block."""
    model = create_model(spec_of(_MODEL), plain=form is _CONVERTED).eval()
    removed = [name for name, there in (("identity", form.identity), ("pointwise", form.pointwise)) if there is False]
    for branches in [module for module in model.modules() if isinstance(module, BranchSum)]:
        for name in set(removed) & set(branches):
            del branches[name]
    return model


def _outcome(settings: BranchSettings, values: Mapping[str, Cell]) -> Outcome:
    speeds = Speeds.of(values, settings.batch or 1)
    faster = speeds.ratio(_CONVERTED.name, _FULL)
    paper = _CONVERTED.paper_images_per_second / TABLE_6[-1].images_per_second
    lead = (
        f"Conversion makes RepVGG-B0 {faster.median:.2f} times as fast here; by the paper's tables {paper:.2f} times."
        if faster
        else "The full block and the converted one were not both measured."
    )
    return Outcome(lead, (_table(speeds),), (_picture(speeds),))


def _table(speeds: Speeds) -> Table:
    columns = (
        Column("form", "RepVGG-B0"),
        Column("identity", "Identity branch"),
        Column("pointwise", "1×1 branch"),
        Column("paper_top1_percent", "Accuracy, paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 0),
        Column("images_per_second", "Speed here (images/s)", 1),
        Column("images_per_second_q1", "lower quartile", 1),
        Column("images_per_second_q3", "upper quartile", 1),
        Column("paper_speed_up", "× full block, paper", 2),
        Column("speed_up", "× full block here", 2),
    )
    notes = (
        speeds.extent,
        "Before conversion: batch norms are not folded. The converted form is not in the paper's Table 6; its speed is "
        "that of Table 4.",
    )
    return Table(
        "table6-speed", "Speed with branches removed", columns, tuple(_row(form, speeds) for form in _FORMS), notes
    )


def _row(form: _Form, speeds: Speeds) -> tuple[Value, ...]:
    faster = speeds.ratio(form.name, _FULL)
    full = TABLE_6[-1].images_per_second
    return (
        "converted" if form is _CONVERTED else "before conversion",
        form.identity,
        form.pointwise,
        form.top1_percent,
        form.paper_images_per_second,
        speeds.images_per_second(form.name),
        *speeds.quartiles(form.name),
        form.paper_images_per_second / full,
        faster.median if faster else None,
    )


def _label(form: _Form) -> str:
    if form is _CONVERTED:
        return "converted\nto one 3×3"
    branches = [name for name, there in (("identity", form.identity), ("1×1", form.pointwise)) if there]
    return "\n+ ".join(["3×3", " + ".join(branches)]) if branches else "3×3 alone"


def _picture(speeds: Speeds) -> Chart:
    full = TABLE_6[-1].images_per_second
    bars = []
    for form in _FORMS:
        faster = speeds.ratio(form.name, _FULL)
        bars.append(Bar(_label(form), faster.median if faster else None, form.paper_images_per_second / full))
    title = "RepVGG-B0 without some of its branches"
    draw = partial(draw_bars, title=title, unit="times as fast as with all branches", bars=bars, line_at=1.0)
    return Chart("table6-speed", "Speed of RepVGG-B0 with branches removed against the full block", draw)


STUDY = Study(
    name="table6-speed",
    title="Table 6, speed: RepVGG-B0 before conversion, branches removed",
    about=(
        "All forms are timed interleaved: every round takes the time of each once. Speeds are medians over the rounds; "
        "ratios are taken within rounds. Weights are random; accuracies are those that the paper prints."
    ),
    settings=BranchSettings,
    resolve=_resolve,
    measure=_measure,
    outcome=_outcome,
)
