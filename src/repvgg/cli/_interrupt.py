"""Ctrl-C: say at once what was interrupted and how to continue, while the program is still on its way out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

DEFAULT = "interrupted"


class _State:
    """Of the process, as signals are: there is one command at a time."""

    message: Callable[[], str] = staticmethod(lambda: DEFAULT)
    interrupted = False


@contextmanager
def announced_interrupts() -> Iterator[None]:
    """Print the message of :func:`interrupt_message` to standard error as soon as SIGINT arrives.

    Python runs its own handler between two bytecodes of the main thread: a backward pass of a large batch may delay
    that by many seconds. The operating system's handler writes to a pipe at once, and a thread reads it.
    """
    _State.interrupted = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader,), name="repvgg-interrupt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # the thread reads the end of the pipe, and ends
        thread.join()
        os.close(reader)


@contextmanager
def interrupt_message(message: Callable[[], str] | None) -> Iterator[None]:
    """Set what Ctrl-C prints while the body runs; None prints nothing, for commands that then print their results."""
    before = _State.message
    _State.message = (lambda: "") if message is None else message
    try:
        yield
    except KeyboardInterrupt:
        if message is not None:
            tell()
        raise
    finally:
        _State.message = before


def tell() -> None:
    """Print the message of an interruption, unless it has been printed."""
    if _State.interrupted or not (message := _State.message()):
        return
    _State.interrupted = True
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


def was_told() -> bool:
    """Return whether Ctrl-C has been pressed and a message printed: later errors are its consequences."""
    return _State.interrupted


def _watch(reader: int) -> None:
    while received := os.read(reader, 64):
        if signal.SIGINT in received:
            tell()
