"""From the names in a file to ours and back, with an account of every tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from repvgg.checkpoints.files import Checkpoint
from repvgg.checkpoints.layouts import LAYOUTS, REPVGG, UPSTREAM, UPSTREAM_PLUS, GatePlace, Layout
from repvgg.checkpoints.wrappers import prefixes_of
from repvgg.errors import UsageError

_Value = TypeVar("_Value")

_REASONS = (  # what tools leave among the weights
    (r"(?:.*\.)?n_averaged", "it counts the models in an average"),
    (r"(?:.*\.)?total_(?:ops|params)", "a FLOP counter left it there"),
)


@dataclass(frozen=True)
class Account:
    """Where every tensor of a file went.

    Attributes:
        layout: whose names the file has; "repvgg" are ours.
        section: the entry of the file that was read, such as "state_dict_ema"; empty if it had none.
        prefix: what wrappers had put in front of the names.
        used: the name here of each tensor that was used, by its name in the file.
        dropped: the reason for each entry that was not, by its name in the file.
        filled: names here that the file lacks and that inference does not need (training steps seen by a batch norm).
        notes: what else had to be decided.
        header: whether the file says of itself what it is.
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
    """Whose names those of a file are.

    Attributes:
        layout: the table that most of them are in.
        prefix: of wrappers, in front of them.
        used: our name for each.
        strange: those that are no names of the layout.
    """

    layout: Layout
    prefix: str
    used: dict[str, str]
    strange: tuple[str, ...]

    def in_file(self, name: str) -> str:
        """What the file calls a tensor of ours."""
        theirs = self.layout.theirs(name)
        return name if theirs is None else self.prefix + theirs


def recognize_names(names: Iterable[str]) -> Naming | None:
    """Find the layout and the prefix under which most of the names make sense; None if less than half do.

    Nothing but the names is looked at: neither the file's name nor what it says of itself.
    """
    given = list(names)
    candidates = [_naming(given, prefix, layout) for layout in LAYOUTS.values() for prefix in prefixes_of(given)]
    best = max(candidates, key=lambda naming: len(naming.used))
    return best if 2 * len(best.used) > len(given) else None


def _naming(names: list[str], prefix: str, layout: Layout) -> Naming:
    used = {}
    for name in names:
        ours = layout.ours(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if ours is not None:
            used[name] = ours
    return Naming(layout, prefix, used, tuple(name for name in names if name not in used))


def translate(checkpoint: Checkpoint, naming: Naming) -> tuple[dict[str, Tensor], Account]:
    """The tensors of a file under our names, and the account.

    Auxiliary heads beside plain blocks are dropped, and what tools are known to leave there. Other names that are none
    of the layout are in neither: it is for the caller to refuse them.
    """
    dropped = dict(checkpoint.passed_over)
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


def own_names(checkpoint: Checkpoint) -> Naming:
    """The tensors of a file under the names that they have."""
    return Naming(REPVGG, "", {name: name for name in checkpoint.tensors}, ())


def _reason_to_drop(name: str, ours: str | None, plain: bool) -> str | None:
    if ours is None:
        return next((reason for pattern, reason in _REASONS if re.fullmatch(pattern, name)), None)
    return "an auxiliary head serves training only" if plain and ours.startswith("auxiliary.") else None


def is_plain_form(names: Iterable[str]) -> bool:
    """Whether names of ours are of the plain form: no block has branches."""
    return not any(".conv.dense." in name for name in names)


def rename_to(layout: str, tensors: Mapping[str, _Value], gate: GatePlace | None) -> dict[str, _Value]:
    """Tensors of ours under the names of a layout.

    Args:
        layout: "repvgg", "upstream", "timm" or "mmpretrain". RepVGGplus has names of its own at its authors'; they are
            taken where gates stand behind the ReLU.
        tensors: by our names.
        gate: where the gates of the model stand; None if it has none.

    Raises:
        UsageError: no layout of that name, or one that has no such model.
    """
    table = _table(layout, gate, any(name.startswith("auxiliary.") for name in tensors))
    if gate is not None and table.gate not in (gate, None):
        raise UsageError(f"{layout} has no model with gates behind the ReLU: write it as upstream or repvgg.")
    renamed = {}
    for name, tensor in tensors.items():
        theirs = table.theirs(name)
        if theirs is None:
            raise UsageError(f"{layout} has no name for {name!r}: write this model as repvgg.")
        renamed[theirs] = tensor
    return renamed


def _table(layout: str, gate: GatePlace | None, auxiliary: bool) -> Layout:
    if layout == UPSTREAM.name and (gate == UPSTREAM_PLUS.gate or auxiliary):
        return UPSTREAM_PLUS
    if layout not in LAYOUTS:
        raise UsageError(f"There is no layout {layout!r}: take repvgg, upstream, timm or mmpretrain.")
    return LAYOUTS[layout]
