"""A folder of cells: written one by one, continued, never mixed; and locks between processes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repvgg.errors import DataError, OutputError, OutputExistsError, UsageError
from repvgg.studies.store import HEADER, CellShare, CellStore, Header, LockHolder, lock_holder, read_header, try_lock

SETTINGS = {"batch": 8, "dtype": "float32"}
MACHINE = {"cpu": "a processor", "threads": "2", "torch": "2.15.0", "load": "0.50"}


def header(**changes):
    return Header("table4", SETTINGS | changes.pop("settings", {}), MACHINE | changes, command="repvgg study table4")


def test_nothing_is_written_before_the_first_cell(tmp_path):
    store = CellStore.open(tmp_path / "new", header())
    assert len(store) == 0
    assert not (tmp_path / "new").exists()


def test_cells_are_on_disk_as_soon_as_they_are_put(tmp_path):
    store = CellStore.open(tmp_path / "new", header())
    store.put("b", {"seconds": 0.5})
    store.put("a", {"seconds": 1.5})
    again = CellStore.open(tmp_path / "new", header(load="9.99"))
    assert again.values == {"a": {"seconds": 1.5}, "b": {"seconds": 0.5}}
    assert list(again.values) == ["a", "b"]
    assert "a" in again
    assert again["a"] == {"seconds": 1.5}
    assert again.header == store.header, "the header of the first start"
    assert again.header.started
    assert not again.header.finished


def test_empty_folder_is_accepted(tmp_path):
    CellStore.open(tmp_path, header()).put("a", {})
    assert (tmp_path / HEADER).is_file()


def test_folder_of_an_older_version_is_continued(tmp_path):
    """Literal files of version 0.9: study.json, and a cell of a round."""
    (tmp_path / "cells").mkdir()
    (tmp_path / "study.json").write_text(
        '{\n "study": "table4",\n "settings": {\n  "batch": 8,\n  "rounds": 30,\n  "max_gmacs": 12.0,\n'
        '  "input_size": null,\n  "device": "cpu",\n  "dtype": "float32",\n  "channels_last": false,\n'
        '  "threads": null,\n  "compile": false,\n  "flush_denormal": false\n },\n "environment": {\n'
        '  "cpu": "a processor",\n  "threads": "2",\n  "torch": "2.15.0",\n  "load": "0.50"\n },\n'
        ' "command": "repvgg study table4",\n "started": "2026-08-03T14:05:00+00:00",\n "finished": ""\n}\n'
    )
    (tmp_path / "cells" / "plan.json").write_text('{\n "groups": [\n  [\n   "repvgg_a0"\n  ]\n ]\n}\n')
    (tmp_path / "cells" / "round-00-0000.json").write_text('{\n "seconds": {\n  "repvgg_a0": 0.5\n }\n}\n')
    (tmp_path / "cells" / "lost-resnet18.json").write_text('{\n "reason": "out of memory"\n}\n')
    settings = {
        "batch": 8,
        "rounds": 30,
        "max_gmacs": 12.0,
        "input_size": None,
        "device": "cpu",
        "dtype": "float32",
        "channels_last": False,
        "threads": None,
        "compile": False,
        "flush_denormal": False,
    }
    store = CellStore.open(tmp_path, Header("table4", settings, MACHINE))
    assert store.header.started == "2026-08-03T14:05:00+00:00"
    assert store["round-00-0000"] == {"seconds": {"repvgg_a0": 0.5}}
    assert store["plan"] == {"groups": [["repvgg_a0"]]}
    assert store["lost-resnet18"] == {"reason": "out of memory"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"batch": 16}}, "batch 8, not 16"),
        ({"settings": {"more": None}}, None),
        ({"cpu": "another"}, "cpu 'a processor', not 'another'"),
        ({"threads": "1"}, "threads '2', not '1'"),
        ({"gpu": "a GPU"}, "gpu None, not 'a GPU'"),
    ],
)
def test_cells_of_other_settings_or_machines_are_refused(tmp_path, changes, words):
    CellStore.open(tmp_path, header()).put("a", {})
    if words is None:
        assert CellStore.open(tmp_path, header(**changes)).values == {"a": {}}, "a new setting with its default, None"
        return
    with pytest.raises(UsageError, match=words):
        CellStore.open(tmp_path, header(**changes))
    assert len(CellStore.open(tmp_path, header(**changes), overwrite=True)) == 0
    assert not (tmp_path / HEADER).exists()


def test_cells_of_several_machines_are_mixed_on_request(tmp_path):
    CellStore.open(tmp_path, header()).put("a", {})
    other = CellStore.open(tmp_path, header(cpu="another"), mix_machines=True)
    other.put("b", {"x": 1})
    assert other.header.environment["cpu"] == "a processor", "the header of the first machine"
    with pytest.raises(UsageError, match="batch 8, not 16"):
        CellStore.open(tmp_path, header(settings={"batch": 16}), mix_machines=True)


def test_cells_of_another_process_appear_on_refresh(tmp_path):
    store = CellStore.open(tmp_path, header())
    store.create()
    store.create()
    assert not store.refresh("a")
    CellStore.open(tmp_path, header()).put("a", {"x": 1})
    assert "a" not in store
    assert store.refresh("a")
    assert store["a"] == {"x": 1}
    CellStore.open(tmp_path, header()).put("c", {"x": 2})
    store.refresh_all()
    assert store.values == {"a": {"x": 1}, "c": {"x": 2}}
    (tmp_path / "cells" / "b.json").write_text("[")
    with pytest.raises(DataError, match=r"b\.json"):
        store.refresh("b")


def test_cells_of_another_study_are_refused(tmp_path):
    CellStore.open(tmp_path, header()).put("a", {})
    with pytest.raises(UsageError, match="study 'table4', not 'table5'"):
        CellStore.open(tmp_path, Header("table5", SETTINGS, MACHINE))


def test_finished_study_is_replaced_only_on_request(tmp_path):
    store = CellStore.open(tmp_path, header())
    store.put("a", {})
    store.finish()
    assert read_header(tmp_path).finished
    with pytest.raises(OutputExistsError, match="finished study"):
        CellStore.open(tmp_path, header())
    assert len(CellStore.open(tmp_path, header(), overwrite=True)) == 0


def test_folder_without_a_study_is_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="is not empty and holds no study"):
            CellStore.open(tmp_path, header(), overwrite=overwrite)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError):
        CellStore.open(tmp_path / "file", header(), overwrite=True)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_unreadable_cells_are_named(tmp_path, text):
    store = CellStore.open(tmp_path, header())
    store.put("a", {})
    (tmp_path / "cells" / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json.*remove it"):
        CellStore.open(tmp_path, header())
    (tmp_path / HEADER).write_text(json.dumps({"strange": 1}))
    with pytest.raises(DataError, match="not the header of a study"):
        CellStore.open(tmp_path, header())


def test_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        CellStore.open(tmp_path / "file" / "below", header()).put("a", {})


HOLD_LOCK = """
import sys
from pathlib import Path
from repvgg.studies.store import try_lock
with try_lock(Path(sys.argv[1])) as lock:
    print(lock.acquired, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """A lock file and another process that holds it."""
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLD_LOCK, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    yield path, process
    process.kill()
    process.communicate()


def test_lock_is_exclusive_and_released(tmp_path):
    path = tmp_path / "a.lock"
    with try_lock(path) as lock:
        assert (lock.acquired, lock.holder) == (True, None)
        with try_lock(path) as second:
            assert not second.acquired
    assert not path.exists()
    assert lock_holder(path) is None


def test_lock_names_the_process_that_holds_it_until_that_is_killed(other):
    path, process = other
    with try_lock(path) as lock:
        assert not lock.acquired
        assert lock.holder == LockHolder(str(process.pid), socket.gethostname())
        assert str(process.pid) in str(lock.holder)
    assert path.exists(), "theirs"
    process.kill()
    process.wait()
    with try_lock(path) as lock:
        assert lock.acquired
        assert lock.holder is not None
        assert lock.holder.process == str(process.pid)
    assert not path.exists()


def test_lock_of_another_machine_is_respected(tmp_path):
    path = tmp_path / "a.lock"
    path.write_text("1\nsome-other-machine\n")
    with try_lock(path) as lock:
        assert not lock.acquired
        assert str(lock.holder) == "process 1 on some-other-machine"
    assert path.exists()


def test_lock_in_a_missing_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created"), try_lock(tmp_path / "file" / "a.lock"):
        pass


def test_shares_partition_all_cells():
    held = [[index for index in range(7) if CellShare.parse(f"{number}/3").holds(index)] for number in (1, 2, 3)]
    assert held == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/2/3", "a/b", "-1/2", "1/0"])
def test_invalid_shares_are_refused(text):
    with pytest.raises(UsageError, match="share"):
        CellShare.parse(text)


@pytest.mark.parametrize("age", [0, 10**6])
def test_an_empty_lock_is_taken_over_when_it_is_old(tmp_path, age):
    """A process of an earlier version was killed between creating and writing it."""
    path = tmp_path / "a.lock"
    path.write_text("")
    os.utime(path, (time.time() - age,) * 2)
    with try_lock(path) as lock:
        assert lock.acquired == (age > 0)
    assert path.exists() == (age == 0)


def test_a_process_number_that_is_used_again(tmp_path):
    """The lock of a dead process whose number another process, here this one, has got."""
    path = tmp_path / "a.lock"
    path.write_text(f"{os.getpid()}\n{socket.gethostname()}\nanother boot 12345\n")
    with try_lock(path) as lock:
        assert lock.acquired
        assert lock.holder == LockHolder(str(os.getpid()), socket.gethostname())


def test_lock_files_are_complete_and_leave_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.lock"
    (tmp_path / f".lock-{socket.gethostname()}-killed").mkdir()
    (tmp_path / ".lock-some-other-machine-busy").mkdir()
    with try_lock(path) as lock:
        assert lock.acquired
        assert path.read_text().splitlines()[:2] == [str(os.getpid()), socket.gethostname()]
        assert {entry.name for entry in tmp_path.iterdir()} == {"a.lock", ".lock-some-other-machine-busy"}

    def no_hard_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_hard_links)
    with try_lock(path) as lock, try_lock(path) as second:
        assert (lock.acquired, second.acquired) == (True, False)


