"""The weights of a plain network alone, in a safetensors file that is read back and compared bit for bit."""

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
    """Write the ``state_dict`` of a plain model to a safetensors file, wholly and bit for bit, or not at all.

    The header holds ``notes`` as JSON under ``repvgg.plain``; a model of our table gets the header with which
    :func:`repvgg.load` rebuilds it, too.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is not set.
        OutputError: the file cannot be written.
        ExportError: the model keeps state that is no tensor, or the file reads back as something else.
        CheckpointError: a weight is not finite.
    """
    tensors = model.state_dict()
    if odd := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"The model keeps state that is no tensor, {odd[0]!r}: safetensors cannot hold it.")
    with atomic_write(path, overwrite=overwrite) as part:
        save_tensors(part, tensors, _header(model, input_shape, notes or {}))
        back = read_checkpoint(part).tensors
        if unequal := [name for name in tensors.keys() | back.keys() if not _same(tensors.get(name), back.get(name))]:
            raise ExportError(f"What was written reads back as something else, in {min(unequal)!r} first.")
    return Path(path)


def _header(model: nn.Module, input_shape: tuple[int, int, int], notes: Mapping[str, str]) -> dict[str, str]:
    header = {"format": "pt", HEADER: json.dumps({"form": "plain", **notes}, sort_keys=True)}
    _, height, width = input_shape
    if isinstance(model, RepVGG) and height == width:
        header |= describe_model(model, "plain", input_size=height).to_header()
    return header


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same bits."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    ours, theirs = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(ours, theirs)
