"""Weights out of a file into a model that was built elsewhere; they fit, or nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from repvgg.checkpoints import Checkpoint, common_prefix, is_plain_form, read_checkpoint
from repvgg.errors import CheckpointError
from repvgg.models.builder import RepVGG
from repvgg.models.loading import COUNTER, collapsed, form_of, rebuilt, translated

_SHOWN = 2


def load_weights(model: nn.Module, path: str | os.PathLike[str], name: str = "the model") -> None:
    """Load the tensors of a file into ``model``, in place.

    Wrapping dictionaries are opened; prefixes that wrappers put in front of every name (``module.``, ``_orig_mod.``,
    ``model.``) may differ between the file and the model. A model of the table takes the files of other libraries, too,
    as :func:`load` does; if it is plain and the file is not, the file is collapsed on the way.

    Args:
        model: where the tensors go; its own dtypes stay.
        path: safetensors, or a torch file of tensors, read as data.
        name: what the errors call the model.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, unexpected, or of another shape; the text
            counts each kind and names the first two. Or the file is plain and the model has branches.
    """
    checkpoint = read_checkpoint(path)
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    left: list[str] = []
    if isinstance(model, RepVGG):
        given, left = _for_table(model, checkpoint)
    else:
        given = _prefixed(checkpoint.tensors, wanted)
    if problem := _problem(wanted, given, left):
        raise CheckpointError(f"The weights in {str(path)!r} do not fit {name}: {problem}.")
    model.load_state_dict(given, strict=False)


def _prefixed(given: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file with the prefix that the names of the model have."""
    ours, theirs = common_prefix(wanted), common_prefix(given)
    return {ours + key.removeprefix(theirs): tensor for key, tensor in given.items()}


def _for_table(model: RepVGG, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file under our names and in the form of the model, and the names that mean nothing here."""
    given, account, naming = translated(checkpoint)
    if is_plain_form(given) == (form_of(model) == "plain"):
        return given, [key for key in naming.unrecognized if key not in account.dropped]
    if is_plain_form(given):
        raise CheckpointError(
            f"{str(checkpoint.path)!r} is in the plain form, whose branches are gone: load it into the plain form, "
            "then repvgg.expand gives it new ones."
        )
    return collapsed(rebuilt(checkpoint)).model.state_dict(), []


def _problem(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], left: Iterable[str]) -> str | None:
    """What does not fit, in words; ``left`` are names of the file that mean nothing here."""
    missing = [key for key in wanted if key not in given and not key.endswith(COUNTER)]
    unexpected = [*(key for key in given if key not in wanted), *left]
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
