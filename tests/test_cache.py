import hashlib
import os
import socket
import stat
import subprocess
import sys
import threading
import warnings

import pytest

from repvgg import _cache
from repvgg._cache import CACHE_VARIABLE, cache_folder, clear, locked, read_entry, usable_folder, write_entry
from repvgg.errors import CacheWarning

KEY = hashlib.sha256(b"what the content depends on").digest()
NAME, CONTENT = "entry.o", b"machine code"
KINDS = ["engine", "training"]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    base = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(base))
    _cache._warn_once.cache_clear()
    return base


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(base, kind):
    folder = base / kind
    folder.mkdir(mode=0o700, parents=True)
    return folder


def intact_file(path, kind):
    """A file that would be trusted in the place of the entry."""
    path.write_bytes(f"repvgg {kind} 1\n".encode() + KEY + hashlib.sha256(CONTENT).digest() + CONTENT)
    path.chmod(0o600)
    return path


def test_what_is_written_is_read(kind, base):
    assert read_entry(kind, NAME, KEY) is None
    assert not base.exists()  # reading creates nothing
    write_entry(kind, NAME, KEY, CONTENT)
    assert read_entry(kind, NAME, KEY) == CONTENT
    assert [path.name for path in (base / kind).iterdir()] == [NAME]
    assert stat.S_IMODE((base / kind).stat().st_mode) == 0o700
    assert stat.S_IMODE((base / kind / NAME).stat().st_mode) == 0o600


def test_the_format_is_fixed(kind, folder):
    intact_file(folder / NAME, kind)
    assert read_entry(kind, NAME, KEY) == CONTENT


def link_to_intact(path, kind):
    path.symlink_to(intact_file(path.parent.parent / "download.bin", kind))


def link_to_users_file(path, kind):
    target = path.parent.parent / "download.bin"
    target.write_text("alias ll='ls -l'\n")
    path.symlink_to(target)


def bound_socket(path, kind):
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def writable_by_group(path, kind):
    intact_file(path, kind).chmod(0o660)


def writable_by_all(path, kind):
    intact_file(path, kind).chmod(0o602)


def cut(path, kind):
    path.write_bytes(intact_file(path, kind).read_bytes()[:-1])


def of_another_key(path, kind):
    whole = intact_file(path, kind).read_bytes()
    path.write_bytes(whole.replace(KEY, KEY[::-1]))


UNTRUSTED = {
    "link to a file that would be trusted": link_to_intact,
    "link to a file of the user": link_to_users_file,
    "link to nothing": lambda path, kind: path.symlink_to("nothing"),
    "link to a device": lambda path, kind: path.symlink_to("/dev/zero"),
    "link to itself": lambda path, kind: path.symlink_to(path.name),
    "FIFO": lambda path, kind: os.mkfifo(path),
    "socket": bound_socket,
    "writable by the group": writable_by_group,
    "writable by all": writable_by_all,
    "cut": cut,
    "empty": lambda path, kind: path.touch(),
    "of another key": of_another_key,
}


@pytest.mark.timeout(20)  # opening a FIFO blocks
@pytest.mark.parametrize("name", UNTRUSTED)
def test_files_that_others_could_have_made_are_replaced(kind, folder, name):
    UNTRUSTED[name](folder / NAME, kind)
    target = folder.parent / "download.bin"
    before = target.read_bytes() if target.exists() else None
    assert read_entry(kind, NAME, KEY) is None
    write_entry(kind, NAME, KEY, CONTENT)
    assert read_entry(kind, NAME, KEY) == CONTENT
    assert stat.S_ISREG((folder / NAME).lstat().st_mode)
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert (target.read_bytes() if target.exists() else None) == before


def test_a_file_of_another_user_is_not_read(kind, folder, monkeypatch):
    write_entry(kind, NAME, KEY, CONTENT)
    real = os.fstat

    def foreign_files(descriptor):
        status = real(descriptor)
        fields = list(status)
        fields[4] += stat.S_ISREG(status.st_mode)  # the owner
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", foreign_files)
    assert read_entry(kind, NAME, KEY) is None


def test_a_file_that_is_too_large_is_not_read(kind, folder):
    with intact_file(folder / NAME, kind).open("r+b") as file:
        file.truncate(2**40)  # sparse
    assert read_entry(kind, NAME, KEY) is None


