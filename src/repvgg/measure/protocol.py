"""When which candidate is called: two protocols, and the readings that they give."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from repvgg._contexts import gc_paused
from repvgg.errors import UsageError, is_out_of_memory
from repvgg.measure.stopwatch import Call, Stopwatch, WallClock

#: Seconds for a call of each candidate that took its turn: all of them in a round, or one after the other.
Reading = Mapping[str, float]

#: Takes the name of a candidate that ran out of memory, and how PyTorch says it.
OnFailure = Callable[[str, Exception], None]


@dataclass(frozen=True)
class SpeedProtocol:
    """How often candidates are called, and in which order.

    Attributes:
        rounds: readings of each candidate.
        warmup_calls: calls of each candidate before its first reading, at least.
        warmup_seconds: how long they take, at least.
        min_round_seconds: the shortest time worth reading off the clock, above 0. A candidate that takes less is
            called 2, 4, 8, … times in a row, and the mean is taken.
        interleaved: each round takes a reading of every candidate and starts with the next one; otherwise a candidate
            is warmed up and gives all of its readings before the next one begins.
        batch: images of a call, where nobody says otherwise.
    """

    rounds: int = 30
    warmup_calls: int = 2
    warmup_seconds: float = 0.5
    min_round_seconds: float = 0.01
    interleaved: bool = True
    batch: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batch < 1:
            raise UsageError(f"Measuring needs a round and an image at least, not {self.rounds} and {self.batch}.")
        if not self.min_round_seconds > 0.0:
            raise UsageError(f"A clock cannot read off {self.min_round_seconds} s: let a round take longer than that.")


#: For machines on which other things happen: many short rounds, medians, ratios within each round.
INTERLEAVED = SpeedProtocol()

#: The paper's (§4.1): 50 batches of 128 to warm up, then 50 that are timed, one model after the other.
PAPER = SpeedProtocol(
    rounds=50, warmup_calls=50, warmup_seconds=0.0, min_round_seconds=1e-6, interleaved=False, batch=128
)

PROTOCOLS = {"interleaved": INTERLEAVED, "paper": PAPER}


def take_readings(
    candidates: Mapping[str, Call],
    protocol: SpeedProtocol,
    on_reading: Callable[[Reading], None],
    *,
    on_failure: OnFailure | None = None,
    stopwatch: Stopwatch | None = None,
) -> set[str]:
    """Read the stopwatch as the protocol says, and hand over each reading as it comes.

    Python's garbage collector is off meanwhile, and PyTorch is in inference mode.

    Args:
        candidates: name to a call without arguments.
        protocol: how often and in which order.
        on_reading: takes the seconds for a call, by name. Nothing of this function runs meanwhile.
        on_failure: told of a candidate that ran out of memory, which is then left out; None raises.
        stopwatch: None takes the clock of this machine.

    Returns:
        The names of those that ran out of memory.
    """
    if not candidates:
        raise UsageError("There is nothing to measure: name a candidate.")
    gc.collect()
    with torch.inference_mode(), gc_paused():
        session = _Session(candidates, protocol, stopwatch or WallClock(), on_failure)
        for reading in session.interleaved() if protocol.interleaved else session.one_by_one():
            on_reading(reading)
        return session.failed


class _Session:
    """The candidates that still take part, and how many calls in a row make a reading of each."""

    def __init__(
        self,
        candidates: Mapping[str, Call],
        protocol: SpeedProtocol,
        stopwatch: Stopwatch,
        on_failure: OnFailure | None,
    ) -> None:
        self.candidates, self.protocol, self.stopwatch = candidates, protocol, stopwatch
        self.on_failure = on_failure
        self.calls: dict[str, int] = {}
        self.failed: set[str] = set()

    def interleaved(self) -> Iterator[Reading]:
        """All are warmed up; then round r takes a reading of each, starting with candidate r."""
        for name in self.candidates:
            self._warm_up(name)
        for index in range(self.protocol.rounds):
            names = [name for name in self.candidates if name not in self.failed]
            first = index % max(1, len(names))
            if reading := self._read(names[first:] + names[:first]):
                yield reading

    def one_by_one(self) -> Iterator[Reading]:
        """Each is warmed up and then read to the end."""
        for name in self.candidates:
            self._warm_up(name)
            for _ in range(self.protocol.rounds):
                if name not in self.failed and (reading := self._read([name])):
                    yield reading

    def _warm_up(self, name: str) -> None:
        with memory_watched(name, self._give_up):
            self.calls[name] = _warmed_up(self.candidates[name], self.protocol, self.stopwatch)

    def _read(self, names: Sequence[str]) -> Reading:
        """Seconds for a call of each; without those for which memory ran out."""
        reading = {}
        for name in names:
            with memory_watched(name, self._give_up):
                reading[name] = self.stopwatch(self.candidates[name], self.calls[name]) / self.calls[name]
        return reading

    def _give_up(self, name: str, error: Exception) -> None:
        """Leave a candidate out from now on."""
        if self.on_failure is None:
            raise error
        self.failed.add(name)
        self.on_failure(name, error)


def _warmed_up(call: Call, protocol: SpeedProtocol, stopwatch: Stopwatch) -> int:
    """Call as often as it takes to warm up; return how many calls in a row fill ``min_round_seconds``."""
    stopwatch(call, 1)  # the first may compile, allocate and read files: it says nothing about the others
    done, spent, calls = 1, 0.0, 1
    while True:
        seconds = stopwatch(call, calls)
        done, spent = done + calls, spent + seconds
        short = seconds < protocol.min_round_seconds
        if not short and spent >= protocol.warmup_seconds and done >= protocol.warmup_calls:
            return calls
        calls *= 2 if short else 1


@contextmanager
def memory_watched(name: str, on_failure: OnFailure) -> Iterator[None]:
    """Tell ``on_failure`` where memory runs out inside, and go on behind; all other errors pass."""
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        on_failure(name, error)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # out here, where the error holds no tensors any more
