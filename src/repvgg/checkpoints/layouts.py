"""The parameter names that other libraries use for RepVGG, as tables; recognize and translate them in both directions.

A name consists of the path of a block, the path of a part inside it, and a leaf such as ``weight``. Each layout is a
table of pairs (ours, theirs) of the first two; ``{i}`` and ``{j}`` count stages and blocks from 0, ``{i+1}`` counts
from 1. Tensors are renamed and never reshaped, in the train form as in the plain form.

Sources: the repository of the paper's authors (``repvgg.py``, ``repvggplus.py``), timm's ``byobnet.py``, mmpretrain's
``backbones/repvgg.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor

from repvgg.checkpoints.files import Checkpoint
from repvgg.checkpoints.wrappers import candidate_prefixes
from repvgg.errors import CheckpointError, UsageError

Pair: TypeAlias = tuple[str, str]
GatePlace: TypeAlias = Literal["before_relu", "after_relu"]
_Value = TypeVar("_Value")

_LEAVES = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
_COUNTER = re.compile(r"\{([ij])(\+1)?\}")
_NUMBER = r"(?:0|[1-9][0-9]{0,4})"  # not \d, which matches digits of other scripts; no leading zeros


@dataclass(frozen=True)
class Layout:
    """The names of one library.

    Attributes:
        name: of the layout.
        blocks: paths of blocks.
        parts: paths of parts inside a block.
        others: paths of modules outside the blocks.
        gate: position of the squeeze-excite in a block with these names; None if they do not determine it.
        halves: indices of stages that continue the stage before them, and so begin with stride 1.
    """

    name: str
    blocks: tuple[Pair, ...]
    parts: tuple[Pair, ...]
    others: tuple[Pair, ...]
    gate: GatePlace | None
    halves: tuple[int, ...] = ()

    @cached_property
    def ours(self) -> _Renaming:
        """A function from a tensor's name in this layout to our name; None if the layout has no such name."""
        inverse = [tuple((theirs, ours) for ours, theirs in pairs) for pairs in (self.blocks, self.parts, self.others)]
        return _Renaming(*inverse)

    @cached_property
    def theirs(self) -> _Renaming:
        """A function from our name of a tensor to the name in this layout; None if it has none."""
        return _Renaming(self.blocks, self.parts, self.others)


class _Renaming:
    """One direction of a layout, as a function from name to name."""

    def __init__(self, blocks: tuple[Pair, ...], parts: tuple[Pair, ...], others: tuple[Pair, ...]) -> None:
        self.blocks = [(_Template(source, rest=True), _Template(target)) for source, target in blocks]
        self.others = [(_Template(source), _Template(target)) for source, target in others]
        self.parts = dict(parts)

    def __call__(self, name: str) -> str | None:
        path, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES:
            return None
        for source, target in self.others:
            if (found := source.match(path)) is not None:
                return f"{target.fill(found[0])}.{leaf}"
        for source, target in self.blocks:
            if (found := source.match(path)) is not None and found[1] in self.parts:
                return f"{target.fill(found[0])}.{self.parts[found[1]]}.{leaf}"
        return None


class _Template:
    """A path with counters in it, such as ``stages.{i}.{j}``; with ``rest`` it matches longer paths too."""

    def __init__(self, text: str, *, rest: bool = False) -> None:
        self.text = text
        self.first = {match[1]: int(bool(match[2])) for match in _COUNTER.finditer(text)}  # 1 for {i+1}
        pieces = (re.escape(piece) for piece in _COUNTER.sub("\0", text).split("\0"))
        counters = iter([f"(?P<{name}>{_NUMBER})" for name in self.first])
        pattern = "".join(piece + next(counters, "") for piece in pieces)
        self.pattern = re.compile(pattern + (r"\.(?P<rest>.+)" if rest else ""))

    def match(self, name: str) -> tuple[dict[str, int], str] | None:
        """Return the counters, from 0, and the rest of the path; None if ``name`` does not match."""
        found = self.pattern.fullmatch(name)
        if found is None:
            return None
        counters = {key: int(found[key]) - first for key, first in self.first.items()}
        return None if min(counters.values(), default=0) < 0 else (counters, found.groupdict().get("rest", ""))

    def fill(self, counters: dict[str, int]) -> str:
        """Return the path with these counters."""
        return _COUNTER.sub(lambda match: str(counters[match[1]] + int(bool(match[2]))), self.text)


