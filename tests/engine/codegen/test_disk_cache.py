import hashlib
import os
import warnings
from dataclasses import replace

import llvmlite
import llvmlite.binding
import pytest
import torch

import repvgg.engine
from repvgg import _cache
from repvgg._cache import CACHE_VARIABLE, cache_folder
from repvgg.engine.codegen import disk_cache
from repvgg.engine.codegen.disk_cache import cached_object_code, clear_cache
from repvgg.engine.codegen.jit import compile_to_object
from repvgg.errors import CacheWarning
from tests.engine.helpers import isas

IR = "define void @nothing() {\n  ret void\n}\n"
OTHER = IR.replace("nothing", "something")
ISA = isas()[-1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    _cache._warn_once.cache_clear()
    return tmp_path / "engine"


@pytest.fixture
def compiled(monkeypatch):
    """Modules that were compiled rather than read from the disk."""
    done = []

    def counted(ir, isa):
        done.append(ir)
        return compile_to_object(ir, isa)

    monkeypatch.setattr(disk_cache, "compile_to_object", counted)
    return done


def test_compiled_once(compiled, folder):
    first, second = cached_object_code(IR, ISA), cached_object_code(IR, ISA)
    assert first == second == compile_to_object(IR, ISA)
    assert compiled == [IR]
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("change", [{"cpu": "x86-64"}, {"features": "-avx512f"}, {"name": "other"}], ids=str)
def test_processors_have_entries_of_their_own(compiled, change):
    cached_object_code(IR, ISA)
    cached_object_code(IR, replace(ISA, **change))
    assert len(compiled) == 2


def test_versions_have_entries_of_their_own(compiled, monkeypatch):
    cached_object_code(IR, ISA)
    monkeypatch.setattr(repvgg, "__version__", "another")
    cached_object_code(IR, ISA)
    monkeypatch.setattr(disk_cache, "_compiler_versions", lambda: ("another", "1.2.3"))
    cached_object_code(IR, ISA)
    assert len(compiled) == 3


def test_entries_of_earlier_versions_are_read(compiled, folder):
    """The format is fixed: magic, key and checksum; the key hashes length and text of everything code depends on."""
    versions = (repvgg.__version__, llvmlite.__version__, ".".join(map(str, llvmlite.binding.llvm_version_info)))
    processor = (ISA.name, str(ISA.width), str(ISA.registers), ISA.cpu, ISA.features, ISA.triple)
    key = hashlib.sha256("".join(f"{len(part)} {part}" for part in (*versions, *processor, IR)).encode())
    content = b"code of an earlier version"
    folder.mkdir()
    head = b"repvgg engine 1\n" + key.digest() + hashlib.sha256(content).digest()
    (folder / f"{key.hexdigest()}.o").write_bytes(head + content)
    assert cached_object_code(IR, ISA) == content
    assert not compiled


DAMAGED = {
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "header only": lambda content: content[:80],
    "longer": lambda content: content + b"0",
    "flipped bit in the code": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "flipped bit in the key": lambda content: content[:20] + bytes([content[20] ^ 4]) + content[21:],
    "another format": lambda content: b"\x7fELF" + content[4:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_replaced(compiled, folder, name):
    reference = cached_object_code(IR, ISA)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGED[name](whole))
    assert cached_object_code(IR, ISA) == reference
    assert path.read_bytes() == whole
    assert len(compiled) == 2


def test_a_file_with_another_key_is_replaced(compiled, folder):
    """An intact file, renamed to another entry's name."""
    reference = cached_object_code(IR, ISA)
    (path,) = folder.iterdir()
    cached_object_code(OTHER, ISA)
    (other,) = set(folder.iterdir()) - {path}
    other.replace(path)
    assert cached_object_code(IR, ISA) == reference
    assert len(compiled) == 3


def test_code_of_another_user_is_not_loaded(compiled, monkeypatch):
    cached_object_code(IR, ISA)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(CacheWarning, match="another user"):
        cached_object_code(IR, ISA)
    assert len(compiled) == 2


def test_a_link_is_replaced_and_not_followed(compiled, folder, tmp_path):
    reference = cached_object_code(IR, ISA)
    (path,) = folder.iterdir()
    profile = tmp_path / ".bashrc"
    profile.write_text("alias ll='ls -l'\n")
    path.unlink()
    path.symlink_to(profile)
    assert cached_object_code(IR, ISA) == reference
    assert profile.read_text() == "alias ll='ls -l'\n"
    assert not path.is_symlink()
    assert len(compiled) == 2


def test_turned_off(monkeypatch, compiled):
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    assert cache_folder("engine") is None
    assert cached_object_code(IR, ISA) == cached_object_code(IR, ISA)
    assert len(compiled) == 2
    clear_cache()


def test_default_folder(monkeypatch):
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder("engine") == platformdirs.user_cache_path("repvgg") / "engine"


def test_a_folder_that_cannot_be_written_warns_once(compiled, folder):
    folder.write_text("a file in the way")
    with pytest.warns(CacheWarning, match="REPVGG_CACHE_DIR names another folder"):
        cached_object_code(IR, ISA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached_object_code(OTHER, ISA) == compile_to_object(OTHER, ISA)
    assert compiled == [IR, OTHER]


def test_least_recently_used_files_are_evicted(folder, monkeypatch):
    texts = [IR.replace("nothing", f"number{at}") for at in range(4)]
    for text in texts[:3]:
        cached_object_code(text, ISA)
        for path in folder.iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    size = max(path.stat().st_size for path in folder.iterdir())
    monkeypatch.setattr(disk_cache, "MAX_BYTES", 3 * size)
    cached_object_code(texts[0], ISA)  # the oldest, but now the most recently used
    cached_object_code(texts[3], ISA)
    kept = {path.name for path in folder.iterdir()}
    assert kept == {f"{disk_cache._object_key(texts[at], ISA).hex()}.o" for at in (0, 2, 3)}


def test_clear_cache(folder, compiled):
    cached_object_code(IR, ISA)
    (folder / ".repvgg-killed").mkdir()
    (folder / "notes.txt").write_text("not the cache's")
    clear_cache()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    cached_object_code(IR, ISA)
    assert len(compiled) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_several_processes_at_once(folder):
    """Four processes compile the same modules into an empty folder; each finds the right code."""
    texts = [IR.replace("nothing", f"number{at}") for at in range(20)]
    reference = [compile_to_object(text, ISA) for text in texts]
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            order = texts if number % 2 else [*reversed(texts)]
            found = {text: cached_object_code(text, ISA) for _ in range(3) for text in order}
            os._exit(0 if [found[text] for text in texts] == reference else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{disk_cache._object_key(text, ISA).hex()}.o" for text in texts
    )


def test_a_model_is_read_from_the_disk(compiled):
    model = repvgg.create_model("repvgg_t0", plain=True).eval()
    first = repvgg.engine.compile(model, (1, 3, 32, 32))
    number = len(compiled)
    second = repvgg.engine.compile(model, (1, 3, 32, 32))
    assert number == len(compiled) == 2  # the kernels, and the thread pool
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)
