"""Translate the names of a checkpoint to ours and back, and report what became of every tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from repvgg.checkpoints.files import Checkpoint, candidate_prefixes
from repvgg.checkpoints.layouts import LAYOUTS, REPVGG, UPSTREAM, UPSTREAM_PLUS, GatePlace, Layout
from repvgg.errors import UsageError

_Value = TypeVar("_Value")

# Buffers that tools leave in a state dict: torch's AveragedModel, and thop, a FLOP counter.
_FOREIGN_BUFFERS = (
    (r"(?:.*\.)?n_averaged", "it counts the models in an average"),
    (r"(?:.*\.)?total_(?:ops|params)", "a FLOP counter left it there"),
)


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a file.

    Attributes:
        layout: the library whose names the file has; "repvgg" for ours.
        section: the entry of the file that was read, such as "state_dict_ema"; empty if it had none.
        prefix: the prefix that wrappers had added to the names.
        used: name in the file → our name, for the tensors that were used.
        dropped: name in the file → reason, for the entries that were not.
        filled: our names that the file lacks and inference does not need (the batch counters of batch norms).
        notes: other decisions that the reader should know.
        header: whether the file has a header of this library.
    """

    layout: str
    section: str = ""
    prefix: str = ""
    used: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    header: bool = False


@dataclass(frozen=True)
class Naming:
    """The names of a file, recognized.

    Attributes:
        layout: the layout that most of the names belong to.
        prefix: added to them by wrappers.
        used: name in the file → our name.
        unrecognized: names that the layout does not have.
    """

    layout: Layout
    prefix: str
    used: dict[str, str]
    unrecognized: tuple[str, ...]

    def in_file(self, name: str) -> str:
        """Return the file's name for our tensor ``name``."""
        theirs = self.layout.theirs(name)
        return name if theirs is None else self.prefix + theirs


def recognize_names(names: Iterable[str]) -> Naming | None:
    """Find the layout and prefix that recognize the most names; None if they recognize no more than half of them.

    Only the names are considered, neither the file name nor a header.
    """
    given = list(names)
    candidates = [_naming(given, prefix, layout) for layout in LAYOUTS.values() for prefix in candidate_prefixes(given)]
    best = max(candidates, key=lambda naming: len(naming.used))
    # Most, not all: a mixed file is reported with the names that do not fit, rather than as unknown.
    return best if 2 * len(best.used) > len(given) else None


def _naming(names: list[str], prefix: str, layout: Layout) -> Naming:
    used = {}
    for name in names:
        ours = layout.ours(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if ours is not None:
            used[name] = ours
    return Naming(layout, prefix, used, tuple(name for name in names if name not in used))


def translate(checkpoint: Checkpoint, naming: Naming) -> tuple[dict[str, Tensor], Account]:
    """Return the tensors of a file under our names, and the account.

    Auxiliary heads next to plain blocks are dropped, and buffers that tools are known to add. Other unrecognized names
    are in neither: the caller decides whether to refuse them.
    """
    dropped = dict(checkpoint.skipped)
    tensors, used = {}, {}
    plain = is_plain_form(naming.used.values())
    for name, tensor in checkpoint.tensors.items():
        ours = naming.used.get(name)
        reason = _reason_to_drop(name, ours, plain)
        if reason:
            dropped[name] = reason
        elif ours:
            tensors[ours], used[name] = tensor, ours
    prefix = checkpoint.prefix + naming.prefix
    return tensors, Account(naming.layout.name, checkpoint.section, prefix, used, dropped)


def identity_naming(checkpoint: Checkpoint) -> Naming:
    """Return the naming that takes every name of a file as ours."""
    return Naming(REPVGG, "", {name: name for name in checkpoint.tensors}, ())


def _reason_to_drop(name: str, ours: str | None, plain: bool) -> str | None:
    if ours is None:
        return next((reason for pattern, reason in _FOREIGN_BUFFERS if re.fullmatch(pattern, name)), None)
    return "an auxiliary head serves training only" if plain and ours.startswith("auxiliary.") else None


def is_plain_form(names: Iterable[str]) -> bool:
    """Return whether our names are those of a plain form: no block has branches."""
    return not any(".conv.dense." in name for name in names)


def rename_to(layout: str, tensors: Mapping[str, _Value], gate: GatePlace | None) -> dict[str, _Value]:
    """Return our tensors under the names of a layout.

    Args:
        layout: "repvgg", "upstream", "timm" or "mmpretrain". Upstream uses other names for RepVGGplus; they are chosen
            if squeeze-excite follows the ReLU, or if there are auxiliary heads.
        tensors: by our names.
        gate: position of squeeze-excite in the blocks; None if there is none.

    Raises:
        UsageError: unknown layout, or one that has no such model.
    """
    auxiliary = any(name.startswith("auxiliary.") for name in tensors)
    if layout == UPSTREAM.name and (gate == UPSTREAM_PLUS.gate or auxiliary):
        table = UPSTREAM_PLUS
    elif layout in LAYOUTS:
        table = LAYOUTS[layout]
    else:
        raise UsageError(f"There is no layout {layout!r}: choose repvgg, upstream, timm or mmpretrain.")
    if gate is not None and table.gate not in (gate, None):
        raise UsageError(f"{layout} has no model with squeeze-excite after the ReLU: write it as upstream or repvgg.")
    renamed = {}
    for name, tensor in tensors.items():
        theirs = table.theirs(name)
        if theirs is None:
            raise UsageError(f"{layout} has no name for {name!r}: write this model as repvgg.")
        renamed[theirs] = tensor
    return renamed
