"""Checkpoint files. Those of strangers are data: safetensors, or a torch archive read without running any of it."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg._files import atomic_write
from repvgg.checkpoints.metadata import KEY, Metadata
from repvgg.checkpoints.wrappers import unwrap
from repvgg.errors import CheckpointError, OutputError, UsageError, first_line, require

_ZIP = b"PK\x03\x04"
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_FOREIGN_CLASS = ("GLOBAL ", "Can only create new object", "Can only build")  # what torch's reader says of one


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file by name, and what it says about itself, if it does.

    Attributes:
        path: of the file.
        tensors: by name, without what wrappers put in front of every one.
        metadata: its header; None if it has none of ours.
        section: the entries of a torch file that were opened to get at the tensors, with dots between.
        prefix: what was taken off the names.
        passed_over: the reason for each entry of the file that was not taken.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Metadata | None
    section: str = ""
    prefix: str = ""
    passed_over: dict[str, str] = field(default_factory=dict)

    @property
    def averaged(self) -> bool:
        """Whether the tensors are of an entry for weights that were averaged in training."""
        return self.section.endswith("ema")


def save_checkpoint(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Metadata, *, overwrite: bool = False
) -> Path:
    """Write a safetensors file with a header, wholly or not at all.

    Raises:
        OutputExistsError: something is at ``path`` and ``overwrite`` is not set.
        OutputError: it cannot be written.
        UsageError: a field of the header makes no sense.
    """
    if wrong := metadata.senseless():
        raise UsageError(f"A header with the {wrong!r} {getattr(metadata, wrong)!r} makes no sense.")
    return save_tensors(path, tensors, metadata.to_header(), overwrite=overwrite)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, str], *, overwrite: bool = False
) -> Path:
    """Write a safetensors file with any header, wholly or not at all.

    Raises:
        OutputExistsError: something is at ``path`` and ``overwrite`` is not set.
        OutputError: it cannot be written.
    """
    safetensors, save_file = require("safetensors"), require("safetensors.torch").save_file
    with atomic_write(path, overwrite=overwrite) as part:
        try:
            save_file(_apart(tensors), part, header)
            _in_one_order(Path(part))
        except safetensors.SafetensorError as error:  # what it makes of an OSError, too
            raise OutputError(f"{str(path)!r} could not be written: {first_line(error)}.") from error
    return Path(path)


def _in_one_order(file: Path) -> None:
    """Sort the metadata of a safetensors file: its writer takes any order, and the same content gives other bytes."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as it is where that would not fit; spaces are what it is filled up with
            stream.seek(8)
            stream.write(text.ljust(length))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the standard layout, those that share memory as copies: safetensors takes no others."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().contiguous()
        storage = plain.untyped_storage().data_ptr()
        out[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return out


def save_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Metadata | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a torch file of tensors, wholly or not at all: a bare state dict, or one beside a header.

    Raises:
        OutputExistsError: something is at ``path`` and ``overwrite`` is not set.
        OutputError: it cannot be written.
    """
    content: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    if metadata is not None:
        content = {"state_dict": content, KEY: metadata.to_header()[KEY]}
    with atomic_write(path, overwrite=overwrite) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:  # what its zip writer makes of an OSError
            raise OutputError(f"{str(path)!r} could not be written: {first_line(error)}.") from error
    return Path(path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, or a torch file with nothing but tensors and plain data in it.

    Wrapping dictionaries (``state_dict``, ``model``, …) of a torch file are opened and wrapping prefixes (``module.``,
    …) taken off. Averaged weights (``state_dict_ema``, ``model_ema``) are taken where there are any.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, one that would have to run code to be read, or one
            with weights that are not finite.
    """
    file = Path(path)
    start = _start_of(file)
    checkpoint = _read_safetensors(file) if _is_safetensors(start) else _read_torch(file, start)
    size = file.stat().st_size
    for name, tensor in checkpoint.tensors.items():
        problem = _problem(tensor, size)
        if problem:
            raise CheckpointError(f"{str(file)!r} holds {problem}, in {name!r} first.")
    return checkpoint


def _start_of(file: Path) -> bytes:
    """The first bytes, by which files are told apart."""
    try:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "no file"
            raise CheckpointError(f"There is {what} at {str(file)!r}: give the path of a checkpoint.")
        with file.open("rb") as stream:
            return stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


def _is_safetensors(start: bytes) -> bool:
    """A length of 8 bytes, then JSON; no header is as long as 2**40."""
    return start[5:9] == b"\0\0\0{"


def _problem(tensor: Tensor, size: int) -> str | None:
    """Why a tensor in a file of ``size`` bytes is of no use, or None."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "weights that are not plain numbers"
    if tensor.numel() * tensor.itemsize > size:  # one number, repeated by strides of 0
        return "weights that are larger than the file"
    if not tensor.is_floating_point():
        return None
    finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
    return None if bool(finite) else "values that are not finite"


def _read_safetensors(file: Path) -> Checkpoint:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
            header = opened.metadata()
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {first_line(error)}.") from error
    except Exception as error:  # a type of number that its reader knows and torch does not, for one
        raise CheckpointError(f"{str(file)!r} cannot be read: {first_line(error)}.") from error
    return Checkpoint(file, tensors, Metadata.from_header(header, str(file)))


def _read_torch(file: Path, start: bytes) -> Checkpoint:
    content = _torch_content(file, start)
    found = unwrap(content)
    if not found.tensors:
        raise CheckpointError(f"{str(file)!r} holds no weights by name: save a model's state_dict.")
    header = content.get(KEY)
    passed_over = {name: reason for name, reason in found.passed_over.items() if name != KEY}
    metadata = Metadata.from_header({KEY: header}, str(file)) if isinstance(header, str) else None
    return Checkpoint(file, found.tensors, metadata, found.section, found.prefix, passed_over)


def _torch_content(file: Path, start: bytes) -> Any:
    """What a torch file holds, read as data: no class or function of it is looked up but those of tensors."""
    if not start.startswith((_ZIP, *_PICKLES)):
        raise CheckpointError(f"{str(file)!r} is not a checkpoint.")
    if start.startswith(_ZIP):
        _refuse_packed(file)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # about archives that are refused in any case
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in _FOREIGN_CLASS) or _calls(file):
            reason = "would run code when it is read; save its state_dict alone, as safetensors"
        else:
            reason = "is not a checkpoint, or is damaged"
        raise CheckpointError(f"{str(file)!r} {reason}.") from error
    except Exception as error:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint, or is damaged: {first_line(error)}.") from error


def _calls(file: Path) -> bool:
    """Whether a file that is one pickle names a class or a function; its instructions are listed, not followed."""
    try:
        with file.open("rb") as stream:
            return any(code.name in ("GLOBAL", "STACK_GLOBAL", "INST") for code, _, _ in pickletools.genops(stream))
    except Exception:  # no pickle, or a damaged one
        return False


def _refuse_packed(file: Path) -> None:
    """torch.save stores; what is packed may be of any size once it is unpacked."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint, or is damaged: {first_line(error)}.") from error
    if packed:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint: it is a packed archive.")
