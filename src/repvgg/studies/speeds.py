"""The speeds of a study: networks timed in rounds, and each round kept as a cell as soon as it is complete.

Rounds that were interrupted go on with the next one. A round times all networks of its group once, so ratios are taken
within rounds. All networks of a table form one group where their weights fit into half of the memory that is free;
where they do not, each pair that the paper compares is a group of its own, with the table's baseline in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from repvgg.errors import first_line
from repvgg.measure import (
    Call,
    Ratio,
    RunSettings,
    Sample,
    SpeedProtocol,
    Stopwatch,
    Timing,
    ratio,
    sampled_names,
    summarize,
    take_samples,
)
from repvgg.measure.memory import available_memory
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.report.formatting import quantity

OUT_OF_MEMORY = "out of memory"
_PLAN, _LOST = "plan", "lost-"

Groups = Sequence[Sequence[str]]

#: Makes calls of networks by their names; what runs out of memory on the way is told to the second argument.
MakeCalls = Callable[[Sequence[str], Callable[[str, Exception], None]], Mapping[str, Call]]


def planned_groups(names: Sequence[str], pairs: Sequence[tuple[str, str]], baseline: str, fits: bool) -> Groups:
    """One group of all; or, where they do not fit together, small ones with the baseline in each.

    Args:
        names: of the networks that take part, in the order of the table.
        pairs: names that the paper compares; those that do not take part are passed over.
        baseline: of the table.
        fits: whether all of them fit into memory at once.
    """
    if fits:
        return [list(names)]
    groups = [[one, other] for one, other in pairs if {one, other} <= set(names)]
    paired = {name for group in groups for name in group}
    groups += [[name] for name in names if name not in paired]
    first = [baseline] if baseline in names else []
    return [list(dict.fromkeys(first + group)) for group in groups]


def fit_together(weights: float, setting: RunSettings) -> bool:
    """Whether so many weights fit into half of the memory that is free; the rest is for what they compute."""
    free = available_memory(setting.device)
    return free is None or 2 * weights * setting.torch_dtype.itemsize <= free


def measure_rounds(
    groups: Groups,
    make_calls: MakeCalls,
    cells: Cells,
    setting: RunSettings,
    protocol: SpeedProtocol,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Put a cell for each round that is missing, and one for each network that runs out of memory.

    Args:
        groups: names of what is timed together; a study that goes on keeps those that it began with.
        make_calls: builds the networks of a group.
        cells: where they go.
        setting: where, and in which numbers.
        protocol: how many rounds, and how each candidate is warmed up.
        batch: images of a call.
        on_progress: told the rounds done and the rounds in all.
    """
    if _PLAN not in cells:
        cells.put(_PLAN, {"groups": [list(group) for group in groups]})
    groups = cells[_PLAN]["groups"]
    total = protocol.rounds * len(groups)
    for index, group in enumerate(groups):
        left = protocol.rounds - len(_rounds_of(cells.values, index))
        names = [name for name in group if _LOST + name not in cells]
        if left > 0 and names:
            keep = _keeper(cells, index, lambda: on_progress(len(_rounds(cells.values)), total))
            _measure_group(names, make_calls, cells, replace(protocol, rounds=left), setting.stopwatch(batch), keep)


def _measure_group(
    names: Sequence[str],
    make_calls: MakeCalls,
    cells: Cells,
    protocol: SpeedProtocol,
    stopwatch: Stopwatch,
    keep: Callable[[Sample], None],
) -> None:
    """The rounds of one group, whose networks are gone when this is done: the next may need their memory."""

    def lose(name: str, error: Exception) -> None:
        cells.put(_LOST + name, {"reason": first_line(error)})

    if calls := make_calls(names, lose):
        take_samples(calls, protocol, keep, on_failure=lose, stopwatch=stopwatch)


def _keeper(cells: Cells, group: int, note: Callable[[], None]) -> Callable[[Sample], None]:
    """Puts each reading as the next round of a group."""

    def keep(reading: Sample) -> None:
        number = len(_rounds_of(cells.values, group))
        cells.put(f"round-{group:02}-{number:04}", {"seconds": dict(reading)})
        note()

    return keep


def _rounds(values: Mapping[str, Cell]) -> list[str]:
    return [key for key in values if key.startswith("round-")]


def _rounds_of(values: Mapping[str, Cell], group: int) -> list[Sample]:
    """The readings of one group, in the order of the rounds."""
    return [values[key]["seconds"] for key in _rounds(values) if key.startswith(f"round-{group:02}-")]


@dataclass(frozen=True, eq=False)
class Speeds:
    """What the rounds say.

    Attributes:
        groups: the readings of each group.
        lost: why some ran out of memory, by name.
        batch: images of a call.
    """

    groups: tuple[tuple[Sample, ...], ...]
    lost: Mapping[str, str]
    batch: int

    @classmethod
    def of(cls, values: Mapping[str, Cell], batch: int) -> Speeds:
        """Read them out of the cells of :func:`measure_rounds`."""
        groups = values[_PLAN]["groups"] if _PLAN in values else []
        readings = tuple(tuple(_rounds_of(values, index)) for index in range(len(groups)))
        lost = {key.removeprefix(_LOST): str(value["reason"]) for key, value in values.items() if key.startswith(_LOST)}
        return cls(readings, lost, batch)

    @property
    def rounds(self) -> int:
        """The fewest rounds of a group."""
        return min(map(len, self.groups), default=0)

    @property
    def extent(self) -> str:
        """How much was measured, in a sentence."""
        return f"{quantity(self.rounds, 'round')}, {quantity(self.batch, 'image')} a call."

    def timing(self, name: str) -> Timing | None:
        """Of a network, in the first group that holds it; None where it was not measured."""
        found = next(self._holding(name), None)
        return None if found is None else summarize(found, [name], name)[0]

    def images_per_second(self, name: str) -> float | str | None:
        """By the median; or that it is out of memory; or None where it was not measured."""
        timing = self.timing(name)
        if timing is None:
            return OUT_OF_MEMORY if name in self.lost else None
        return self.batch / timing.median_seconds

    def quartiles(self, name: str) -> tuple[float | None, float | None]:
        """Images per second, the lower and the upper quartile of the rounds."""
        timing = self.timing(name)
        return (None, None) if timing is None else (self.batch / timing.q3, self.batch / timing.q1)

    def ratio(self, name: str, to: str) -> Ratio | None:
        """How many times as fast as another, within the rounds that hold both; None where there are none."""
        found = next(self._holding(name, to), None)
        return None if found is None else ratio(found, name, to)

    def _holding(self, *names: str) -> Iterator[tuple[Sample, ...]]:
        for readings in self.groups:
            if set(names) <= sampled_names(readings) - self.lost.keys():
                yield readings
