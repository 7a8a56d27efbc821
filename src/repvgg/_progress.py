"""Progress of long work on standard error: a bar or spinner on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: Takes how much is done, and of how much if that is known.
ReportProgress = Callable[[int, int | None], None]

_SECONDS_BETWEEN_LINES = 30.0  # logs stay short, and nothing is silent for a minute


@contextmanager
def busy(what: str, console: Console | None = None) -> Iterator[None]:
    """Show that something is going on while the body runs.

    Args:
        what: what is done: ``Verifying``.
        console: where to show it (default: standard error).
    """
    console = console or _standard_error()
    if console.is_terminal:
        with console.status(what):
            yield
        return
    with periodic_lines(console, lambda: what):
        yield


@contextmanager
def progress_bar(what: str, console: Console | None = None, *, auto_refresh: bool = True) -> Iterator[ReportProgress]:
    """Yield the function that reports progress while the body runs.

    Args:
        what: what is counted: ``images``.
        console: where to show it (default: standard error).
        auto_refresh: False redraws a bar only when progress is reported. A thread that redraws ten times a second would
            disturb what is being timed.
    """
    from rich.progress import MofNCompleteColumn, Progress

    console = console or _standard_error()
    if console.is_terminal:
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True, auto_refresh=auto_refresh) as bar:
            task = bar.add_task(what, total=None)
            bar.refresh()
            yield lambda done, total: bar.update(task, completed=done, total=total, refresh=not auto_refresh)
        return
    state: list[tuple[int, int | None]] = [(0, None)]

    def report(done: int, total: int | None) -> None:
        state[0] = (done, total)

    def line() -> str:
        done, total = state[0]
        return f"{what}: {done:,}" + ("" if total is None else f" of {total:,}")

    with periodic_lines(console, line):
        yield report


@contextmanager
def periodic_lines(console: Console, line: Callable[[], str]) -> Iterator[None]:
    """Print ``line()`` every half minute while the body runs, with the seconds since it began."""
    stopped, began = threading.Event(), time.monotonic()

    def write() -> None:
        while not stopped.wait(_SECONDS_BETWEEN_LINES):
            console.print(f"{line()} ({time.monotonic() - began:.0f} s)", markup=False, highlight=False, soft_wrap=True)

    # A daemon: it must not keep a process alive whose main thread has died.
    thread = threading.Thread(target=write, name="repvgg-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _standard_error() -> Console:
    from rich.console import Console

    return Console(stderr=True)
