"""Who takes part in studies that train: frozen rows, each with what the paper printed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

from torch import nn

from repvgg.blocks import BLOCKS, Geometry, create_block
from repvgg.errors import BorderError, UsageError, did_you_mean
from repvgg.models import ModelSpec, Stage, create_variant, residual_reorg, spec_of
from repvgg.studies.paper import TABLE_6, TABLE_7

#: From a row of models, the number of classes and that of channels to a network, freshly initialized.
Make: TypeAlias = Callable[[ModelSpec, int, int], nn.Module]

FULL = "repvgg"  # the row that all others are compared with

#: RepVGG-B0 for 32x32 images and little time: all of its 28 layers, a quarter of its widths, no stride in the stem.
SMALL_B0 = ModelSpec(
    "b0-small",
    Stage(1, 16, stride=1),
    (Stage(4, 16), Stage(6, 32), Stage(16, 64), Stage(1, 320)),
    input_size=32,
    source="RepVGG-B0 (CVPR 2021, Table 2) made small for studies",
)


@dataclass(frozen=True)
class Contender:
    """A network that is trained.

    Attributes:
        name: in files, and for ``--rows``.
        title: as the paper prints it.
        make: builds it on a row of models.
        top1_percent: on ImageNet-1K, as the paper prints it for RepVGG-B0; None where it prints nothing.
        identity: whether its blocks have an identity branch, where the table says so.
        pointwise: likewise the 1x1 branch.
    """

    name: str
    title: str
    make: Make
    top1_percent: float | None = None
    identity: bool | None = None
    pointwise: bool | None = None


def _variant(block: str, spec: ModelSpec, num_classes: int, in_channels: int) -> nn.Module:
    return create_variant(spec, block, num_classes, in_channels)


_BRANCHES = {
    (False, False): "conv_bn",
    (True, False): "repvgg_no_pointwise",
    (False, True): "repvgg_no_identity",
    (True, True): FULL,
}

#: The rows of Table 6, in its order.
BRANCHES = tuple(
    Contender(
        block,
        BLOCKS[block].title,
        partial(_variant, block),
        row.top1_percent,
        row.identity,
        row.pointwise,
    )
    for row in TABLE_6
    for block in (_BRANCHES[row.identity, row.pointwise],)
)

#: The rows of Table 7, in its order.
VARIANTS = tuple(
    Contender(
        row.name,
        row.title,
        residual_reorg if row.name == "residual_reorg" else partial(_variant, row.name),
        row.top1_percent,
    )
    for row in TABLE_7
)


#: Blocks that are another one where kernels are 3x3.
TWINS = {"replk": "repvgg_no_identity", "expand_ck": "conv_bn", "qarepvgg_s2": "repvgg_identity_without_bn"}


@cache
def all_blocks() -> tuple[Contender, ...]:
    """Every block of the table that has a form of its own with 3x3 kernels; the paper's accuracies where it has any."""
    printed = {row.name: row.top1_percent for row in (*BRANCHES, *VARIANTS)}
    return tuple(
        Contender(name, row.title, partial(_variant, name), printed.get(name))
        for name, row in BLOCKS.items()
        if name not in TWINS and _fits(name)
    )


def _fits(block: str) -> bool:
    """Whether a 3x3 convolution in the middle of a stage can be such a block."""
    try:
        create_block(block, Geometry.square(8, 8))
    except (UsageError, BorderError):
        return False
    return True


def network_row(name: str) -> ModelSpec:
    """The row of models that the contenders are built on: :data:`SMALL_B0`, or one of ``repvgg list``.

    Raises:
        UnknownModelError: there is no such row.
    """
    return SMALL_B0 if name == SMALL_B0.name else spec_of(name)


def chosen(rows: Sequence[Contender], names: Iterable[str]) -> tuple[Contender, ...]:
    """Those of ``rows`` that are named, in their order; all where none is.

    Raises:
        UsageError: one of the names is nobody's; the text lists those that are closest, or all.
    """
    wanted = list(names)
    known = [row.name for row in rows]
    for name in wanted:
        if name not in known:
            advice = did_you_mean(name, known, f"there are {', '.join(known)}.")
            raise UsageError(f"The study has no row {name!r}: {advice}")
    return tuple(row for row in rows if not wanted or row.name in wanted)
