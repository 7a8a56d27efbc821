"""Read and write checkpoint files. Foreign files are data: no code in them is ever run.

safetensors files hold tensors only; torch files are read by :mod:`repvgg.checkpoints.torch_files`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg._files import atomic_write
from repvgg.checkpoints.metadata import KEY, Metadata
from repvgg.checkpoints.torch_files import load_torch
from repvgg.checkpoints.wrappers import is_averaged, unwrap
from repvgg.errors import CheckpointError, OutputError, UsageError, first_line, is_out_of_memory, require

MAX_TENSORS = 2**15  # each takes about 0.1 ms to read and check; networks for images have thousands
_MAX_HEADER_BYTES = 2**24  # of a safetensors file
_VARIANCE = "running_var"


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
        return is_averaged(self.section)


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
    """Read a safetensors file, or a torch file that holds only tensors, NumPy numbers and plain data.

    In a torch file, wrapping dictionaries (``state_dict``, ``model``, …) are opened and wrapping prefixes (``module.``,
    …) removed, see :func:`repvgg.checkpoints.wrappers.unwrap`.

    Raises:
        CheckpointError: the file does not exist, is not a checkpoint, is damaged, would have to run code to be read,
            has weights that are not finite or variances that are negative, or more than :data:`MAX_TENSORS` tensors.
        UsageError: ``path`` is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"A checkpoint is read from a path, not from a value of type {type(path).__name__}.")
    file = Path(path)
    start = _first_bytes(file)
    # A header length of 8 bytes, then JSON: no header is as long as 2**40 bytes.
    is_safetensors = start[5:9] == b"\0\0\0{"
    checkpoint = _read_safetensors(file, start) if is_safetensors else _read_torch(file, start)
    if len(checkpoint.tensors) > MAX_TENSORS:
        raise _too_many(file)
    _check_values(file, checkpoint.tensors)
    return checkpoint


def _too_many(file: Path) -> CheckpointError:
    return CheckpointError(f"{str(file)!r} is no network: it has more than {MAX_TENSORS:,} tensors.")


def _first_bytes(file: Path) -> bytes:
    try:
        if not file.is_file():
            what = "a folder" if file.is_dir() else "no file"
            raise CheckpointError(f"There is {what} at {str(file)!r}: give the path of a checkpoint.")
        with file.open("rb") as stream:
            return stream.read(256)
    except OSError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # a null character in the path
        raise CheckpointError(f"{str(file)!r} cannot be read: {first_line(error)}.") from error


def _check_values(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that cannot be used; each view is looked at once, and all views together have a limit."""
    size = file.stat().st_size
    checked: set[tuple[Any, ...]] = set()
    total = 0
    for name, tensor in tensors.items():
        problem = _wrong_kind(tensor)
        if problem is None:
            view = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            total += 0 if view in checked else tensor.numel() * tensor.itemsize
            # Strides of 0 repeat one number, so 4 bytes could become terabytes; so could thousands of views.
            if tensor.numel() * tensor.itemsize > size or total > 4 * size:
                problem = "weights that are larger than the file"
            elif view not in checked:
                problem = _wrong_values(name, tensor)
            checked.add(view)
        if problem:
            raise CheckpointError(f"{str(file)!r} holds {problem}, in {name!r} first.")


def _wrong_kind(tensor: Tensor) -> str | None:
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    return None if plain else "weights that are not plain numbers"


def _wrong_values(name: str, tensor: Tensor) -> str | None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    try:
        # float8 and smaller types have few functions of their own.
        values = tensor.float() if tensor.itemsize == 1 else tensor
        if not bool(torch.isfinite(values).all()):
            return "values that are not finite"
        return "negative variances" if name.endswith(_VARIANCE) and bool((values < 0).any()) else None
    except (NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return f"weights of type {str(tensor.dtype).removeprefix('torch.')}, with which PyTorch cannot compute"


def _read_safetensors(file: Path, start: bytes) -> Checkpoint:
    safetensors = require("safetensors")
    if int.from_bytes(start[:8], "little") > min(_MAX_HEADER_BYTES, file.stat().st_size):
        raise CheckpointError(f"{str(file)!r} is damaged, or no network: its header is larger than it can be.")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            names = opened.keys()
            if len(names) > MAX_TENSORS:
                raise _too_many(file)
            tensors = {name: opened.get_tensor(name) for name in names}
            header = opened.metadata()
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(file)!r} is damaged: {first_line(error)}.") from error
    except Exception as error:  # for example a number format that safetensors knows and torch does not
        raise CheckpointError(f"{str(file)!r} cannot be read: {first_line(error)}.") from error
    return Checkpoint(file, tensors, Metadata.from_header(header, str(file)))


def _read_torch(file: Path, start: bytes) -> Checkpoint:
    content = load_torch(file, start)
    found = unwrap(content)
    if not found.tensors:
        if found.elsewhere:
            names = ", ".join(map(repr, found.elsewhere[:3]))
            raise CheckpointError(f"{str(file)!r} holds weights as {names}: save the one to be read as 'state_dict'.")
        raise CheckpointError(f"{str(file)!r} holds no named weights: save a model's state_dict.")
    header = content.get(KEY)
    skipped = {name: reason for name, reason in found.skipped.items() if name != KEY}
    metadata = Metadata.from_header({KEY: header}, str(file)) if isinstance(header, str) else None
    return Checkpoint(file, found.tensors, metadata, found.section, found.prefix, skipped)
