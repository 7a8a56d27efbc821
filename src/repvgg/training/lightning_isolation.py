"""Keep Lightning's side effects out of the caller's process: log lines, global switches, signal handlers."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from repvgg.data import TrainLoader, ValLoader

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def isolate_lightning() -> Iterator[None]:
    """Run a Trainer inside without its log output, and restore global state; Ctrl-C raises ``KeyboardInterrupt``."""
    with _silent(), _determinism_restored(), _interruptible():
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress Lightning's tips and device lines, and its warnings about settings that are deliberate here."""
    # By level rather than by handler: handlers of the root logger would still print.
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _determinism_restored() -> Iterator[None]:
    """Undo ``Trainer(deterministic=True)``, which sets torch's global switches and cuBLAS's environment variable."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, cublas = torch.backends.cudnn.benchmark, os.environ.get(_CUBLAS)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        os.environ.pop(_CUBLAS, None)
        if cublas is not None:
            os.environ[_CUBLAS] = cublas


@contextmanager
def _interruptible() -> Iterator[None]:
    # On Ctrl-C Lightning 2.6 ignores SIGINT from then on and raises SystemExit in place of KeyboardInterrupt.
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


@final
class DeferredLoader:
    """A loader whose iterators do no work before their first batch is read.

    Lightning calls ``iter`` more often than it reads: each call would start worker processes in vain, and count as a
    pass over the data.
    """

    def __init__(self, loader: TrainLoader | ValLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._loader  # a generator: the inner iter() runs at the first next()
