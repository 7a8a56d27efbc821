"""Time networks side by side: sweeps over batch sizes (`repvgg bench`), and rounds stored as cells of a study.

A study stores each round as a cell as soon as it is complete, so that it continues after an interruption. A round times
all networks of its group once; speed-ups are ratios within rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from repvgg.errors import UsageError, first_line, is_out_of_memory
from repvgg.measure import (
    REST_SECONDS,
    Call,
    Denormals,
    OnFailure,
    Ratio,
    RunSettings,
    Sample,
    SpeedProtocol,
    Timing,
    catch_out_of_memory,
    count_denormals,
    ratio,
    sampled_names,
    summarize,
    take_samples,
    walk,
)
from repvgg.measure.memory import available_memory
from repvgg.measure.timing import MIN_ROUNDS_AFTER_INTERRUPT
from repvgg.studies.candidates import ENGINES, Candidate, Run, Shape, check_engines
from repvgg.studies.report.formatting import quantity
from repvgg.studies.store import Cell, CellStore

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, eq=False)
class PreparedNetwork:
    """A candidate that is ready to run."""

    name: str  # of the candidate
    run: Run  # takes images (N, C, H, W)
    model: nn.Module  # the network inside, in its dtype and on its device
    image: Shape  # (C, H, W)


def prepare(candidates: Iterable[Candidate], settings: RunSettings, on_failure: OnFailure) -> list[PreparedNetwork]:
    """Prepare each network in its engine; one that does not fit in memory is reported and left out.

    Raises:
        UsageError: an engine does not exist, or does not support the settings.
    """
    prepared = []
    for candidate in candidates:
        check_engines([candidate.engine], settings)
        with catch_out_of_memory(candidate.name, on_failure):
            model = candidate.make()
            run = ENGINES[candidate.engine].prepare(model, settings, candidate.image)
            prepared.append(PreparedNetwork(candidate.name, run, model, candidate.image))
    return prepared


def make_calls(
    networks: Sequence[PreparedNetwork], batch: int, settings: RunSettings, on_failure: OnFailure
) -> dict[str, Call]:
    """Return a call without arguments for each network, on images of this batch size; each has run once.

    Raises:
        UsageError: a network cannot run on such images, or cannot be compiled.
    """
    images: dict[Shape, Tensor] = {}
    calls: dict[str, Call] = {}
    for network in networks:
        with catch_out_of_memory(network.name, on_failure):
            # The check runs one image: a failure names that size.
            with _explain_failure(network, 1, settings):
                _check_memory(network, batch, settings)
            if network.image not in images:
                images[network.image] = settings.images(batch, network.image)
            call = partial(network.run, images[network.image])
            with _explain_failure(network, batch, settings):
                call()
            calls[network.name] = call
    return calls


def _check_memory(network: PreparedNetwork, batch: int, settings: RunSettings) -> None:
    # A GPU refuses an allocation that does not fit. Linux overcommits and kills the process later, so the need of a
    # batch on the CPU is estimated from one image.
    if settings.device != "cpu" or batch == 1:
        return
    needed, free = batch * walk(network.model, settings.images(1, network.image)).peak, available_memory("cpu")
    if free is not None and needed > free:
        raise MemoryError(f"activations need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


@contextmanager
def _explain_failure(network: PreparedNetwork, batch: int, settings: RunSettings) -> Iterator[None]:
    """Enter inference mode; turn any error but a lack of memory into a :class:`UsageError` of one sentence."""
    try:
        with torch.inference_mode():
            yield
    except Exception as error:  # a compiler or a user's forward may raise anything
        if is_out_of_memory(error):
            raise
        size = " x ".join(map(str, (batch, *network.image)))
        advice = ", or leave out --compile" if settings.compile else ""
        raise UsageError(
            f"{network.name!r} cannot run on images of {size} in {settings.dtype}: {first_line(error)}. Take another "
            f"size or dtype{advice}."
        ) from error


@dataclass(frozen=True, eq=False)
class BatchResult:
    """Results of one batch size."""

    batch: int  # images in a call
    samples: tuple[Sample, ...]  # in the order in which they were taken
    names: tuple[str, ...]  # candidates that were measured
    failures: Mapping[str, str]  # the reason for each of the others, by name
    baseline: str  # that speed-ups refer to

    @property
    def timings(self) -> list[Timing]:
        """One for each measured candidate, in their order."""
        return summarize(self.samples, self.names, self.baseline)

    def ratio(self, name: str, to: str) -> Ratio | None:
        """Return the speed-up of one candidate over another; None if one of them was not measured."""
        return ratio(self.samples, name, to) if {name, to} <= set(self.names) else None


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Results of all batch sizes."""

    batches: tuple[BatchResult, ...]  # one for each batch size; after Ctrl-C those until then
    denormals: Mapping[str, Denormals]  # of each network on one image, by name
    complete: bool  # False after Ctrl-C


