"""From the names and shapes of tensors to the model that has them. Names are ours; values are not looked at.

Shapes tell depths, widths, groups, gates, classes and channels. They do not tell strides, but for a block of the train
form that keeps its width: it has an identity branch iff its stride is 1. Nor do they tell the image size. A row of the
table that fits brings its own; a model that is no row gets the family's stride of 2 a stage, and a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from repvgg.checkpoints import Form, GatePlace
from repvgg.errors import CheckpointError
from repvgg.models.spec import SPECS, ModelSpec, SqueezeExciteSpec, Stage

Shape: TypeAlias = tuple[int, ...]
CUSTOM = "custom"
_KERNEL = re.compile(r"(?:stem|stages\.([0-9]+)\.([0-9]+))\.conv(\.dense\.conv)?\.weight")
_AUXILIARY = re.compile(r"auxiliary\.stage(\d+)\..+")


@dataclass(frozen=True)
class Structure:
    """The model that tensors belong to, and what had to be assumed."""

    spec: ModelSpec
    form: Form
    num_classes: int
    in_channels: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Block:
    """What the shapes of one block tell."""

    name: str
    inputs: int  # channels a group
    outputs: int
    identity: bool
    hidden: int | None  # of its gate


def read_structure(
    shapes: Mapping[str, Shape], gate: GatePlace | None = None, halves: Collection[int] = ()
) -> Structure:
    """Find the model whose tensors have these shapes.

    Args:
        shapes: by our names; names that belong to no part of a model are passed over.
        gate: where gates stand, if the names in the file told.
        halves: stages that begin with stride 1, as far as the names told.

    Raises:
        CheckpointError: there is no such model; the text goes on after "PATH holds".
    """
    form, stem, stages = _blocks(shapes)
    head = shapes.get("head.weight", ())
    if len(head) != 2 or not all(head):
        raise CheckpointError("no RepVGG: its classifier is missing, or no matrix")
    found = _Found(form, stem, stages, _auxiliary(shapes), gate, halves)
    row = next((row for row in SPECS.values() if found.fits(row)), None)
    if row is not None:
        return Structure(row, form, head[0], stem.inputs)
    return Structure(found.custom(), form, head[0], stem.inputs, found.notes())


def _blocks(shapes: Mapping[str, Shape]) -> tuple[Form, _Block, list[list[_Block]]]:
    kernels = {found: shape for name, shape in shapes.items() if (found := _KERNEL.fullmatch(name))}
    places = {(-1, 0) if m[1] is None else (int(m[1]), int(m[2])): (m, shape) for m, shape in kernels.items()}
    plain = {m[3] is None for m in kernels}
    if (-1, 0) not in places or len(places) < 2:
        raise CheckpointError("no RepVGG: it has no stem, or no block behind it")
    if len(plain) > 1:
        raise CheckpointError("no RepVGG: some of its blocks have branches, and some are plain")
    numbers = sorted({stage for stage, _ in places})
    wanted = [(stage, block) for stage in numbers for block in range(sum(at == stage for at, _ in places))]
    if numbers != list(range(-1, len(numbers) - 1)) or wanted != sorted(places):
        raise CheckpointError("no whole RepVGG: a stage or a block between others is missing")
    blocks = {place: _block(m[0].partition(".conv")[0], shape, shapes) for place, (m, shape) in places.items()}
    stages = [[blocks[at] for at in wanted if at[0] == stage] for stage in numbers[1:]]
    return ("plain" if plain == {True} else "train"), blocks[-1, 0], stages


def _block(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> _Block:
    if shape[2:] != (3, 3) or len(shape) != 4 or not all(shape):
        raise CheckpointError(f"no RepVGG: the kernel of {name!r} has the shape {shape}")
    gate = shapes.get(f"{name}.act.se.down.weight", ())
    return _Block(name, shape[1], shape[0], f"{name}.conv.identity.weight" in shapes, gate[0] if gate else None)


def _auxiliary(shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    return tuple(sorted({int(found[1]) for name in shapes if (found := _AUXILIARY.fullmatch(name))}))


class _Found:
    """Blocks, held against the rows of the table, or made a row of their own."""

    def __init__(
        self,
        form: Form,
        stem: _Block,
        stages: Sequence[Sequence[_Block]],
        auxiliary: tuple[int, ...],
        gate: GatePlace | None,
        halves: Collection[int],
    ) -> None:
        self.plain, self.auxiliary, self.gate = form == "plain", auxiliary, gate
        self.stem, self.stages = stem, stages
        self.blocks = [stem, *(block for stage in stages for block in stage)]
        self.widths = [self._width(stage) for stage in stages]
        self.groups = self._groups()
        self.strides = [1 if index in halves else self._stride(index) for index in range(len(stages))]

    def fits(self, row: ModelSpec) -> bool:
        """Whether the blocks may be those of a row; what shapes do not tell is taken to be so."""
        gate = row.squeeze_excite
        return (
            self.stem.outputs == row.stem.channels
            and [(len(blocks), width) for blocks, width in zip(self.stages, self.widths, strict=True)]
            == [(stage.depth, stage.channels) for stage in row.stages]
            and self.groups == row.groups
            and all(own in (None, stage.stride) for own, stage in zip(self.strides, row.stages, strict=True))
            and all(block.hidden == (gate and block.outputs // gate.reduction) for block in self.blocks)
            and (gate is None or self.gate in (None, gate.place))
            and (self.plain or self.auxiliary == row.auxiliary)
        )

    def custom(self) -> ModelSpec:
        """A row of its own."""
        stages = zip(self.stages, self.widths, self.strides, strict=True)
        if self.auxiliary and self.auxiliary[-1] >= len(self.stages):
            raise CheckpointError("no RepVGG: it has an auxiliary head for a stage that it lacks")
        return ModelSpec(
            CUSTOM,
            Stage(1, self.stem.outputs),
            tuple(Stage(len(blocks), width, stride or 2) for blocks, width, stride in stages),
            self.groups,
            self._squeeze_excite(),
            self.auxiliary,
            source="read off a checkpoint",
        )

    def notes(self) -> tuple[str, ...]:
        """What was assumed of a model that is no row."""
        open_ = ["stem", *(f"stages.{index}" for index, stride in enumerate(self.strides) if stride is None)]
        size = ModelSpec.input_size
        return (
            f"no row of the table: the strides of {', '.join(open_)} are not in the file and taken to be 2",
            f"no row of the table: the image size is not in the file and taken to be {size}",
        )

    def _width(self, stage: Sequence[_Block]) -> int:
        if len({block.outputs for block in stage}) > 1:
            raise CheckpointError(f"no RepVGG: the blocks around {stage[0].name!r} have several widths")
        return stage[0].outputs

    def _stride(self, index: int) -> int | None:
        """Of the first block of a stage, where an identity branch tells: where there could be one."""
        before = self.widths[index - 1] if index else self.stem.outputs
        if self.plain or before != self.widths[index]:
            return None
        return 1 if self.stages[index][0].identity else 2

    def _groups(self) -> int:
        """The groups of every second layer from the 3rd on; all others have one."""
        inputs = [self.stem.inputs, *(block.outputs for block in self.blocks)]
        numbers = [wide // block.inputs for wide, block in zip(inputs, self.blocks, strict=False)]
        groups = numbers[2] if len(numbers) > 2 else 1
        for layer, (block, wide) in enumerate(zip(self.blocks, inputs, strict=False)):
            wanted = groups if layer >= 2 and layer % 2 == 0 else 1
            if block.inputs * wanted != wide:
                raise CheckpointError(f"no RepVGG: {block.name!r} takes {block.inputs} channels a group, of {wide}")
        return groups

    def _squeeze_excite(self) -> SqueezeExciteSpec | None:
        """The gate in every block; of the reductions that give its widths the largest, which divides evenly."""
        hidden = [(block.outputs, block.hidden) for block in self.blocks if block.hidden]
        if not hidden:
            return None
        reduction = min(wide // narrow for wide, narrow in hidden)
        if len(hidden) < len(self.blocks) or any(wide // reduction != narrow for wide, narrow in hidden):
            raise CheckpointError("no RepVGG: not all of its blocks have the same gate")
        if self.gate is None:
            raise CheckpointError(
                "a model whose gates stand before the ReLU or behind it, which nothing tells: save it with a header"
            )
        return SqueezeExciteSpec(self.gate, reduction)
