"""The networks of Tables 4 and 5 and of Figure 1 on the stopwatch: settings, measuring, and what the rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from repvgg.errors import UsageError
from repvgg.measure import INTERLEAVED, PAPER, Call, OnFailure, RunSettings
from repvgg.models import BASELINES, baseline_of, spec_of
from repvgg.studies.candidates import PLAIN, Candidate, deployed
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.report.charts import Point
from repvgg.studies.speeds import Speeds, fit_together, measure_rounds, planned_groups
from repvgg.studies.sweep import calls_on, prepare

#: What the paper compares (§4.1): one of ours with the baseline that is about as accurate.
PAIRS = (
    ("repvgg_a0", "resnet18"),
    ("repvgg_a1", "resnet34"),
    ("repvgg_a2", "resnet50"),
    ("repvgg_b1g4", "resnet101"),
    ("repvgg_b1g2", "resnet152"),
    ("repvgg_b3", "regnetx_12gf"),
)


class Row(Protocol):
    """What a table says of a network, whoever published it."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    @property
    def top1_percent(self) -> float:
        """On the validation set of ImageNet-1K."""
        ...

    @property
    def params_millions(self) -> float:
        """Parameters in 10⁶."""
        ...

    @property
    def flops_billions(self) -> float:
        """Multiply-adds for one image, in 10⁹."""
        ...


RowT = TypeVar("RowT", bound=Row)

_BATCH = {"cpu": 8, "cuda": PAPER.batch}
ALL_GMACS = 1000.0
_OURS = "RepVGG-"


def check_counts(**numbers: int | None) -> None:
    """Refuse numbers below 1; None is what nobody chose.

    Raises:
        UsageError: one of them is; the text names it.
    """
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"A study needs {name} of at least 1, not {value}.")


@dataclass(frozen=True)
class NetworkSettings:
    """What may be chosen.

    Attributes:
        setting: where, and in which numbers.
        batch: images of a call; without it 8 on a CPU and the paper's 128 on a GPU.
        rounds: how often each network is timed; without it 30.
        max_gmacs: leave out networks that take more multiply-adds for an image, in 10⁹ as the paper prints them;
            without it 12 on a CPU for table4 and figure1; else all take part.
        input_size: height and width; without it 224, and 300 for EfficientNet-B3, as in the paper.

    Raises:
        UsageError: a number out of its range.
    """

    setting: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    rounds: int | None = None
    max_gmacs: float | None = None
    input_size: int | None = None

    def __post_init__(self) -> None:
        check_counts(batch=self.batch, rounds=self.rounds, input_size=self.input_size)
        if self.max_gmacs is not None and not self.max_gmacs > 0:
            raise UsageError(f"A study needs max_gmacs above 0, not {self.max_gmacs}.")


def resolved(settings: NetworkSettings, gmacs_on_cpu: float) -> NetworkSettings:
    """Fill in what nobody chose, for the device."""
    device = settings.setting.device
    return replace(
        settings,
        batch=settings.batch or _BATCH[device],
        rounds=settings.rounds or INTERLEAVED.rounds,
        max_gmacs=settings.max_gmacs or (gmacs_on_cpu if device == "cpu" else ALL_GMACS),
    )


def taking_part(table: Sequence[RowT], settings: NetworkSettings) -> list[RowT]:
    """The rows that are not too large.

    Raises:
        UsageError: all of them are.
    """
    most = settings.max_gmacs or ALL_GMACS
    rows = [row for row in table if row.flops_billions <= most]
    if not rows:
        least = min(row.flops_billions for row in table)
        raise UsageError(f"No network of this table takes {most:g} GMACs or less: take --max-gmacs {least:g} or more.")
    return rows


def measure_table(table: Sequence[Row], baseline: str) -> Callable[..., None]:
    """The ``measure`` of a study over the rows of a table."""

    def measure(settings: NetworkSettings, cells: Cells, on_progress: Callable[[int, int], None]) -> None:
        rows = {row.model: row for row in taking_part(table, settings)}
        weights = sum(row.params_millions for row in rows.values()) * 1e6
        groups = planned_groups(list(rows), PAIRS, baseline, fit_together(weights, settings.setting))
        protocol = replace(INTERLEAVED, rounds=settings.rounds or INTERLEAVED.rounds)
        batch = settings.batch or 1
        make = _calls_maker(settings.setting, batch, settings.input_size)
        measure_rounds(groups, make, cells, settings.setting, protocol, batch, on_progress)

    return measure


def _calls_maker(
    setting: RunSettings, batch: int, input_size: int | None
) -> Callable[[Sequence[str], OnFailure], Mapping[str, Call]]:
    def make_calls(names: Sequence[str], on_failure: OnFailure) -> Mapping[str, Call]:
        return ready_calls([_candidate(name, input_size) for name in names], setting, batch, on_failure)

    return make_calls


def ready_calls(
    candidates: Sequence[Candidate], setting: RunSettings, batch: int, on_failure: OnFailure
) -> Mapping[str, Call]:
    """Calls of those that fit into memory, by their names."""
    return calls_on(prepare(candidates, setting, on_failure), batch, setting, on_failure)


def _candidate(name: str, input_size: int | None) -> Candidate:
    size = input_size or (baseline_of(name) if name in BASELINES else spec_of(name)).input_size
    return Candidate(name, name, PLAIN, lambda: deployed(name), (3, size, size))


def speeds_of(settings: NetworkSettings, values: Mapping[str, Cell]) -> Speeds:
    """The speeds that the cells of :func:`measure_table` hold."""
    return Speeds.of(values, settings.batch or 1)


def undominated(accuracies: Mapping[str, float], speeds: Speeds) -> list[str]:
    """Networks than which no other is at least as fast and accurate, and better in one of them."""
    found = [
        (name, accuracy, speed)
        for name, accuracy in accuracies.items()
        if isinstance(speed := speeds.images_per_second(name), float)
    ]
    return [
        name
        for name, accuracy, speed in found
        if not any(a >= accuracy and s >= speed and (a, s) != (accuracy, speed) for _, a, s in found)
    ]


def lead_of(best: Sequence[str]) -> str:
    """How many of the :func:`undominated` networks are ours, in a sentence."""
    if not best:
        return "Nothing was measured yet."
    ours = sum(map(is_ours, best))
    return f"Of the {len(best)} networks than which none is both faster here and more accurate, {ours} are RepVGG."


def plane_points(accuracies: Mapping[str, float], speeds: Speeds) -> list[Point]:
    """Those that were measured, as points; of ours the fastest has its whole name, the others what is behind it."""
    points = [
        Point(title_of(name), speed, accuracy, is_ours(name))
        for name, accuracy in accuracies.items()
        if isinstance(speed := speeds.images_per_second(name), float)
    ]
    fastest = max((point for point in points if point.ours), key=lambda point: point.x, default=None)
    return [point if point is fastest else replace(point, label=point.label.removeprefix(_OURS)) for point in points]


def title_of(name: str) -> str:
    """A row as papers print it: "RepVGG-A0", "ResNet-18"."""
    if name in BASELINES:
        return BASELINES[name].title
    return _OURS + name.removeprefix("repvgg_").upper().replace("G", "g")


def is_ours(name: str) -> bool:
    """Whether it is a RepVGG."""
    return name not in BASELINES
