"""The parameter names that other libraries use for RepVGG, as tables that translate in both directions.

A name consists of the path of a block, the path of a part inside it, and a leaf such as ``weight``. Each layout is a
table of pairs (ours, theirs) of the first two; ``{i}`` and ``{j}`` count stages and blocks from 0, ``{i+1}`` counts
from 1. Tensors are renamed and never reshaped, in the train form and in the plain form alike.

Sources: the repository of the paper's authors (``repvgg.py``, ``repvggplus.py``), timm's ``byobnet.py``, mmpretrain's
``backbones/repvgg.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

Pair: TypeAlias = tuple[str, str]
GatePlace: TypeAlias = Literal["before_relu", "after_relu"]

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

    def ours(self, name: str) -> str | None:
        """Return our name for the tensor ``name`` of this layout; None if the layout has no such name."""
        return self._to_ours(name)

    def theirs(self, name: str) -> str | None:
        """Return the name in this layout for our tensor ``name``; None if it has none."""
        return self._to_theirs(name)

    @cached_property
    def _to_ours(self) -> _Renaming:
        inverse = [tuple((theirs, ours) for ours, theirs in pairs) for pairs in (self.blocks, self.parts, self.others)]
        return _Renaming(*inverse)

    @cached_property
    def _to_theirs(self) -> _Renaming:
        return _Renaming(self.blocks, self.parts, self.others)


class _Renaming:
    """One direction of a layout."""

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
    others=(
        ("head", "head"),
        *((name, name) for name in (f"auxiliary.stage{{i}}.{part}" for part, _ in _AUXILIARY)),
    ),
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