def test_a_folder_in_place_of_a_file_warns(kind, folder):
    (folder / NAME).mkdir()
    assert read_entry(kind, NAME, KEY) is None
    with pytest.warns(CacheWarning, match="directory"):
        write_entry(kind, NAME, KEY, CONTENT)
    assert [path.name for path in folder.iterdir()] == [NAME]


def link_to_own_folder(folder):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


FOLDERS = {
    "symbolic link": link_to_own_folder,
    "other users: chmod go-w": lambda folder: folder.chmod(0o770),
    "by other users": lambda folder: folder.chmod(0o1777),
    "ot a directory": lambda folder: (folder.rename(folder.parent / "elsewhere"), os.mkfifo(folder)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("reason", FOLDERS)
def test_folders_that_others_may_write_to_are_not_used(kind, folder, reason):
    intact_file(folder / NAME, kind)
    FOLDERS[reason](folder)
    with pytest.warns(CacheWarning, match=f"{reason}.*REPVGG_CACHE_DIR"):
        assert read_entry(kind, NAME, KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned of once
        write_entry(kind, "other.o", KEY, CONTENT)
        assert usable_folder(kind) is None
        with locked(kind, 1):
            pass
        clear(kind, (".o",))
    found = [path.name for path in folder.parent.rglob("*.o")]
    assert found == [NAME]


def test_a_folder_of_another_user_is_not_used(kind, folder, monkeypatch):
    intact_file(folder / NAME, kind)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(CacheWarning, match="belongs to another user"):
        assert read_entry(kind, NAME, KEY) is None


def test_a_link_of_another_user_on_the_way_is_not_followed(kind, folder, base, monkeypatch):
    """As anybody can make one in the place of a cache in /tmp."""
    link = base.parent / "link"
    link.symlink_to(base)
    monkeypatch.setenv(CACHE_VARIABLE, str(link))
    write_entry(kind, NAME, KEY, CONTENT)
    assert read_entry(kind, NAME, KEY) == CONTENT  # an own link is fine
    if os.geteuid() == 0:
        os.chown(link, 65534, 65534, follow_symlinks=False)
    else:
        pytest.skip("only root can give a link away")
    with pytest.warns(CacheWarning, match="link of another user"):
        assert read_entry(kind, NAME, KEY) is None


def test_the_folder_may_be_swapped_while_it_is_used(kind, folder, monkeypatch):
    """What is checked is what is read, even where another user can rename the folder."""
    write_entry(kind, NAME, KEY, CONTENT)
    real = _cache._not_private

    def swap(status):
        if stat.S_ISDIR(status.st_mode) and folder.exists():
            folder.rename(folder.parent / "moved")
            folder.mkdir()
            intact_file(folder / NAME, kind).write_bytes(b"planted")
        return real(status)

    monkeypatch.setattr(_cache, "_not_private", swap)
    assert read_entry(kind, NAME, KEY) == CONTENT


def test_turned_off(kind, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    monkeypatch.chdir(tmp_path)
    assert cache_folder(kind) is None
    write_entry(kind, NAME, KEY, CONTENT)
    assert read_entry(kind, NAME, KEY) is None
    assert usable_folder(kind) is None
    with locked(kind, 1):
        clear(kind, (".o",))
    assert list(tmp_path.iterdir()) == []


def test_clear_leaves_other_files(kind, folder):
    write_entry(kind, NAME, KEY, CONTENT)
    (folder / ".repvgg-killed").touch()
    (folder / ".repvgg-killed-folder").mkdir()
    (folder / "link.o").symlink_to(folder / "notes.txt")
    (folder / "notes.txt").touch()
    clear(kind, (".o",))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_one_process_at_a_time(kind, folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, os; f = os.open({str(folder)!r}, os.O_RDONLY); "
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout.readline() == "held\n"
        entered = threading.Event()
        waiting = threading.Thread(target=lambda: enter(kind, entered))
        waiting.start()
        assert not entered.wait(0.2)
        holder.communicate("\n")
        assert entered.wait(10)
        waiting.join()


def enter(kind, entered):
    with locked(kind, 10):
        entered.set()


def test_a_lock_that_is_never_released_does_not_stop_the_work(kind, folder):
    with locked(kind, 10), locked(kind, 0.1):
        write_entry(kind, NAME, KEY, CONTENT)
    assert read_entry(kind, NAME, KEY) == CONTENT
