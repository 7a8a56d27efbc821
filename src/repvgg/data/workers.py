"""Loading processes: how they are started, and what is said if one dies."""

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

_PRELOADED = ["torch", "torchvision.transforms.v2", "repvgg.data.loading"]
_PREFETCH = 4  # batches a process
_CHUNK = 64  # images that a process hands over at once

T = TypeVar("T")


def data_loader(dataset: Dataset[Any], workers: int, batches: Iterable[Any] | None = None) -> DataLoader[Any]:
    """A DataLoader that hands over what ``dataset`` makes of each of ``batches``, or what it yields by itself.

    Processes come from a fork server (spawned where there is none): they are not forks of this process, which may
    hold locks and threads, and what is in tensors is shared with them and not copied. They end when this process does,
    however it ends. Nothing is drawn from torch's generator.
    """
    streamed = isinstance(dataset, IterableDataset)
    several: dict[str, Any] = {}
    if workers:
        several = {
            "multiprocessing_context": start_method(),
            "persistent_workers": not streamed,
            "prefetch_factor": _PREFETCH,
            "worker_init_fn": end_with_parent,
        }
    return DataLoader(
        dataset,
        batch_size=None if streamed else 1,
        batch_sampler=None if streamed else batches,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        **several,
    )


def start_method() -> Any:
    """How processes are started: a fork server that has loaded what they need, or spawned."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def end_with_parent(_: int = 0) -> None:
    """End this process as soon as the one that asked for it is gone.

    torch's own watchdog looks at the process above, which is the fork server: that one lives as long as its children,
    and both would outlive a run that was killed.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.join,), daemon=True).start()


def _end_after(parent_ended: Callable[[], object]) -> None:
    parent_ended()
    os._exit(1)


def as_it_is(loaded: T) -> T:
    """Collate nothing: data sets hand over whole batches."""
    return loaded


@contextmanager
def told_apart(workers: int) -> Iterator[None]:
    """Turn the death of one of so many loading processes into one sentence.

    It shows in two ways: torch finds it dead, or what it had handed over cannot be fetched any more.

    Raises:
        DataError: a process died.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError) as error:
        torch_says = "DataLoader worker (pid" in str(error)
        if not workers or (isinstance(error, RuntimeError) and not torch_says) or str(error).startswith("Caught "):
            raise
        raise DataError(
            "A loading process died, perhaps for lack of memory: take fewer workers, or 0 to see what happens; "
            "in a script of your own, start under if __name__ == '__main__'."
        ) from error


def in_order(function: Callable[[int], T], length: int, workers: int) -> Iterator[T]:
    """What ``function`` makes of 0 … length − 1, in order, computed by that many processes."""
    chunks = [range(start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK)]
    loader = data_loader(_Chunks(function), workers if length > _CHUNK else 0, chunks)
    with told_apart(loader.num_workers):
        for values in loader:
            yield from values


@final
class _Chunks(Dataset[Any]):
    """Calls a function on whole chunks of indices."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def __getitem__(self, index: int) -> Any:
        return self._function(index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self._function(index) for index in indices]
