"""Who works on a cell: one process at a time, told by name, and none that is no more."""

import socket
import subprocess
import sys

import pytest

from repvgg.errors import OutputError, UsageError
from repvgg.studies.claims import Holder, Share, claimed, holder_of

HOLD = """
import sys
from pathlib import Path
from repvgg.studies.claims import claimed
with claimed(Path(sys.argv[1])) as claim:
    print(claim.ours, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of this folder."""
    lock = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    yield lock, process
    process.kill()
    process.communicate()


def test_a_cell_is_taken_once_and_given_back(tmp_path):
    lock = tmp_path / "a.lock"
    with claimed(lock) as claim:
        assert (claim.ours, claim.other) == (True, None)
        with claimed(lock) as second:
            assert not second.ours
    assert not lock.exists()
    assert holder_of(lock) is None


def test_another_process_is_named(other):
    lock, process = other
    with claimed(lock) as claim:
        assert not claim.ours
        assert claim.other == Holder(str(process.pid), socket.gethostname())
        assert str(process.pid) in str(claim.other)
    assert lock.exists(), "theirs"


def test_what_a_killed_process_left_is_taken_over_and_told(other):
    lock, process = other
    process.kill()
    process.wait()
    with claimed(lock) as claim:
        assert claim.ours
        assert claim.other is not None
        assert claim.other.process == str(process.pid)
    assert not lock.exists()


def test_of_another_machine_nobody_can_tell(tmp_path):
    lock = tmp_path / "a.lock"
    lock.write_text("1\nsome-other-machine\n")
    with claimed(lock) as claim:
        assert not claim.ours
        assert str(claim.other) == "process 1 on some-other-machine"
    assert lock.exists()


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"), claimed(tmp_path / "file" / "a.lock"):
        pass


def test_shares_part_all_cells():
    held = [[index for index in range(7) if Share.read(f"{number}/3").holds(index)] for number in (1, 2, 3)]
    assert held == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1/0"])
def test_shares_that_there_are_not(text):
    with pytest.raises(UsageError, match="share"):
        Share.read(text)
