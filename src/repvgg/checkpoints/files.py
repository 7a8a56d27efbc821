"""Read and write checkpoint files. Foreign files are data: no code in them is ever run.

safetensors files hold tensors only; torch archives are unpickled with ``weights_only``.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg._files import atomic_write
from repvgg.checkpoints.metadata import KEY, Metadata
from repvgg.errors import CheckpointError, OutputError, UsageError, first_line, require

_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
# Texts of torch's weights_only unpickler (2.11 to 2.15) about a class or function that it does not allow.
_FOREIGN_CLASS = ("GLOBAL ", "Can only create new object", "Can only build")

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # in this order: averaged weights come first
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, a Lightning module
_MAX_NESTING = 8


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        path: of the file.
        tensors: by name, without the prefix that wrappers add to every name.
        metadata: its header; None if it has none of this library.
        section: the dictionaries of a torch file that hold the tensors, joined by dots, such as "state_dict_ema".
        prefix: the prefix that was removed from the names.
        skipped: entries of the file that were not read → reason.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Metadata | None
    section: str = ""
    prefix: str = ""
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def averaged(self) -> bool:
        """Whether the tensors are a moving average of the training weights."""
        return self.section.endswith("ema")


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Metadata, *, overwrite: bool = False
) -> Path:
    """Write a safetensors file with a header, atomically.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
        UsageError: a field of the header is invalid.
    """
    if invalid := metadata.invalid_field():
        raise UsageError(f"{getattr(metadata, invalid)!r} is not a valid {invalid!r} in the header of a checkpoint.")
    return save_tensors(path, tensors, metadata.to_header(), overwrite=overwrite)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, str], *, overwrite: bool = False
) -> Path:
    """Write a safetensors file with an arbitrary header, atomically. The same content gives the same bytes.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
    """
    safetensors, save_file = require("safetensors"), require("safetensors.torch").save_file
    with atomic_write(path, overwrite=overwrite) as part:
        try:
            save_file(_contiguous_unshared(tensors), part, header)
            _sort_header(Path(part))
        except safetensors.SafetensorError as error:  # its Rust code turns an OSError into this
            raise OutputError(f"{str(path)!r} could not be written: {first_line(error)}.") from error
    return Path(path)


def _contiguous_unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory: safetensors refuses all others."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        out[name] = contiguous.clone() if storage in seen else contiguous
        seen.add(storage)
    return out


def _sort_header(file: Path) -> None:
    """Sort the metadata of a safetensors file in place."""
    # The writer iterates over a Rust HashMap, whose order differs from run to run.
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # otherwise (other escapes) it stays unsorted; the tensors behind it cannot move
            stream.seek(8)
            stream.write(text.ljust(length))  # the format pads with spaces


def save_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Metadata | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a torch file, atomically: a bare state dict, or with ``metadata`` a state dict next to a header.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
    """
    content: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    if metadata is not None:
        content = {"state_dict": content, KEY: metadata.to_header()[KEY]}
    with atomic_write(path, overwrite=overwrite) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # PyTorch's zip writer turns an OSError into this
            raise OutputError(f"{str(path)!r} could not be written: {first_line(error)}.") from error
    return Path(path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, or a torch file that holds only tensors and plain data.

    In a torch file, wrapping dictionaries (``state_dict``, ``model``, …) are opened and wrapping prefixes (``module.``,
    …) removed. Averaged weights (``state_dict_ema``, ``model_ema``) take precedence.

    Raises:
        CheckpointError: the file does not exist, is not a checkpoint, is damaged, would have to run code to be read,
            or has weights that are not finite.
    """
    file = Path(path)
    start = _first_bytes(file)
    # A header length of 8 bytes, then JSON: no header is as long as 2**40 bytes.
    is_safetensors = start[5:9] == b"\0\0\0{"
    checkpoint = _read_safetensors(file) if is_safetensors else _read_torch(file, start)
    size = file.stat().st_size
    for name, tensor in checkpoint.tensors.items():
        if problem := _find_problem(tensor, size):
            raise CheckpointError(f"{str(file)!r} holds {problem}, in {name!r} first.")
    return checkpoint


def _first_bytes(file: Path) -> bytes:
    try:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "no file"
            raise CheckpointError(f"There is {what} at {str(file)!r}: give the path of a checkpoint.")
        with file.open("rb") as stream:
            return stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


def _find_problem(tensor: Tensor, file_size: int) -> str | None:
    """What makes a tensor of a file of ``file_size`` bytes unusable, or None."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "weights that are not plain numbers"
    if tensor.numel() * tensor.itemsize > file_size:  # strides of 0 repeat one number: 4 bytes could become terabytes
        return "weights that are larger than the file"
    if not tensor.is_floating_point():
        return None
    finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()  # float8 has no isfinite
    return None if bool(finite) else "values that are not finite"


def _read_safetensors(file: Path) -> Checkpoint:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
            header = opened.metadata()
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {first_line(error)}.") from error
    except Exception as error:  # for example a number format that safetensors knows and torch does not
        raise CheckpointError(f"{str(file)!r} cannot be read: {first_line(error)}.") from error
    return Checkpoint(file, tensors, Metadata.from_header(header, str(file)))


def _read_torch(file: Path, start: bytes) -> Checkpoint:
    content = _load_torch(file, start)
    found = _unwrap(file, content)
    if not found.tensors:
        raise CheckpointError(f"{str(file)!r} holds no named weights: save a model's state_dict.")
    header = content.get(KEY)
    skipped = {name: reason for name, reason in found.skipped.items() if name != KEY}
    metadata = Metadata.from_header({KEY: header}, str(file)) if isinstance(header, str) else None
    return replace(found, metadata=metadata, skipped=skipped)


def _load_torch(file: Path, start: bytes) -> Any:
    if not start.startswith((_ZIP_MAGIC, *_PICKLE_MAGIC)):
        raise CheckpointError(f"{str(file)!r} is not a checkpoint.")
    if start.startswith(_ZIP_MAGIC):
        _refuse_compressed(file)
    try:
        # timm stores its arguments as a Namespace, which is plain data.
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # torch warns of TorchScript archives, which raise below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(text in str(error) for text in _FOREIGN_CLASS) or _names_a_global(file):
            reason = "would run code when it is read; save its state_dict alone, as safetensors"
        else:
            reason = "is not a checkpoint, or is damaged"
        raise CheckpointError(f"{str(file)!r} {reason}.") from error
    except Exception as error:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint, or is damaged: {first_line(error)}.") from error


def _names_a_global(file: Path) -> bool:
    """Whether a bare pickle refers to a class or function; its opcodes are listed, not executed."""
    try:
        with file.open("rb") as stream:
            return any(code.name in ("GLOBAL", "STACK_GLOBAL", "INST") for code, _, _ in pickletools.genops(stream))
    except Exception:  # not a pickle, or a damaged one
        return False


def _refuse_compressed(file: Path) -> None:
    # torch.save never compresses, and a compressed entry may unpack to any size (a zip bomb).
    try:
        with zipfile.ZipFile(file) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint, or is damaged: {first_line(error)}.") from error
    if compressed:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint: it is a compressed archive.")


def _unwrap(file: Path, content: Any) -> Checkpoint:
    """Open the dictionaries and remove the prefixes that training scripts wrap around a state dict."""
    opened: list[str] = []
    skipped: dict[str, str] = {}
    while isinstance(content, dict) and len(opened) < _MAX_NESTING:  # a dictionary may contain itself
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if wrapper is None:
            break
        for name, value in content.items():
            if name != wrapper:
                copy_of_weights = name in _WRAPPERS and isinstance(value, dict)
                other = f"another copy of the weights; {wrapper} was taken"
                reason = other if copy_of_weights else "state of a training run, not of the model"
                skipped[".".join((*opened, str(name)))] = reason
        opened.append(wrapper)
        content = content[wrapper]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    skipped |= {str(name): "not a tensor" for name, _ in entries if name not in tensors}
    prefix = common_prefix(tensors)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Checkpoint(file, stripped, None, ".".join(opened), prefix, skipped)


def common_prefix(names: Iterable[str]) -> str:
    """Return the concatenation of wrapper prefixes with which all names start; empty if there is none."""
    rest, prefix = list(names), ""
    while more := next((p for p in _PREFIXES if rest and all(name.startswith(p) for name in rest)), None):
        rest, prefix = [name.removeprefix(more) for name in rest], prefix + more
    return prefix


def candidate_prefixes(names: Iterable[str]) -> list[str]:
    """Return every prefix that wrappers may have added to some of the names, the empty one first."""
    found = {""}
    for name in names:
        prefix = ""
        while more := next((p for p in _PREFIXES if name.startswith(p, len(prefix))), None):
            prefix += more
            found.add(prefix)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))
