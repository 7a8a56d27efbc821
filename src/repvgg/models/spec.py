"""The table of models: one frozen row each (paper Tables 2 and 3, and the rows that came later)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from repvgg.errors import UnknownModelError, UsageError, did_you_mean


@dataclass(frozen=True)
class Stage:
    """A run of blocks of one width; the first block carries the stride."""

    depth: int
    channels: int
    stride: int = 2

    def __post_init__(self) -> None:
        if min(self.depth, self.channels, self.stride) < 1:
            raise UsageError(f"A stage needs a positive depth, width and stride, not {self}.")


@dataclass(frozen=True)
class SqueezeExciteSpec:
    """Where a block gates its channels, and how narrow the gate is (hidden width C // reduction)."""

    place: Literal["before_relu", "after_relu"]
    reduction: int


@dataclass(frozen=True)
class ModelSpec:
    """One row of the table: everything that the builder needs to know.

    Attributes:
        name: what ``create_model`` calls it.
        stem: the first layer, a stage of depth 1.
        stages: the stages after it.
        groups: of every second layer, from the 3rd on (the stem is the 1st).
        squeeze_excite: the gate in every block, or None.
        auxiliary: indices of the stages that carry an auxiliary head while training.
        input_size: height and width in pixels that the row is made for; others work.
        source: where the row comes from.
    """

    name: str
    stem: Stage
    stages: tuple[Stage, ...]
    groups: int = 1
    squeeze_excite: SqueezeExciteSpec | None = None
    auxiliary: tuple[int, ...] = ()
    input_size: int = 224
    source: str = "RepVGG (CVPR 2021), Tables 2 and 3"

    def __post_init__(self) -> None:
        if self.stem.depth != 1:
            raise UsageError(f"The stem of {self.name} is one layer, not {self.stem.depth}.")
        if any(not 0 <= index < len(self.stages) for index in self.auxiliary):
            raise UsageError(f"{self.name} has no stage for each auxiliary head in {self.auxiliary}.")

    @property
    def stride(self) -> int:
        """Pixels of the input per pixel of the last feature map."""
        total = self.stem.stride
        for stage in self.stages:
            total *= stage.stride
        return total


def _family(
    name: str,
    depths: tuple[int, int, int, int],
    widths: tuple[float, float, float, float],
    groups: int = 1,
    squeeze_excite: SqueezeExciteSpec | None = None,
    source: str = ModelSpec.source,
) -> ModelSpec:
    """A row of the ImageNet family: widths multiply [64, 128, 256, 512], the stem is min(64, 64a)."""
    channels = [int(base * width) for base, width in zip((64, 128, 256, 512), widths, strict=True)]
    stages = tuple(Stage(depth, width) for depth, width in zip(depths, channels, strict=True))
    return ModelSpec(name, Stage(1, min(64, channels[0])), stages, groups, squeeze_excite, source=source)


def _plus_l2pse() -> ModelSpec:
    """RepVGGplus-L2pse: the long stage is cut in two, with an auxiliary head at the cut."""
    return ModelSpec(
        "repvggplus_l2pse",
        Stage(1, 64),
        (Stage(8, 160), Stage(14, 320), Stage(12, 640), Stage(12, 640, stride=1), Stage(1, 2560)),
        squeeze_excite=SqueezeExciteSpec("after_relu", 4),
        auxiliary=(0, 1, 2),
        source="the RepVGGplus release of the paper's authors",
    )


_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_D = (8, 14, 24, 1)
_B1 = (2.0, 2.0, 2.0, 4.0)
_B2 = (2.5, 2.5, 2.5, 5.0)
_B3 = (3.0, 3.0, 3.0, 5.0)
_SMALL = "made here for small images"

_ROWS = (
    _family("repvgg_a0", _A, (0.75, 0.75, 0.75, 2.5)),
    _family("repvgg_a1", _A, (1.0, 1.0, 1.0, 2.5)),
    _family("repvgg_a2", _A, (1.5, 1.5, 1.5, 2.75)),
    _family("repvgg_b0", _B, (1.0, 1.0, 1.0, 2.5)),
    _family("repvgg_b1", _B, _B1),
    _family("repvgg_b1g2", _B, _B1, groups=2),
    _family("repvgg_b1g4", _B, _B1, groups=4),
    _family("repvgg_b2", _B, _B2),
    _family("repvgg_b2g2", _B, _B2, groups=2),
    _family("repvgg_b2g4", _B, _B2, groups=4),
    _family("repvgg_b3", _B, _B3),
    _family("repvgg_b3g2", _B, _B3, groups=2),
    _family("repvgg_b3g4", _B, _B3, groups=4),
    _family(
        "repvgg_d2se",
        _D,
        _B2,
        squeeze_excite=SqueezeExciteSpec("before_relu", 16),
        source="the D2se release of the paper's authors",
    ),
    _plus_l2pse(),
    ModelSpec(
        "repvgg_t0",
        Stage(1, 16, stride=1),
        (Stage(2, 32), Stage(3, 64), Stage(1, 128)),
        input_size=32,
        source=_SMALL,
    ),
    ModelSpec(
        "repvgg_t1",
        Stage(1, 32, stride=1),
        (Stage(2, 64), Stage(4, 128), Stage(1, 256)),
        input_size=32,
        source=_SMALL,
    ),
    ModelSpec(
        "repvgg_t2",
        Stage(1, 32, stride=1),
        (Stage(2, 96), Stage(4, 192), Stage(2, 256)),
        input_size=32,
        source=_SMALL,
    ),
)

SPECS: dict[str, ModelSpec] = {row.name: row for row in _ROWS}


def spec_of(name: str) -> ModelSpec:
    """The row called ``name``.

    Raises:
        UnknownModelError: there is none; the text lists the names that are closest, or all of them.
    """
    if name in SPECS:
        return SPECS[name]
    known = did_you_mean(name, SPECS, f"known are {', '.join(SPECS)}.")
    raise UnknownModelError(f"There is no model {name!r}: {known}")
