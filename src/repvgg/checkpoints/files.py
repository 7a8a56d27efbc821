"""Checkpoint files. Those of strangers are data: safetensors, or a torch archive read without running any of it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg.checkpoints.metadata import Metadata
from repvgg.errors import CheckpointError, require
from repvgg.files import whole_or_nothing

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


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
    """
    save_file = require("safetensors.torch").save_file
    with whole_or_nothing(path, overwrite=overwrite) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata.to_header())
    return Path(path)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, or a torch file with nothing but tensors and plain data in it.

    Wrapping dictionaries (``state_dict``, ``model``, …) are opened and wrapping prefixes (``module.``, …) taken off.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, one that would have to run code to be read, or one
            with weights that are not finite.
    """
    file = Path(path)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no file"
        raise CheckpointError(f"There is {what} at {str(file)!r}: give the path of a checkpoint.")
    with file.open("rb") as stream:
        start = stream.read(9)
    tensors, metadata = _read_safetensors(file) if start[8:9] == b"{" else (_read_torch(file), None)
    broken = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if broken:
        raise CheckpointError(f"{str(file)!r} holds values that are not finite, in {broken[0]!r} first.")
    return Checkpoint(file, tensors, metadata)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


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
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported operand" in str(error):
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
    wrapper = next(
        (name for name in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)), None
    )
    if wrapper is not None:
        return _named_tensors(content[wrapper])
    if not isinstance(content, dict):
        return {}
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
    return _named_tensors({name.removeprefix(prefix): t for name, t in tensors.items()}) if prefix else tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