_OURS = (
    *("conv", "conv.dense.conv", "conv.dense.bn", "conv.pointwise.conv", "conv.pointwise.bn", "conv.identity"),
    *("act.se.down", "act.se.up"),
)
_UPSTREAM = ("rbr_reparam", "rbr_dense.conv", "rbr_dense.bn", "rbr_1x1.conv", "rbr_1x1.bn", "rbr_identity")
_TIMM = ("reparam_conv", "conv_kxk.conv", "conv_kxk.bn", "conv_1x1.conv", "conv_1x1.bn", "identity")
_MMPRETRAIN = (
    *("branch_reparam", "branch_3x3.conv", "branch_3x3.norm", "branch_1x1.conv", "branch_1x1.norm", "branch_norm"),
)


def _parts(conv: tuple[str, ...], gate: tuple[str, str]) -> tuple[Pair, ...]:
    return tuple(zip(_OURS, (*conv, *gate), strict=True))


_PLUS_STAGES = ("stage1", "stage2", "stage3_first", "stage3_second", "stage4")
_AUXILIARY = (("conv", "0.conv"), ("bn", "0.bn"), ("head", "3"))

REPVGG = Layout(
    "repvgg",
    blocks=(("stem", "stem"), ("stages.{i}.{j}", "stages.{i}.{j}")),
    parts=_parts(_OURS[:6], ("act.se.down", "act.se.up")),
    others=(("head", "head"), *((name, name) for name in (f"auxiliary.stage{{i}}.{part}" for part, _ in _AUXILIARY))),
    gate=None,  # act.se is the name in both positions
)
UPSTREAM = Layout(
    "upstream",
    blocks=(("stem", "stage0"), ("stages.{i}.{j}", "stage{i+1}.{j}")),
    parts=_parts(_UPSTREAM, ("se.down", "se.up")),
    others=(("head", "linear"),),
    gate="before_relu",
)
UPSTREAM_PLUS = Layout(
    "upstream_plus",
    blocks=(
        ("stem", "stage0"),
        *((f"stages.{index}.{{j}}", f"{name}.blocks.{{j}}") for index, name in enumerate(_PLUS_STAGES)),
    ),
    parts=_parts(_UPSTREAM, ("post_se.down", "post_se.up")),
    others=(
        ("head", "linear"),
        *(
            (f"auxiliary.stage{index}.{ours}", f"{name}_aux.{theirs}")
            for index, name in enumerate(_PLUS_STAGES[:3])
            for ours, theirs in _AUXILIARY
        ),
    ),
    gate="after_relu",
    halves=(3,),
)
TIMM = Layout(
    "timm",
    blocks=(("stem", "stem"), ("stages.{i}.{j}", "stages.{i}.{j}")),
    parts=_parts(_TIMM, ("attn.fc1", "attn.fc2")),
    others=(("head", "head.fc"),),
    gate="before_relu",
)
MMPRETRAIN = Layout(
    "mmpretrain",
    blocks=(("stem", "backbone.stem"), ("stages.{i}.{j}", "backbone.stage_{i+1}.{j}")),
    parts=_parts(_MMPRETRAIN, ("se_layer.conv1.conv", "se_layer.conv2.conv")),
    others=(("head", "head.fc"),),
    gate="before_relu",
)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (REPVGG, UPSTREAM, UPSTREAM_PLUS, TIMM, MMPRETRAIN)
}  # the first one is taken where several match equally well

# What others leave in a state dict: torch's AveragedModel, thop (a FLOP counter), and modules that hold a loss as well.
_NOT_OF_A_NETWORK = (
    (r"(?:.*\.)?n_averaged", "it counts the models in an average"),
    (r"(?:.*\.)?total_(?:ops|params)", "a FLOP counter left it there"),
    (r"(?:.*\.)?\w*(?:criterion|loss(?:es|_fn|_func)?)(?:\..*)?", "it belongs to a loss"),
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
        notes: other decisions, one clause each.
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

    Raises:
        CheckpointError: there are several networks, under different prefixes; the text continues the sentence "PATH
            holds".
    """
    given = list(names)
    prefixes = candidate_prefixes(given)
    candidates = [_naming(given, prefix, layout) for layout in LAYOUTS.values() for prefix in prefixes]
    best = max(candidates, key=lambda naming: len(naming.used))
    twin = next((one for one in candidates if one.prefix != best.prefix and len(one.used) == len(best.used)), None)
    if best.used and twin is not None and twin.used.keys().isdisjoint(best.used):
        raise CheckpointError(f"several networks, such as {best.prefix!r} and {twin.prefix!r}: save one of them")
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

    Auxiliary heads next to plain blocks are dropped, buffers that tools are known to add, and weights of losses. Other
    unrecognized names are in neither: the caller decides whether to refuse them.
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
        return next((reason for pattern, reason in _NOT_OF_A_NETWORK if re.fullmatch(pattern, name)), None)
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
