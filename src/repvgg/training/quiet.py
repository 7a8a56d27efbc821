"""Lightning as a guest: it says nothing, leaves no global switch turned, and lets Ctrl-C through."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def lightning_as_guest() -> Iterator[None]:
    """Run a Trainer inside with no chatter, no traces in global state, and the standard exception on Ctrl-C."""
    with ExitStack() as stack:
        for guard in (_silence(), _determinism_put_back(), _interruptible()):
            stack.enter_context(guard)
        yield


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back Lightning's tips and device lines, and its warnings about its own settings."""
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
def _determinism_put_back() -> Iterator[None]:
    """Undo ``Trainer(deterministic=True)``: torch's switches and the variable for cuBLAS."""
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
    """Turn what Lightning 2.6 makes of Ctrl-C (SIGINT ignored from then on, ``SystemExit``) back into Ctrl-C."""
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