def protocol_for(candidates: Iterable[Candidate], protocol: SpeedProtocol) -> SpeedProtocol:
    """Return the protocol with rests between candidates if any of them runs in an engine with threads of its own."""
    # PyTorch's models share one pool of threads, which is idle after each call.
    if all(candidate.engine == "torch" for candidate in candidates):
        return protocol
    return replace(protocol, rest_seconds=REST_SECONDS)


def sweep(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    settings: RunSettings,
    protocol: SpeedProtocol,
    *,
    baseline: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Time all candidates side by side, one batch size after the other.

    A candidate that does not fit in memory is left out of that batch size. Ctrl-C keeps the samples taken so far, if
    there are at least 3 rounds. The settings must be applied already.

    Args:
        candidates: networks to time.
        batches: images in a call.
        settings: device, dtype, memory format and threads.
        protocol: how often and in which order.
        baseline: name of the candidate that speed-ups refer to.
        on_progress: called after each sample with the number done and the total.

    Raises:
        KeyboardInterrupt: Ctrl-C before anything was measured.
        UsageError: a candidate cannot run, or an engine does not exist.
    """
    failures: dict[str, str] = {}
    protocol = protocol_for(candidates, protocol)
    networks = prepare(candidates, settings, _record_in(failures))
    denormals = _count_denormals(networks, settings, _record_in(failures))
    results: list[BatchResult] = []
    complete = True
    for index, batch in enumerate(batches):

        def report(done: int, total: int, index: int = index) -> None:
            if on_progress is not None:
                on_progress(index * total + done, len(batches) * total)

        result, complete = _one_batch(networks, batch, settings, protocol, baseline, dict(failures), report)
        if complete or result.names:  # after Ctrl-C a batch size without 3 rounds is dropped
            results.append(result)
        if not complete:
            break
    if not complete and not results:
        raise KeyboardInterrupt
    return SweepResult(tuple(results), denormals, complete)


def _record_in(failures: dict[str, str]) -> OnFailure:
    def record(name: str, error: Exception) -> None:
        failures[name] = first_line(error)

    return record


def _count_denormals(
    networks: Sequence[PreparedNetwork], settings: RunSettings, on_failure: OnFailure
) -> dict[str, Denormals]:
    found: dict[str, Denormals] = {}
    # Several engines may share a model: count once, under the name of its first candidate.
    for network in {id(network.model): network for network in reversed(networks)}.values():
        with catch_out_of_memory(network.name, on_failure), _explain_failure(network, 1, settings):
            found[network.name] = count_denormals(network.model, settings.images(1, network.image))
    return {network.name: found[network.name] for network in networks if network.name in found}


def _one_batch(
    networks: Sequence[PreparedNetwork],
    batch: int,
    settings: RunSettings,
    protocol: SpeedProtocol,
    baseline: str,
    failures: dict[str, str],
    on_progress: Callable[[int, int], None],
) -> tuple[BatchResult, bool]:
    """Return the result of one batch size, and False after Ctrl-C."""
    samples: list[Sample] = []
    complete = True

    def keep(sample: Sample) -> None:
        samples.append(sample)
        on_progress(len(samples), protocol.rounds * (1 if protocol.interleaved else len(calls)))

    try:
        left = [network for network in networks if network.name not in failures]
        calls = make_calls(left, batch, settings, _record_in(failures))
        if calls:
            take_samples(calls, protocol, keep, on_failure=_record_in(failures), stopwatch=settings.stopwatch(batch))
    except KeyboardInterrupt:
        complete = False
    sampled = sampled_names(samples, 1 if complete else MIN_ROUNDS_AFTER_INTERRUPT)
    names = tuple(one.name for one in networks if one.name in sampled and one.name not in failures)
    return BatchResult(batch, tuple(samples), names, failures, baseline), complete


_PLAN, _FAILED = "plan", "lost-"  # keys of cells

Groups = Sequence[Sequence[str]]

#: Makes the calls of the networks with these names; the second argument takes those that run out of memory.
MakeCalls = Callable[[Sequence[str], OnFailure], Mapping[str, Call]]


def plan_groups(names: Sequence[str], pairs: Sequence[tuple[str, str]], baseline: str, fits: bool) -> Groups:
    """Return one group of all networks; if they do not fit together, small groups with the baseline in each.

    Args:
        names: of the networks, in the order of the table.
        pairs: names that the paper compares; pairs that are not among ``names`` are ignored.
        baseline: of the table.
        fits: whether all networks fit into memory at once.
    """
    if fits:
        return [list(names)]
    groups = [[one, other] for one, other in pairs if {one, other} <= set(names)]
    paired = {name for group in groups for name in group}
    groups += [[name] for name in names if name not in paired]  # alone, but with the baseline below
    first = [baseline] if baseline in names else []
    return [list(dict.fromkeys(first + group)) for group in groups]


def fit_together(weights: float, settings: RunSettings) -> bool:
    """Return whether that many weights fit into half of the free memory; the other half is for activations."""
    free = available_memory(settings.device)
    return free is None or 2 * weights * settings.torch_dtype.itemsize <= free


def measure_candidates(
    groups: Groups,
    candidates: Mapping[str, Candidate],
    store: CellStore,
    settings: RunSettings,
    protocol: SpeedProtocol,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Add the missing rounds of these candidates; see :func:`measure_rounds`."""

    def calls_of(names: Sequence[str], on_failure: OnFailure) -> Mapping[str, Call]:
        networks = prepare([candidates[name] for name in names], settings, on_failure)
        return make_calls(networks, batch, settings, on_failure)

    protocol = protocol_for(candidates.values(), protocol)
    measure_rounds(groups, calls_of, store, settings, protocol, batch, on_progress)


def measure_rounds(
    groups: Groups,
    calls_of: MakeCalls,
    store: CellStore,
    settings: RunSettings,
    protocol: SpeedProtocol,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Add a cell for each missing round, and one for each network that runs out of memory.

    Args:
        groups: names of the networks that are timed together; a continued study keeps its first groups.
        calls_of: builds the networks of a group.
        store: takes the cells.
        settings: device, dtype, memory format and threads.
        protocol: number of rounds and warm-up.
        batch: images in a call.
        on_progress: called with the number of rounds done and the total.
    """
    if _PLAN not in store:
        store.put(_PLAN, {"groups": [list(group) for group in groups]})
    # From the store, because rounds are numbered by group and free memory may have changed since the study began.
    groups = store[_PLAN]["groups"]
    total = protocol.rounds * len(groups)

    def record_failure(name: str, error: Exception) -> None:
        store.put(_FAILED + name, {"reason": first_line(error)})

    def record(group: int, sample: Sample) -> None:
        number = len(_samples_of(store.values, group))
        store.put(f"round-{group:02}-{number:04}", {"seconds": dict(sample)})
        on_progress(len(_round_keys(store.values)), total)

    for index, group in enumerate(groups):
        left = protocol.rounds - len(_samples_of(store.values, index))
        names = [name for name in group if _FAILED + name not in store]  # these would fail again
        if left > 0 and names and (calls := calls_of(names, record_failure)):
            stopwatch = settings.stopwatch(batch)
            rounds = replace(protocol, rounds=left)
            take_samples(calls, rounds, partial(record, index), on_failure=record_failure, stopwatch=stopwatch)
        calls = {}  # free these networks before the next group is built


def _round_keys(values: Mapping[str, Cell]) -> list[str]:
    return [key for key in values if key.startswith("round-")]


def _samples_of(values: Mapping[str, Cell], group: int) -> list[Sample]:
    return [values[key]["seconds"] for key in _round_keys(values) if key.startswith(f"round-{group:02}-")]


@dataclass(frozen=True, eq=False)
class Speeds:
    """The speeds of networks, from the rounds of a study."""

    groups: tuple[tuple[Sample, ...], ...]  # the samples of each group
    failures: Mapping[str, str]  # why networks ran out of memory, by name
    batch: int  # images in a call

    @classmethod
    def from_cells(cls, values: Mapping[str, Cell], batch: int) -> Speeds:
        """Read the cells of :func:`measure_rounds`."""
        groups = values[_PLAN]["groups"] if _PLAN in values else []
        samples = tuple(tuple(_samples_of(values, index)) for index in range(len(groups)))
        failures = {
            key.removeprefix(_FAILED): str(value["reason"]) for key, value in values.items() if key.startswith(_FAILED)
        }
        return cls(samples, failures, batch)

    @property
    def rounds(self) -> int:
        """The fewest rounds of any group."""
        return min(map(len, self.groups), default=0)

    @property
    def extent(self) -> str:
        """Rounds and batch size, in a sentence."""
        return f"{quantity(self.rounds, 'round')}, {quantity(self.batch, 'image')} a call."

    def timing(self, name: str) -> Timing | None:
        """Return the timing in the first group with the network; None if it was not measured."""
        samples = next(self._groups_with(name), None)
        return None if samples is None else summarize(samples, [name], name)[0]

    def cells(self, name: str) -> tuple[float | str | None, ...]:
        """Return the median, lower and upper quartile of the images per second, for ``SPEED_COLUMNS``."""
        timing = self.timing(name)
        quartiles = (None, None) if timing is None else (self.batch / timing.q3, self.batch / timing.q1)
        return (self.images_per_second(name), *quartiles)

    def images_per_second(self, name: str) -> float | str | None:
        """Return the median speed, :data:`OUT_OF_MEMORY`, or None if the network was not measured."""
        timing = self.timing(name)
        if timing is None:
            return OUT_OF_MEMORY if name in self.failures else None
        return self.batch / timing.median_seconds

    def ratio(self, name: str, to: str) -> Ratio | None:
        """Return the speed-up over another network within the rounds that hold both; None if there are none."""
        samples = next(self._groups_with(name, to), None)
        return None if samples is None else ratio(samples, name, to)

    def ratio_cells(self, name: str, to: str) -> tuple[float | None, float | None, float | None]:
        """Return the median of :meth:`ratio` and its quartiles, for ``RATIO_COLUMNS``."""
        found = self.ratio(name, to)
        return (found.median, found.q1, found.q3) if found else (None, None, None)

    def speedup(self, name: str, over: str) -> float | None:
        """Return the median of :meth:`ratio`."""
        found = self.ratio(name, over)
        return found.median if found else None

    def renamed(self, names: Mapping[str, str]) -> Speeds:
        """Return the speeds of the candidates ``names[name]`` under ``name``, without all others."""
        groups = tuple(
            tuple({name: sample[old] for name, old in names.items() if old in sample} for sample in samples)
            for samples in self.groups
        )
        failures = {name: self.failures[old] for name, old in names.items() if old in self.failures}
        return Speeds(groups, failures, self.batch)

    def _groups_with(self, *names: str) -> Iterator[tuple[Sample, ...]]:
        for samples in self.groups:
            if set(names) <= sampled_names(samples) - self.failures.keys():
                yield samples
