"""Weights out of a file into a model that was built elsewhere; they fit, or nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from repvgg.checkpoints import common_prefix, read_checkpoint
from repvgg.errors import CheckpointError

_SHOWN = 2
_COUNTER = "num_batches_tracked"  # counts training steps; files older than it lack it, and inference ignores it


def load_weights(model: nn.Module, path: str | os.PathLike[str], name: str = "the model") -> None:
    """Load the tensors of a file into ``model``, in place.

    Wrapping dictionaries are opened; prefixes that wrappers put in front of every name (``module.``, ``_orig_mod.``,
    ``model.``) may differ between the file and the model.

    Args:
        model: where the tensors go; its own dtypes stay.
        path: safetensors, or a torch file of tensors, read as data.
        name: what the errors call the model.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, unexpected, or of another shape; the text
            counts each kind and names the first two.
    """
    given = read_checkpoint(path).tensors
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    ours, theirs = common_prefix(wanted), common_prefix(given)
    given = {ours + key.removeprefix(theirs): tensor for key, tensor in given.items()}
    if problem := _problem(wanted, given):
        raise CheckpointError(f"The weights in {str(path)!r} do not fit {name}: {problem}.")
    model.load_state_dict(given, strict=False)


def _problem(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """What does not fit, in words."""
    missing = [key for key in wanted if key not in given and not key.endswith(_COUNTER)]
    unexpected = [key for key in given if key not in wanted]
    shapes = [
        f"{key!r} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    counted = (
        _counted(map(repr, missing), "is missing", "are missing"),
        _counted(map(repr, unexpected), "is unexpected", "are unexpected"),
        _counted(shapes, "has another shape", "have other shapes"),
    )
    return "; ".join(filter(None, counted)) or None


def _counted(names: Iterable[str], one: str, many: str) -> str:
    """How many there are, and the first of them."""
    rows = list(names)
    if not rows:
        return ""
    shown = ", ".join(rows[:_SHOWN]) + (", …" if len(rows) > _SHOWN else "")
    return f"{len(rows)} {f'key {one}' if len(rows) == 1 else f'keys {many}'} ({shown})"
