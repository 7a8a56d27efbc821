"""Checkpoint files. Those of strangers are data: safetensors, or a torch archive read without running any of it."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg.checkpoints.metadata import Metadata
from repvgg.errors import CheckpointError, OutputError, UsageError, require
from repvgg.files import whole_or_nothing

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_DEEPEST = 8  # wrappers within wrappers


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file by name, and what it says about itself, if it does."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: Metadata | None


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
    with whole_or_nothing(path, overwrite=overwrite) as part:
        try:
            save_file(_apart(tensors), part, header)
            _in_one_order(Path(part))
        except safetensors.SafetensorError as error:  # what it makes of an OSError, too
            raise OutputError(f"{str(path)!r} could not be written: {_first_line(error)}.") from error
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


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, or a torch file with nothing but tensors and plain data in it.

    Wrapping dictionaries (``state_dict``, ``model``, …) are opened and wrapping prefixes (``module.``, …) taken off.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, one that would have to run code to be read, or one
            with weights that are not finite.
    """
    file = Path(path)
    start = _start_of(file)
    tensors, metadata = _read_safetensors(file) if start[8:9] == b"{" else (_read_torch(file), None)
    for name, tensor in tensors.items():
        problem = _problem(tensor)
        if problem:
            raise CheckpointError(f"{str(file)!r} holds {problem}, in {name!r} first.")
    return Checkpoint(file, tensors, metadata)


def _start_of(file: Path) -> bytes:
    """The first bytes: a safetensors file has a length of 8 bytes there, then JSON."""
    try:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "no file"
            raise CheckpointError(f"There is {what} at {str(file)!r}: give the path of a checkpoint.")
        with file.open("rb") as stream:
            return stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error


def _problem(tensor: Tensor) -> str | None:
    """Why a tensor is of no use, or None."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return "weights that are not plain numbers"
    if not tensor.is_floating_point():
        return None
    finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
    return None if bool(finite) else "values that are not finite"


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Metadata | None]:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
            header = opened.metadata()
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {_first_line(error)}.") from error
    return tensors, Metadata.from_header(header, str(file))


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about archives that are refused in any case
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error):
            reason = "would run code when it is read; save its state_dict alone, as safetensors"
        else:
            reason = "is not a checkpoint"
        raise CheckpointError(f"{str(file)!r} {reason}.") from error
    except Exception as error:
        raise CheckpointError(f"{str(file)!r} is not a checkpoint, or is damaged: {_first_line(error)}.") from error
    tensors = _named_tensors(content)
    if not tensors:
        raise CheckpointError(f"{str(file)!r} holds no weights by name: save a model's state_dict.")
    return tensors


def _named_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a possibly wrapped state dict, without wrapping prefixes."""
    for _ in range(_DEEPEST):
        wrapper = next((name for name in _WRAPPERS if isinstance(_get(content, name), dict)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, dict):
        return {}
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    prefix = common_prefix(tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def common_prefix(names: Iterable[str]) -> str:
    """What wrappers (DataParallel, compile, a Lightning module) put in front of every name; empty if nothing."""
    rest, prefix = list(names), ""
    while more := next((p for p in _PREFIXES if rest and all(name.startswith(p) for name in rest)), None):
        rest, prefix = [name.removeprefix(more) for name in rest], prefix + more
    return prefix


def _get(content: Any, name: str) -> Any:
    return content.get(name) if isinstance(content, dict) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
