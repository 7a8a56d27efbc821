"""Read torch files without running code in them, and name files of other kinds.

``weights_only`` admits tensors and plain data. Before that, the size of what would be unpickled is checked, because
unpickling a file of millions of names takes minutes.
"""

from __future__ import annotations

import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch

from repvgg.checkpoints.numpy_pickle import SAFE_GLOBALS
from repvgg.errors import CheckpointError, first_line

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
# Texts of torch's weights_only unpickler (2.11 to 2.15) about a class or function that it does not allow.
_FOREIGN_CLASS = ("GLOBAL ", "Can only create new object", "Can only build")
_LEGACY_PICKLES = 5  # magic number, protocol version, system, content, names of the storages
#: About 30 opcodes describe a tensor: this is enough for 60,000 of them, and takes seconds.
MAX_OPCODES = 2_000_000
_MAX_ARCHIVE_ENTRIES = 2**16 - 2  # more need another record at the end of a zip archive

_TORCHSCRIPT = "a TorchScript archive: save the state_dict of torch.jit.load(…)"
_EXPORTED = "an exported program (.pt2): give the checkpoint that it was made from"
_DOWNLOAD = "the download failed or needs a login"
# First bytes → what the file is, and what to do.
_OTHER_FILES = (
    (rb"version https://git-lfs", "a pointer of git-lfs and not the file itself: fetch it with 'git lfs pull'"),
    (rb"\s*(?i:<!doctype html|<html)", f"a web page (HTML): {_DOWNLOAD}"),
    (rb"\s*<\?xml", f"XML: {_DOWNLOAD}, or the file describes an OpenVINO model"),
    (rb"\x1f\x8b", "compressed with gzip: unpack it first"),
    (rb"\x89HDF\r\n", "an HDF5 file (Keras): export its weights to safetensors"),
    (rb"\x93NUMPY", "a NumPy array: save a state_dict"),
    (rb"GGUF", "a GGUF file: save a state_dict"),
    (rb"....TFL3", "a TensorFlow Lite model: save the state_dict that it was made from"),
    # A protobuf message that starts with the version of ONNX's format and the name of a producer or a graph.
    (rb"\x08[\x01-\x20][\x12\x3a]", "an ONNX file: give the checkpoint that it was exported from"),
)


class _Path:
    """Placeholder for a ``pathlib.Path`` in a pickle, such as in a script's saved arguments; never used."""

    def __init__(self, *parts: object) -> None:
        self.parts = parts


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
# timm stores its arguments as a Namespace, which is plain data.
_SAFE_GLOBALS: list[Any] = [
    Namespace,
    *SAFE_GLOBALS,
    _Path,
    *((_Path, f"{module}.{name}") for module in (pathlib.__name__, "pathlib._local") for name in _PATHS),
]

_loading = Lock()  # both contexts below replace lists of the process: two at once would restore the wrong ones


def load_torch(file: Path, start: bytes) -> Any:
    """Return the content of a torch file whose first bytes are ``start``.

    Raises:
        CheckpointError: it is another kind of file, is damaged, is too large to unpickle, or would have to run code.
    """
    name = repr(str(file))
    if not start:
        raise CheckpointError(f"{name} is not a checkpoint: it is empty.")
    if not start.startswith((_ZIP_MAGIC, *_PICKLE_MAGIC)):
        other = next((what for pattern, what in _OTHER_FILES if re.match(pattern, start, re.DOTALL)), None)
        raise CheckpointError(f"{name} is not a checkpoint{f' but {other}' if other else ''}.")
    names = _check_archive(file) if start.startswith(_ZIP_MAGIC) else _check_legacy(file)
    try:
        with _loading, warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE_GLOBALS):
            warnings.simplefilter("ignore")  # of pickle protocols, and of the time that checks of sparse tensors take
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(text in str(error) for text in _FOREIGN_CLASS) or (names and start.startswith(_PICKLE_MAGIC)):
            reason = "would run code when it is read; save its state_dict alone, as safetensors"
        else:
            reason = "is not a checkpoint, or is damaged"
        raise CheckpointError(f"{name} {reason}.") from error
    except Exception as error:
        raise CheckpointError(f"{name} is not a checkpoint, or is damaged: {first_line(error)}.") from error


def _check_archive(file: Path) -> bool:
    """Check the entries of a zip archive and its pickle; return whether the pickle names classes or functions."""
    name = repr(str(file))
    try:
        if _num_entries(file) > _MAX_ARCHIVE_ENTRIES:
            raise CheckpointError(f"{name} is no network: it has more than {_MAX_ARCHIVE_ENTRIES:,} entries.")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            # torch.save never compresses, and a compressed entry may unpack to any size (a zip bomb).
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{name} is not a checkpoint: it is a compressed archive.")
            paths = [entry.filename.partition("/")[2] for entry in entries]
            if "constants.pkl" in paths:
                raise CheckpointError(f"{name} is not a checkpoint but {_TORCHSCRIPT}.")
            if any("archive_format" in (path, entry.filename) for path, entry in zip(paths, entries, strict=True)):
                raise CheckpointError(f"{name} is not a checkpoint but {_EXPORTED}.")
            if "data.pkl" not in paths:
                raise CheckpointError(f"{name} is not a checkpoint: it is an archive without a data.pkl.")
            with archive.open(entries[paths.index("data.pkl")]) as stream:
                return _check_pickle(name, stream)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{name} is not a checkpoint, or is damaged: {first_line(error)}.") from error


def _num_entries(file: Path) -> int:
    """Return the number of entries that the end of a zip archive gives: reading a directory of millions takes long."""
    longest = 22 + 65_535  # the record and its comment
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - longest))
        end = stream.read(longest)
    at = end.rfind(b"PK\x05\x06")
    return int.from_bytes(end[at + 10 : at + 12], "little") if at >= 0 else 0


def _check_legacy(file: Path) -> bool:
    found = False
    with file.open("rb") as stream:
        for _ in range(_LEGACY_PICKLES):
            found |= _check_pickle(repr(str(file)), stream)
    return found


def _check_pickle(name: str, stream: IO[bytes]) -> bool:
    """Return whether a pickle refers to classes or functions. Its opcodes are listed, not executed.

    Raises:
        CheckpointError: it has more than :data:`MAX_OPCODES`.
    """
    found = False
    try:
        for number, (code, _, _) in enumerate(pickletools.genops(stream)):
            found |= code.name in ("GLOBAL", "STACK_GLOBAL", "INST")
            if number >= MAX_OPCODES:
                raise CheckpointError(f"{name} is no network: its pickle has more than {MAX_OPCODES:,} opcodes.")
    except CheckpointError:
        raise
    except Exception:  # not a pickle, or a damaged one: torch.load says so
        return found
    return found
