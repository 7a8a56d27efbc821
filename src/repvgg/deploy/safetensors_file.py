"""Weights of a plain network in a safetensors file, which is read back and compared bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from repvgg._files import atomic_write
from repvgg.checkpoints import read_checkpoint, save_tensors
from repvgg.errors import ExportError
from repvgg.models import RepVGG, describe_model

HEADER = "repvgg.plain"


def export_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_shape: tuple[int, int, int],
    *,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write the ``state_dict`` of a plain model to a safetensors file, atomically and bit for bit.

    The header holds ``notes`` as JSON under ``repvgg.plain``. A model of repvgg's registry also gets the header from
    which :func:`repvgg.load` rebuilds it.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is not set.
        OutputError: the file cannot be written.
        ExportError: the model has state that is not a tensor, or the file does not read back as it was written.
        CheckpointError: a weight is not finite.
    """
    tensors = model.state_dict()
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"The model has state that is not a tensor, {odd[0]!r}: safetensors cannot store it.")
    header = {"format": "pt", HEADER: json.dumps({"form": "plain", **(notes or {})}, sort_keys=True)}
    _, height, width = input_shape
    if isinstance(model, RepVGG) and height == width:  # the header has room for one side only
        header |= describe_model(model, "plain", input_size=height).to_header()
    with atomic_write(path, overwrite=overwrite) as part:
        save_tensors(part, tensors, header)
        back = read_checkpoint(part).tensors  # before the rename: a file that differs never gets the name
        if unequal := [name for name in tensors.keys() | back.keys() if not _same(tensors.get(name), back.get(name))]:
            raise ExportError(f"The file does not read back as it was written: {min(unequal)!r} differs.")
    return Path(path)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # As bytes: torch.equal on floats takes -0.0 for 0.0, and NaN for different.
    ours, theirs = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(ours, theirs)
