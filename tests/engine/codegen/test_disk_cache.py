import os
import warnings
from dataclasses import replace

import pytest
import torch

import repvgg.engine
from repvgg.engine.codegen import disk_cache
from repvgg.engine.codegen.disk_cache import cache_folder, cached_object_code, clear_cache
from repvgg.engine.codegen.jit import compile_to_object
from repvgg.errors import CacheWarning
from tests.engine.helpers import isas

IR = "define void @nothing() {\n  ret void\n}\n"
OTHER = IR.replace("nothing", "something")
ISA = isas()[-1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path))
    disk_cache._warn_once.cache_clear()
    return tmp_path / "engine"


@pytest.fixture
def compiled(monkeypatch):
    """What was really compiled."""
    done = []

    def counted(ir, isa):
        done.append(ir)
        return compile_to_object(ir, isa)

    monkeypatch.setattr(disk_cache, "object_code", counted)
    return done


def test_compiled_once(compiled, folder):
    first, second = cached_object_code(IR, ISA), cached_object_code(IR, ISA)
    assert first == second == compile_to_object(IR, ISA)
    assert compiled == [IR]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("change", [{"cpu": "x86-64"}, {"features": "-avx512f"}, {"name": "other"}], ids=str)
def test_kept_for_each_processor(compiled, change):
    cached_object_code(IR, ISA)
    cached_object_code(IR, replace(ISA, **change))
    assert len(compiled) == 2


def test_kept_for_each_version(compiled, monkeypatch):
    cached_object_code(IR, ISA)
    monkeypatch.setattr(repvgg, "__version__", "another")
    cached_object_code(IR, ISA)
    monkeypatch.setattr(disk_cache, "_versions", lambda: ("another", "1.2.3"))
    cached_object_code(IR, ISA)
    assert len(compiled) == 3


DAMAGED = {
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "the head alone": lambda content: content[:80],
    "longer": lambda content: content + b"0",
    "a bit of the code": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "a bit of the name": lambda content: content[:20] + bytes([content[20] ^ 4]) + content[21:],
    "another format": lambda content: b"\x7fELF" + content[4:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_replaced(compiled, folder, name):
    wanted = cached_object_code(IR, ISA)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGED[name](whole))
    assert cached_object_code(IR, ISA) == wanted
    assert path.read_bytes() == whole
    assert len(compiled) == 2


def test_a_file_about_something_else_is_replaced(compiled, folder):
    """Whole in itself, under a name that is not its own."""
    wanted = cached_object_code(IR, ISA)
    (path,) = folder.iterdir()
    cached_object_code(OTHER, ISA)
    (other,) = set(folder.iterdir()) - {path}
    other.replace(path)
    assert cached_object_code(IR, ISA) == wanted
    assert len(compiled) == 3


def test_a_file_of_somebody_else_is_not_loaded(compiled, monkeypatch):
    cached_object_code(IR, ISA)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    cached_object_code(IR, ISA)
    assert len(compiled) == 2


def test_turned_off(monkeypatch, compiled):
    monkeypatch.setenv(disk_cache.VARIABLE, "off")
    assert cache_folder() is None
    assert cached_object_code(IR, ISA) == cached_object_code(IR, ISA)
    assert len(compiled) == 2
    clear_cache()


def test_the_folder_is_the_users(monkeypatch):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv(disk_cache.VARIABLE)
    assert cache_folder() == platformdirs.user_cache_path("repvgg") / "engine"


def test_what_cannot_be_kept_is_said_once(compiled, folder):
    folder.write_text("a file in the way")
    with pytest.warns(CacheWarning, match="REPVGG_CACHE_DIR names another folder"):
        cached_object_code(IR, ISA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached_object_code(OTHER, ISA) == compile_to_object(OTHER, ISA)
    assert compiled == [IR, OTHER]


def test_the_oldest_go_when_there_is_too_much(folder, monkeypatch):
    texts = [IR.replace("nothing", f"number{at}") for at in range(4)]
    for text in texts[:3]:
        cached_object_code(text, ISA)
        for path in folder.iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(disk_cache, "MOST_BYTES", 3 * size)
    cached_object_code(texts[0], ISA)  # the oldest was just used
    cached_object_code(texts[3], ISA)
    kept = {path.name for path in folder.iterdir()}
    assert kept == {f"{disk_cache._object_key(texts[at], ISA).hex()}.o" for at in (0, 2, 3)}


def test_cleared(folder, compiled):
    cached_object_code(IR, ISA)
    (folder / ".repvgg-killed").mkdir()
    (folder / "notes.txt").write_text("of a person")
    clear_cache()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    cached_object_code(IR, ISA)
    assert len(compiled) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_several_processes_at_once(folder):
    """All compile the same into an empty folder, again and again, and find nothing but what is right."""
    texts = [IR.replace("nothing", f"number{at}") for at in range(20)]
    wanted = [compile_to_object(text, ISA) for text in texts]
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            order = texts if number % 2 else [*reversed(texts)]
            found = {text: cached_object_code(text, ISA) for _ in range(3) for text in order}
            os._exit(0 if [found[text] for text in texts] == wanted else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{disk_cache._object_key(text, ISA).hex()}.o" for text in texts
    )


def test_a_network_comes_from_the_disk(compiled):
    model = repvgg.create_model("repvgg_t0", plain=True).eval()
    first = repvgg.engine.compile(model, (1, 3, 32, 32))
    number = len(compiled)
    second = repvgg.engine.compile(model, (1, 3, 32, 32))
    assert number == len(compiled) == 2  # the network, and what runs it
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