def test_a_lock_that_was_given_to_another_is_not_removed(tmp_path):
    path = tmp_path / "a.lock"
    with try_lock(path):
        path.write_text("1\nsome-other-machine\n")
    assert path.exists()


HAMMER = """
import json, os, random, signal, sys, time
from pathlib import Path
from repvgg.studies.store import lock_holder, try_lock

folder = Path(sys.argv[1])
lock, owner, log = folder / "a.lock", folder / "owner", folder / "log"

def work():
    while True:
        with try_lock(lock) as result:
            if not result.acquired:
                continue
            before = owner.read_text() if owner.exists() else ""
            if before and Path(f"/proc/{before}").exists() and int(before) != os.getpid():
                with log.open("a") as file:
                    file.write(f"{before} and {os.getpid()} hold it at once;")
            owner.write_text(str(os.getpid()))
            time.sleep(random.uniform(0, 0.003))
            owner.write_text("")
            with log.with_name("held").open("a") as file:
                file.write("x")

def start():
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child

children = [start() for _ in range(4)]
for kill in range(24):
    time.sleep(random.uniform(0.005, 0.06))
    at = kill % 4
    os.kill(children[at], signal.SIGKILL)
    assert os.waitpid(children[at], 0)[1] == signal.SIGKILL  # and not an exception before
    children[at] = start()
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
with try_lock(lock) as result:
    pass
left = sorted(path.name for path in folder.iterdir())
print(json.dumps({"free": result.acquired, "left": left}))
"""


