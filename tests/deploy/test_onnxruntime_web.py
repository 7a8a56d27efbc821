import hashlib
import json
import os
import stat
import tarfile

import pytest

from repvgg.deploy import onnxruntime_web
from repvgg.deploy.onnxruntime_web import SCRIPT, VERSION, WASM, find_runtime
from repvgg.errors import ExportError, MissingDependencyError, UsageError
from tests.deploy.web_pages import SCRIPT_TEXT, WASM_BYTES, package_of, runtime_folder

ADVICE = f"run 'npm pack onnxruntime-web@{VERSION}' where npm is installed"


@pytest.fixture
def package(tmp_path):
    return runtime_folder(tmp_path)


@pytest.fixture
def pinned(monkeypatch, tmp_path):
    """The stand-in is the version that npm is asked for; an empty cache."""
    digests = {SCRIPT: hashlib.sha256(SCRIPT_TEXT).hexdigest(), WASM: hashlib.sha256(WASM_BYTES).hexdigest()}
    monkeypatch.setattr(onnxruntime_web, "_SHA256", digests)
    monkeypatch.setattr(onnxruntime_web, "VERSION", "9.9.9")
    monkeypatch.setenv("REPVGG_CACHE_DIR", str(tmp_path / "cache"))


def fake_npm(folder, monkeypatch, body):
    program = folder / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_folder_dist_and_package_give_the_same(package, tmp_path):
    found = [find_runtime(path) for path in (package, package / "dist", package_of(package, tmp_path / "p.tgz"))]
    assert {(one.version, one.script, one.wasm, one.is_known) for one in found} == {
        ("9.9.9", SCRIPT_TEXT, WASM_BYTES, False)
    }


def test_the_files_of_the_tested_version_are_known(package, pinned):
    assert find_runtime(package).is_known


@pytest.mark.parametrize("name", [SCRIPT, WASM])
def test_missing_and_damaged_files_are_refused(package, name):
    (package / "dist" / name).write_bytes(b"\0as")
    with pytest.raises(ExportError, match=f"{name}.* is damaged or another file: {ADVICE}"):
        find_runtime(package)
    (package / "dist" / name).unlink()
    with pytest.raises(UsageError, match=f"has no '{name}': {ADVICE}"):
        find_runtime(package)


def test_a_changed_file_of_the_tested_version_is_refused(package, pinned):
    (package / "dist" / WASM).write_bytes(WASM_BYTES + b"!")
    with pytest.raises(ExportError, match=r"are not those of onnxruntime-web 9[.]9[.]9, as they say"):
        find_runtime(package)


def test_what_is_no_package_is_refused(tmp_path):
    (tmp_path / "p.tgz").write_text("no archive")
    with pytest.raises(UsageError, match="cannot be read as a package of npm"):
        find_runtime(tmp_path / "p.tgz")
    with pytest.raises(UsageError, match=r"There is no '/.*none[.]tgz'"):
        find_runtime(tmp_path / "none.tgz")


def test_a_package_is_not_extracted(package, tmp_path):
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.add(package / "dist" / SCRIPT, f"../../{SCRIPT}")
        archive.add(package / "dist" / SCRIPT, f"package/dist/{SCRIPT}")
        link = tarfile.TarInfo(f"package/dist/{WASM}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UsageError, match=f"has no '{WASM}'"):
        find_runtime(tmp_path / "p.tgz")


def test_npm_is_asked_once(package, pinned, tmp_path, monkeypatch):
    archive, calls = package_of(package, tmp_path / "made.tgz"), tmp_path / "calls"
    fake_npm(tmp_path, monkeypatch, f'echo "$@" >> {calls}; cp {archive} onnxruntime-web-9.9.9.tgz')
    first, second = find_runtime(), find_runtime()
    assert first == second
    assert first.is_known
    (call,) = calls.read_text().splitlines()
    assert call.startswith("pack onnxruntime-web@9.9.9 --json --ignore-scripts")


def test_npm_that_delivers_something_else_is_refused(package, pinned, tmp_path, monkeypatch):
    (package / "dist" / SCRIPT).write_bytes(SCRIPT_TEXT.replace(b"9.9.9", b"9.9.8"))
    archive = package_of(package, tmp_path / "made.tgz")
    fake_npm(tmp_path, monkeypatch, f"cp {archive} onnxruntime-web-9.9.9.tgz")
    with pytest.raises(ExportError, match="npm delivered other files"):
        find_runtime()


def test_without_npm_or_network_one_sentence(pinned, tmp_path, monkeypatch):
    (tmp_path / "error.json").write_text(json.dumps({"error": {"summary": "no such host.\nmore"}}))
    fake_npm(tmp_path, monkeypatch, f"cat {tmp_path / 'error.json'}; exit 1")
    with pytest.raises(ExportError, match=r"could not fetch onnxruntime-web 9\.9\.9 \(no such host\): run 'npm pack"):
        find_runtime()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="npm is not installed: run 'npm pack"):
        find_runtime()
