"""What all loaders have in common: their interface, the share of each rank, and worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from repvgg.data.decode import CorruptImage, CorruptImageLog
from repvgg.errors import DataError, UsageError

_PRELOADED = ["torch", "torchvision.transforms.v2", "repvgg.data.map_style"]  # imported once, by the fork server
_PREFETCH = 4  # batches per worker: bridges a batch of large images without holding many in memory
_CHUNK = 64  # images that a worker of parallel_map returns at once, to amortize the queue

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True)
class RankShard:
    """The share of each batch that one rank loads.

    Raises:
        UsageError: a batch size below 1, or a rank out of range.
    """

    batch_size: int  # images per batch and rank
    rank: int = 0  # of this process
    world_size: int = 1  # number of ranks

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1 image, got {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank must be in [0, {self.world_size}), got {self.rank}.")

    @property
    def global_batch_size(self) -> int:
        """Images per step over all ranks."""
        return self.batch_size * self.world_size

    def __str__(self) -> str:
        others = f" on each of {self.world_size} ranks" if self.world_size > 1 else ""
        return f"{self.batch_size}{others}"


class TrainLoader(ABC):
    """The training batches of one rank: images (n, C, H, W), uint8 or float32, and labels (n,) int64.

    Each pass loads the epoch that was set last with :meth:`set_epoch`, or epoch 0.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches per epoch; all are full."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Select the order and the augmentation of ``epoch``, counted from 0."""

    @abstractmethod
    def skip(self, batches: int) -> None:
        """Start the next pass, and only that, after ``batches`` batches, to resume an interrupted epoch.

        Raises:
            UsageError: a negative number, or more than an epoch is known to have.
        """


class ValLoader(ABC):
    """The validation images in order; each is loaded by exactly one rank."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the last one may be smaller, and so may one with corrupt images."""


class LoadedBatch(NamedTuple):
    """What a worker sends for one batch."""

    images: Tensor
    labels: Tensor
    corrupt: tuple[CorruptImage, ...] = ()
    failure: str | None = None


def failed_batch(message: str, corrupt: list[CorruptImage]) -> LoadedBatch:
    """Return an empty batch that carries an error message.

    An exception would leave the worker with its complete traceback as its text.
    """
    return LoadedBatch(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(corrupt), message)


def delivered(loaded: Iterator[LoadedBatch], log: CorruptImageLog, workers: int) -> Iterator[Batch]:
    """Yield images and labels of loaded batches that are not empty; record corrupt images in ``log``.

    Raises:
        DataError: a worker reports a failure, or dies.
    """
    with worker_failures(workers):
        for images, labels, corrupt, failure in loaded:
            log.add(corrupt)
            if failure is not None:
                raise DataError(failure)
            if len(labels):  # empty where all images of a validation batch are corrupt
                yield images, labels


def check_skip(batches: int, num_batches: int | None) -> None:
    """Raise UsageError for a number of batches to skip that is negative or more than the epoch has."""
    if batches < 0 or (num_batches is not None and batches > num_batches):
        epoch = "an epoch of unknown length" if num_batches is None else f"an epoch of {num_batches}"
        raise UsageError(f"{batches} batches cannot be skipped of {epoch}.")


def data_loader(dataset: Dataset[Any], workers: int, batches: Iterable[Any] | None = None) -> DataLoader[Any]:
    """Return a DataLoader over ``batches`` of a map-style dataset, or over what an iterable dataset yields.

    The dataset returns complete batches, so nothing is collated. Torch's global generator is not advanced.
    """
    is_iterable = isinstance(dataset, IterableDataset)
    worker_options: dict[str, Any] = {}
    if workers:
        worker_options = {
            "multiprocessing_context": _start_context(),
            # An iterable dataset carries its epoch as a field, which running workers would not see change.
            "persistent_workers": not is_iterable,
            "prefetch_factor": _PREFETCH,
            "worker_init_fn": _end_with_parent,
        }
    return DataLoader(
        dataset,
        batch_size=None if is_iterable else 1,
        batch_sampler=None if is_iterable else batches,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),  # page-locked memory: copies to the GPU overlap with computing
        generator=torch.Generator(),  # else DataLoader draws its base seed from the global generator
        **worker_options,
    )


def _start_context() -> Any:
    # A plain fork would copy locks that other threads hold (OpenMP, CUDA) and may deadlock. With a fork server, memory
    # of tensors is shared with the workers and not copied. Windows has spawn only.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _end_with_parent(_: int) -> None:
    """End this worker as soon as the process that requested it is gone, even by SIGKILL."""
    # torch's own watchdog compares getppid(), which is the fork server here. That one lives as long as its children,
    # so both would outlive a killed run.
    parent = multiprocessing.parent_process()
    if parent is not None:

        def exit_after_parent() -> None:
            parent.join()
            os._exit(1)  # not sys.exit, which would end this thread only

        threading.Thread(target=exit_after_parent, daemon=True).start()


def _identity(batch: T) -> T:
    return batch


@contextmanager
def worker_failures(workers: int) -> Iterator[None]:
    """Turn the death of one of ``workers`` processes into a DataError of one sentence.

    Raises:
        DataError: a worker died.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        # A death surfaces in two ways: torch's watchdog raises a RuntimeError with this text, or the shared memory
        # of a batch can no longer be opened (EOFError, OSError). "Caught …" is an exception re-raised from a worker.
        from_watchdog = "DataLoader worker (pid" in str(error)
        if not workers or (isinstance(error, RuntimeError) and not from_watchdog) or str(error).startswith("Caught "):
            raise
        raise DataError(
            "A worker process died, perhaps for lack of memory: use fewer workers, or 0 to see the error; "
            "in a script, put the code that starts it under if __name__ == '__main__'."
        ) from error


def parallel_map(function: Callable[[int], T], length: int, workers: int) -> Iterator[T]:
    """Yield ``function(i)`` for i = 0 … length − 1, in order, computed by ``workers`` processes."""
    chunks = [range(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK)]
    # Starting workers takes longer than a single chunk.
    loader = data_loader(_Chunks(function), workers if length > _CHUNK else 0, chunks)
    with worker_failures(loader.num_workers):
        for values in loader:
            yield from values


@final
class _Chunks(Dataset[Any]):
    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:  # a hook of DataLoader: one call per batch
        return [self._function(index) for index in indices]
