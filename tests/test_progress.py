"""Progress where no terminal is: a line from time to time, none for what is quick."""

import io
import threading

import pytest
from rich.console import Console

from repvgg import _progress


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setattr(_progress, "_SECONDS_BETWEEN_LINES", 0.01)
    return Console(file=_Signalling(), force_terminal=False)


class _Signalling(io.StringIO):
    """Text that tells when a line has been written, so that no test depends on time."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def write(self, text):
        super().write(text)
        if "\n" in text:
            self.written.set()
        return len(text)

    def next_line(self):
        self.written.clear()
        assert self.written.wait(60)
        return self.getvalue().splitlines()[-1]


def test_busy_writes_lines(console):
    with _progress.busy("Verifying", console):
        assert console.file.next_line().startswith("Verifying (")


def test_progress_writes_what_was_reported_last(console):
    with _progress.progress_bar("images", console) as report:
        assert console.file.next_line().startswith("images: 0 (")
        report(1200, 5000)
        console.file.next_line()  # may have been formatted before the report
        assert console.file.next_line().startswith("images: 1,200 of 5,000 (")


def test_quick_work_writes_nothing_and_leaves_no_thread():
    console = Console(file=io.StringIO(), force_terminal=False)
    with _progress.busy("Verifying", console), _progress.progress_bar("images", console) as report:
        report(1, 2)
    assert console.file.getvalue() == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "repvgg-progress"]


def test_the_thread_ends_with_an_error(console):
    with pytest.raises(ValueError, match="wrong"), _progress.busy("Verifying", console):
        raise ValueError("wrong")
    assert not [thread for thread in threading.enumerate() if thread.name == "repvgg-progress"]


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with _progress.progress_bar("images", console, auto_refresh=False) as report:
        report(1, 4)
    assert "25%" in console.file.getvalue()


def test_training_reports_steps_where_no_terminal_is(console):
    from repvgg.training.callbacks import History, ProgressBar

    with ProgressBar(History(), console):
        assert console.file.next_line().startswith("training, step 0 (")
