"""Worker processes: how they start, how they end, and how their failures are reported."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from repvgg.errors import DataError

_PRELOADED = ["torch", "torchvision.transforms.v2", "repvgg.data.loaders"]  # imported once, by the fork server
_PREFETCH = 4  # batches per worker: bridges a batch of large images without holding many in memory
_CHUNK = 64  # images that a worker of parallel_map returns at once, to amortize the queue

T = TypeVar("T")


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
            "worker_init_fn": end_with_parent,
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


def end_with_parent(_: int = 0) -> None:
    """End this worker as soon as the process that requested it is gone, even by SIGKILL."""
    # torch's own watchdog compares getppid(), which is the fork server here. That one lives as long as its children,
    # so both would outlive a killed run.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent.join,), daemon=True).start()


def _exit_after(wait: Callable[[], object]) -> None:
    wait()
    os._exit(1)  # not sys.exit, which would end this thread only


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
            "in a script of your own, guard the start with if __name__ == '__main__'."
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

    def __getitem__(self, index: int) -> Any:
        return self._function(index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:  # a hook of DataLoader: one call per batch
        return [self._function(index) for index in indices]
