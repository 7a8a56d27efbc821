"""Networks on the stopwatch side by side: made ready once, then timed with one batch size after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from repvgg.errors import UsageError, first_line, is_out_of_memory
from repvgg.measure import (
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
from repvgg.studies.candidates import Candidate
from repvgg.studies.engines import ENGINES, Run, Shape, check_engines

_FEWEST_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Prepared:
    """A candidate that is ready to run.

    Attributes:
        name: of the candidate.
        run: takes images.
        model: the network inside, in its dtype and on its device.
        image: (C, H, W).
    """

    name: str
    run: Run
    model: nn.Module
    image: Shape


def prepare(candidates: Iterable[Candidate], setting: RunSettings, on_failure: OnFailure) -> list[Prepared]:
    """Hand each network to its engine; one that does not fit in memory is told of and left out.

    Raises:
        UsageError: there is no such engine, or it cannot follow the setting.
    """
    ready = []
    for candidate in candidates:
        check_engines([candidate.engine], setting)
        with catch_out_of_memory(candidate.name, on_failure):
            model = candidate.make()
            run = ENGINES[candidate.engine].prepare(model, setting, candidate.image)
            ready.append(Prepared(candidate.name, run, model, candidate.image))
    return ready


def calls_on(networks: Sequence[Prepared], batch: int, setting: RunSettings, on_failure: OnFailure) -> dict[str, Call]:
    """A call without arguments for each network, on images of this batch; each has run once.

    Raises:
        UsageError: a network cannot run on such images, or cannot be compiled.
    """
    images: dict[Shape, Tensor] = {}
    calls: dict[str, Call] = {}
    for network in networks:
        with catch_out_of_memory(network.name, on_failure):
            with _explained(network, 1, setting):
                _check_room(network, batch, setting)
            if network.image not in images:
                images[network.image] = setting.images(batch, network.image)
            call = partial(network.run, images[network.image])
            with _explained(network, batch, setting):
                call()
            calls[network.name] = call
    return calls


def _check_room(network: Prepared, batch: int, setting: RunSettings) -> None:
    """Refuse what surely does not fit into the memory of a CPU, by what one image needs.

    A GPU says by itself when it is full. A CPU's system lends memory that is not there, and ends the process later.
    """
    if setting.device != "cpu" or batch == 1:
        return
    needed, free = batch * walk(network.model, setting.images(1, network.image)).peak, available_memory("cpu")
    if free is not None and needed > free:
        raise MemoryError(f"activations need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


@contextmanager
def _explained(network: Prepared, batch: int, setting: RunSettings) -> Iterator[None]:
    """Without gradients, and with what a compiler or somebody's forward may raise in one sentence."""
    try:
        with torch.inference_mode():
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        size = " x ".join(map(str, (batch, *network.image)))
        advice = ", or leave out --compile" if setting.compile else ""
        raise UsageError(
            f"{network.name!r} cannot run on images of {size} in {setting.dtype}: {first_line(error)}. Take another "
            f"size or dtype{advice}."
        ) from error


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What was read with one batch size.

    Attributes:
        batch: images of a call.
        readings: in the order in which they came.
        names: of those that were measured to the end.
        failures: why others were not, by name.
        baseline: that ratios refer to.
    """

    batch: int
    readings: tuple[Sample, ...]
    names: tuple[str, ...]
    failures: Mapping[str, str]
    baseline: str

    @property
    def timings(self) -> list[Timing]:
        """One of each that was measured, in their order."""
        return summarize(self.readings, self.names, self.baseline)

    def ratio(self, name: str, to: str) -> Ratio | None:
        """How many times as fast as another one; None where one of them was not measured."""
        return ratio(self.readings, name, to) if {name, to} <= set(self.names) else None


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What came of all batch sizes.

    Attributes:
        batches: one for each batch size, in their order; after Ctrl-C those until then.
        denormals: of each network on one image, by name.
        complete: whether nobody interrupted.
    """

    batches: tuple[BatchResult, ...]
    denormals: Mapping[str, Denormals]
    complete: bool


def sweep(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    setting: RunSettings,
    protocol: SpeedProtocol,
    *,
    baseline: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Time all candidates side by side, with one batch size after the other.

    What does not fit in memory is left out of that batch size; the rest goes on. Ctrl-C keeps what was measured, if
    that is at least 3 rounds. The setting has to be applied already.

    Args:
        candidates: what takes part.
        batches: images of a call.
        setting: where and in which numbers.
        protocol: how often and in which order.
        baseline: name of the candidate that ratios refer to.
        on_progress: called after each reading with the readings done and those in all.

    Raises:
        KeyboardInterrupt: Ctrl-C before anything was measured.
        UsageError: a candidate cannot run, or there is no such engine.
    """
    lost: dict[str, str] = {}
    networks = prepare(candidates, setting, _noting(lost))
    denormals = _denormals(networks, setting, _noting(lost))
    results: list[BatchResult] = []
    for index, batch in enumerate(batches):
        note = None if on_progress is None else partial(_told, on_progress, index, len(batches))
        result, complete = _one_batch(networks, batch, setting, protocol, baseline, dict(lost), note)
        if complete or result.names:
            results.append(result)
        if not complete and not results:
            raise KeyboardInterrupt
        if not complete:
            return SweepResult(tuple(results), denormals, complete=False)
    return SweepResult(tuple(results), denormals, complete=True)


def _noting(lost: dict[str, str]) -> OnFailure:
    def note(name: str, error: Exception) -> None:
        lost[name] = first_line(error)

    return note


def _told(on_progress: Callable[[int, int], None], index: int, batches: int, done: int, total: int) -> None:
    on_progress(index * total + done, batches * total)


def _denormals(networks: Sequence[Prepared], setting: RunSettings, on_failure: OnFailure) -> dict[str, Denormals]:
    found: dict[str, Denormals] = {}
    for network in {id(network.model): network for network in reversed(networks)}.values():  # once for all engines
        with catch_out_of_memory(network.name, on_failure), _explained(network, 1, setting):
            found[network.name] = count_denormals(network.model, setting.images(1, network.image))
    return {network.name: found[network.name] for network in networks if network.name in found}


def _one_batch(
    networks: Sequence[Prepared],
    batch: int,
    setting: RunSettings,
    protocol: SpeedProtocol,
    baseline: str,
    lost: dict[str, str],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[BatchResult, bool]:
    """The readings of one batch size, and whether nobody interrupted."""
    readings: list[Sample] = []
    complete = True

    def keep(reading: Sample) -> None:
        readings.append(reading)
        if on_progress is not None:
            on_progress(len(readings), protocol.rounds * (1 if protocol.interleaved else len(calls)))

    try:
        calls = calls_on([one for one in networks if one.name not in lost], batch, setting, _noting(lost))
        if calls:
            take_samples(calls, protocol, keep, on_failure=_noting(lost), stopwatch=setting.stopwatch(batch))
    except KeyboardInterrupt:
        complete = False
    kept = sampled_names(readings, 1 if complete else _FEWEST_ROUNDS)
    names = tuple(one.name for one in networks if one.name in kept and one.name not in lost)
    return BatchResult(batch, tuple(readings), names, lost, baseline), complete