def test_killed_processes_leave_no_lock_and_never_share_one(tmp_path):
    command = [sys.executable, "-c", HAMMER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "log").exists(), (tmp_path / "log").read_text()
    assert json.loads(done.stdout) == {"free": True, "left": ["held", "owner"]}


def test_the_header_is_the_first_file(tmp_path, monkeypatch):
    """Whoever looks between the header and the folder of cells finds a study."""
    folder = tmp_path / "s"
    seen = []
    mkdir = Path.mkdir

    def look(path, *args, **options):
        if path.name == "cells":
            seen.append(CellStore.open(folder, header()).header.study)
        return mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", look)
    CellStore.open(folder, header()).create()
    assert seen == [header().study]


@pytest.mark.parametrize("leftover", [".repvgg-killed", "cells", "runs"])
def test_what_killed_processes_leave_is_no_study(tmp_path, leftover):
    (tmp_path / "s" / leftover).mkdir(parents=True)
    if leftover.startswith("."):
        (tmp_path / "s" / leftover / "study.json").write_text("{")
    CellStore.open(tmp_path / "s", header()).put("a", {"x": 1})
    assert len(CellStore.open(tmp_path / "s", header())) == 1


def test_studies_that_start_at_once_do_not_mix(tmp_path):
    one = CellStore.open(tmp_path / "s", header(settings={"a": 1}))
    same = CellStore.open(tmp_path / "s", header(settings={"a": 1}))
    other = CellStore.open(tmp_path / "s", header(settings={"a": 2}))
    one.put("x", {})
    same.put("y", {})
    with pytest.raises(UsageError, match="results with a 1, not 2"):
        other.put("z", {})
    assert sorted(path.name for path in (tmp_path / "s" / "cells").iterdir()) == ["x.json", "y.json"]
    # Started again with other settings while the first ones still run:
    CellStore.open(tmp_path / "s", header(settings={"a": 3}), overwrite=True).put("x", {})
    with pytest.raises(UsageError, match="results with a 3, not 1"):
        one.put("w", {})
