"""The files of onnxruntime-web that a page needs: from a folder, from a package file, or from npm through a cache.

They are too large for this library to include (14 MiB). Only two files of the package are used: the script that holds
the runtime for WebAssembly, and its machine code.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import final

from repvgg._cache import read_entry, write_entry
from repvgg.errors import ExportError, MissingDependencyError, UsageError, first_line

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"  # taken from npm, and tested
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"

# Of the files of VERSION. Those of other versions are used as they are, and the export says so.
_SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_CACHE = "web"
_MAX_FILE_BYTES = 2**27  # the largest file that is read has 14 MiB
_NPM_SECONDS = 600
_HEADER = re.compile(rb"ONNX Runtime Web v(\d+\.\d+\.\d+[\w.+-]*)")  # in the comment at the beginning of the script

Reader = Callable[[str], bytes | None]  # the content of a file of the package by its name; None if there is none


@final
@dataclass(frozen=True)
class WebRuntime:
    """The two files, checked.

    Attributes:
        version: of the package.
        script: a JavaScript module.
        wasm: its WebAssembly.
        is_known: whether the files are those of :data:`VERSION`, byte by byte.
    """

    version: str
    script: bytes
    wasm: bytes
    is_known: bool

    def sha256(self) -> dict[str, str]:
        """Return the digest of each file by its name."""
        return {name: _digest(data) for name, data in ((SCRIPT, self.script), (WASM, self.wasm))}


def find_runtime(path: Path | None = None) -> WebRuntime:
    """Read the files of onnxruntime-web.

    Args:
        path: the folder of the package (``node_modules/onnxruntime-web``) or its ``dist``, or the file that
            ``npm pack onnxruntime-web`` writes. None: the cache, and else ``npm pack``, which the cache then keeps.

    Raises:
        UsageError: ``path`` has not these files.
        MissingDependencyError: there is no path, nothing is cached, and npm is not installed.
        ExportError: npm fails, or the files are damaged.
    """
    if path is None:
        return _from_cache() or _from_npm()
    if path.is_dir():
        folder = path if (path / SCRIPT).exists() else path / "dist"
        return _read(lambda name: _file(folder / name), str(path))
    if not path.exists():
        raise UsageError(f"There is no {str(path)!r}: {_advice()}.")
    return _from_package(path)


def _from_package(path: Path) -> WebRuntime:
    try:
        with tarfile.open(path) as package:
            return _read(lambda name: _member(package, f"package/dist/{name}"), str(path))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(
            f"{str(path)!r} cannot be read as a package of npm ({first_line(error)}): {_advice()}."
        ) from error


def _from_cache() -> WebRuntime | None:
    found = {name: read_entry(_CACHE, _entry(name), bytes.fromhex(digest)) for name, digest in _SHA256.items()}
    script, wasm = found[SCRIPT], found[WASM]
    return None if script is None or wasm is None else _checked(script, wasm, "the cache")


def _from_npm() -> WebRuntime:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(f"A page needs the package {PACKAGE}, and npm is not installed: {_advice()}.")
    with TemporaryDirectory(prefix="repvgg-") as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--json", "--ignore-scripts", "--pack-destination", folder]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=_NPM_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"npm did not deliver {PACKAGE} in {_NPM_SECONDS} seconds: {_advice()}.") from error
        packages = sorted(Path(folder).glob("*.tgz"))
        if done.returncode or not packages:
            raise ExportError(f"npm could not fetch {PACKAGE} {VERSION} ({_npm_problem(done)}): {_advice()}.")
        runtime = _from_package(packages[0])
    if not runtime.is_known:
        raise ExportError(f"npm delivered other files than those of {PACKAGE} {VERSION}: {_advice()}.")
    for name, data in ((SCRIPT, runtime.script), (WASM, runtime.wasm)):
        write_entry(_CACHE, _entry(name), bytes.fromhex(_SHA256[name]), data)
    return runtime


def _npm_problem(done: subprocess.CompletedProcess[str]) -> str:
    try:  # with --json, npm writes its error as JSON
        return first_line(json.loads(done.stdout)["error"]["summary"])
    except (ValueError, KeyError, TypeError):
        return first_line(done.stderr or f"exit code {done.returncode}")


def _read(read: Reader, source: str) -> WebRuntime:
    script, wasm = read(SCRIPT), read(WASM)
    if script is None or wasm is None:
        missing = SCRIPT if script is None else WASM
        raise UsageError(f"{source!r} has no {missing!r}: {_advice()}.")
    return _checked(script, wasm, repr(source))


def _checked(script: bytes, wasm: bytes, source: str) -> WebRuntime:
    header = _HEADER.search(script[:1000])
    if header is None or not wasm.startswith(b"\0asm"):
        damaged = SCRIPT if header is None else WASM
        raise ExportError(f"{damaged!r} in {source} is damaged or another file: {_advice()}.")
    version = header[1].decode()
    is_known = (_digest(script), _digest(wasm)) == (_SHA256[SCRIPT], _SHA256[WASM])
    if version == VERSION and not is_known:
        raise ExportError(f"The files in {source} are not those of {PACKAGE} {VERSION}, as they say: {_advice()}.")
    return WebRuntime(version, script, wasm, is_known)


def _file(path: Path) -> bytes | None:
    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        return None
    return path.read_bytes()


def _member(package: tarfile.TarFile, name: str) -> bytes | None:
    # Read into memory: nothing is extracted, so no name in the archive can lead to another folder.
    for member in package:
        if member.name == name and member.isfile() and member.size <= _MAX_FILE_BYTES:
            file = package.extractfile(member)
            return None if file is None else file.read()
    return None


def _entry(name: str) -> str:
    return f"{VERSION}-{name}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _advice() -> str:
    return (
        f"run 'npm pack {PACKAGE}@{VERSION}' where npm is installed, and give the file that it writes as "
        "--onnxruntime-web"
    )
