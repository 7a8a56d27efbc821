"""Infer the specification of a model from the names and shapes of its tensors. Names are ours; values are not read.

Shapes determine depths, widths, groups, gates, classes and channels. They do not determine strides, except of a
train-form block that keeps its width: it has an identity branch iff its stride is 1. Nor do they determine the image
size. A registered model that fits provides both; any other model gets the family's stride of 2 per stage, and a note.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from repvgg.checkpoints import Form, GatePlace
from repvgg.errors import CheckpointError
from repvgg.models.registry import SPECS
from repvgg.models.spec import ModelSpec, SqueezeExciteSpec, Stage

Shape: TypeAlias = tuple[int, ...]

MAX_BLOCKS = 1000  # building one takes about a millisecond, even without memory for its weights
CUSTOM = "custom"  # name of a model that is not registered
# [0-9], not \d, which also matches digits of other scripts.
_KERNEL = re.compile(r"(?:stem|stages\.([0-9]+)\.([0-9]+))\.conv(\.dense\.conv)?\.weight")
_AUXILIARY = re.compile(r"auxiliary\.stage(\d+)\..+")


@dataclass(frozen=True)
class InferredSpec:
    """The model that tensors belong to, and the assumptions that were necessary."""

    spec: ModelSpec
    form: Form
    num_classes: int
    in_channels: int
    notes: tuple[str, ...] = ()


def infer_spec(
    shapes: Mapping[str, Shape], gate: GatePlace | None = None, halves: Collection[int] = ()
) -> InferredSpec:
    """Find the model whose tensors have these shapes.

    Args:
        shapes: by our names; names that belong to no part of a model are ignored.
        gate: the position of gates, if the names in the file reveal it.
        halves: indices of stages that start with stride 1, as far as the names in the file reveal it.

    Raises:
        CheckpointError: there is no such model; the text continues the sentence "PATH holds".
    """
    observed = _observe(shapes, gate, halves)
    head = shapes.get("head.weight", ())
    if len(head) != 2 or not all(head):
        raise CheckpointError("no RepVGG: its classifier is missing, or is not a matrix")
    # Registered models are unique by names and shapes (a test checks it), so the first match is the only one.
    spec = next((spec for spec in SPECS.values() if observed.matches(spec)), None)
    if spec is not None:
        return InferredSpec(spec, observed.form, head[0], observed.stem.in_channels)
    return InferredSpec(observed.custom(), observed.form, head[0], observed.stem.in_channels, observed.notes())


@dataclass(frozen=True)
class _Block:
    """What the shapes of one block reveal."""

    name: str
    in_channels: int  # per group
    out_channels: int
    has_identity: bool
    gate_width: int | None


def _observe(shapes: Mapping[str, Shape], gate: GatePlace | None, halves: Collection[int]) -> _Observed:
    """Find all blocks, and check that they form a stem and complete stages."""
    kernels = {match: shape for name, shape in shapes.items() if (match := _KERNEL.fullmatch(name))}
    # (stage, block); the stem is stage -1.
    positions = {(-1, 0) if m[1] is None else (int(m[1]), int(m[2])): (m, shape) for m, shape in kernels.items()}
    is_plain = {m[3] is None for m in kernels}
    if (-1, 0) not in positions or len(positions) < 2:
        raise CheckpointError("no RepVGG: it has no stem, or no block after it")
    if len(is_plain) > 1:
        raise CheckpointError("no RepVGG: some of its blocks have branches, and some are plain")
    if len(positions) > MAX_BLOCKS:
        raise CheckpointError(f"no RepVGG: it has {len(positions):,} blocks, of which each takes time to build")
    depths = Counter(stage for stage, _ in positions)
    stages = sorted(depths)
    complete = [(stage, block) for stage in stages for block in range(depths[stage])]
    if stages != list(range(-1, len(stages) - 1)) or complete != sorted(positions):
        raise CheckpointError("an incomplete RepVGG: a stage or a block between others is missing")
    blocks: dict[tuple[int, int], _Block] = {}
    for position, (match, shape) in positions.items():
        name = match[0].partition(".conv")[0]
        if shape[2:] != (3, 3) or len(shape) != 4 or not all(shape):
            raise CheckpointError(f"no RepVGG: the kernel of {name!r} has the shape {shape}")
        gate_shape = shapes.get(f"{name}.act.se.down.weight", ())
        has_identity = f"{name}.conv.identity.weight" in shapes
        blocks[position] = _Block(name, shape[1], shape[0], has_identity, gate_shape[0] if gate_shape else None)
    auxiliary = sorted({int(match[1]) for name in shapes if (match := _AUXILIARY.fullmatch(name))})
    return _Observed(
        "plain" if is_plain == {True} else "train",
        blocks[-1, 0],
        [[blocks[stage, block] for block in range(depths[stage])] for stage in stages[1:]],
        tuple(auxiliary),
        gate,
        halves,
    )


class _Observed:
    """The blocks of a file, compared with registered models or turned into a specification."""

    def __init__(
        self,
        form: Form,
        stem: _Block,
        stages: list[list[_Block]],
        auxiliary: tuple[int, ...],
        gate: GatePlace | None,
        halves: Collection[int],
    ) -> None:
        self.form, self.auxiliary, self.gate = form, auxiliary, gate
        self.stem, self.stages = stem, stages
        self.blocks = [stem, *(block for stage in stages for block in stage)]
        self.widths = [self._width(stage) for stage in stages]
        self.groups = self._groups()
        self.strides = [1 if index in halves else self._stride(index) for index in range(len(stages))]

    def matches(self, spec: ModelSpec) -> bool:
        """Return whether the blocks may be those of ``spec``; what shapes do not determine counts as equal."""
        gate = spec.squeeze_excite
        return (
            self.stem.out_channels == spec.stem.channels
            and [(len(blocks), width) for blocks, width in zip(self.stages, self.widths, strict=True)]
            == [(stage.depth, stage.channels) for stage in spec.stages]
            and self.groups == spec.groups
            and all(own in (None, stage.stride) for own, stage in zip(self.strides, spec.stages, strict=True))
            and all(block.gate_width == (gate and block.out_channels // gate.reduction) for block in self.blocks)
            and (gate is None or self.gate in (None, gate.place))
            # A plain file has no auxiliary heads to compare.
            and (self.form == "plain" or self.auxiliary == spec.auxiliary)
        )

    def custom(self) -> ModelSpec:
        """Return the specification of a model that is not registered."""
        stages = zip(self.stages, self.widths, self.strides, strict=True)
        if self.auxiliary and self.auxiliary[-1] >= len(self.stages):
            raise CheckpointError("no RepVGG: it has an auxiliary head for a stage that does not exist")
        return ModelSpec(
            CUSTOM,
            Stage(1, self.stem.out_channels),
            tuple(Stage(len(blocks), width, stride or 2) for blocks, width, stride in stages),
            self.groups,
            self._squeeze_excite(),
            self.auxiliary,
            source="inferred from a checkpoint",
        )

    def notes(self) -> tuple[str, ...]:
        """Return what was assumed of a model that is not registered."""
        assumed = ["stem", *(f"stages.{index}" for index, stride in enumerate(self.strides) if stride is None)]
        return (
            f"not a registered model: the strides of {', '.join(assumed)} are not in the file and assumed to be 2",
            f"not a registered model: the image size is not in the file and assumed to be {ModelSpec.input_size}",
        )

    def _width(self, stage: list[_Block]) -> int:
        if len({block.out_channels for block in stage}) > 1:
            raise CheckpointError(f"no RepVGG: the blocks around {stage[0].name!r} have several widths")
        return stage[0].out_channels

    def _stride(self, index: int) -> int | None:
        """Return the stride of a stage if an identity branch, or its absence, determines it; else None."""
        previous = self.widths[index - 1] if index else self.stem.out_channels
        if self.form == "plain" or previous != self.widths[index]:
            return None
        return 1 if self.stages[index][0].has_identity else 2

    def _groups(self) -> int:
        """Return the groups of every second layer from the 3rd on; check that all others have one group."""
        # A kernel's second dimension is channels per group; the channels themselves are the previous block's outputs.
        inputs = [self.stem.in_channels, *(block.out_channels for block in self.blocks)]
        ratios = [total // block.in_channels for total, block in zip(inputs, self.blocks, strict=False)]
        groups = ratios[2] if len(ratios) > 2 else 1
        for layer, (block, total) in enumerate(zip(self.blocks, inputs, strict=False)):
            expected = groups if layer >= 2 and layer % 2 == 0 else 1
            if block.in_channels * expected != total:
                raise CheckpointError(
                    f"no RepVGG: {block.name!r} takes {block.in_channels} channels a group, of {total}"
                )
        return groups

    def _squeeze_excite(self) -> SqueezeExciteSpec | None:
        """Return the gate that all blocks share, or None; check that all blocks have it."""
        widths = [(block.out_channels, block.gate_width) for block in self.blocks if block.gate_width]
        if not widths:
            return None
        # C // reduction rounds down: the smallest quotient is the reduction that gives all widths.
        reduction = min(channels // hidden for channels, hidden in widths)
        if len(widths) < len(self.blocks) or any(channels // reduction != hidden for channels, hidden in widths):
            raise CheckpointError("no RepVGG: not all of its blocks have the same gate")
        if self.gate is None:
            raise CheckpointError(
                "a model whose gates may be before or after the ReLU, which its names do not reveal: save it with a "
                "header"
            )
        return SqueezeExciteSpec(self.gate, reduction)
