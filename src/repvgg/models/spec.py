"""Specifications of a RepVGG and of a PSPNet, and their form as plain data for file headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from repvgg._serde import from_plain, to_plain
from repvgg.errors import UsageError
from repvgg.models.dilation import DilationRule

# Bounds for data from files: a header must not be able to request absurd amounts of memory or time.
_MAX_COUNT = 2**20
_MAX_PIXELS = 2**14
_MAX_BINS = 16


@dataclass(frozen=True)
class Stage:
    """A sequence of blocks of one width; the first block carries the stride."""

    depth: int
    channels: int
    stride: int = 2

    def __post_init__(self) -> None:
        if min(self.depth, self.channels, self.stride) < 1:
            raise UsageError(f"A stage needs a positive depth, width and stride, not {self}.")


@dataclass(frozen=True)
class SqueezeExciteSpec:
    """The position of the squeeze-and-excitation gate in a block, and its reduction (hidden width C // reduction)."""

    place: Literal["before_relu", "after_relu"]
    reduction: int


@dataclass(frozen=True)
class ModelSpec:
    """Everything that defines a RepVGG except its numbers of classes and input channels."""

    name: str  # the key for create_model
    stem: Stage  # the first layer, a stage of depth 1
    stages: tuple[Stage, ...]  # the stages after it
    groups: int = 1  # of every second layer from the 3rd on, counting the stem as the 1st; all others have one group
    squeeze_excite: SqueezeExciteSpec | None = None  # the gate in every block, or None
    auxiliary: tuple[int, ...] = ()  # indices of the stages with an auxiliary head, which is used in training only
    input_size: int = 224  # height and width in pixels that the model is designed for; other sizes work
    source: str = "RepVGG (CVPR 2021), Tables 2 and 3"  # where the specification is published

    def __post_init__(self) -> None:
        if self.stem.depth != 1:
            raise UsageError(f"The stem of {self.name} must be one layer, not {self.stem.depth}.")
        if any(not 0 <= index < len(self.stages) for index in self.auxiliary):
            raise UsageError(f"{self.name} has no stage for each auxiliary head in {self.auxiliary}.")

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the last feature map."""
        return math.prod(stage.stride for stage in (self.stem, *self.stages))


@dataclass(frozen=True)
class PSPNetSpec:
    """Everything that defines a PSPNet except its numbers of classes and input channels.

    The defaults are those of the paper (RepVGG, §4.3) and of PSPNet's own code.
    """

    name: str  # the key for create_model
    backbone: str  # name of a RepVGG model or of a ResNet baseline
    dilation: DilationRule = "paper"  # see repvgg.models.dilation.dilate_
    output_stride: int = 8  # image pixels per pixel of the last feature map
    bins: tuple[int, ...] = (1, 2, 3, 6)  # the pyramid pools to bins x bins cells
    head_channels: int = 512  # of the 3x3 convolution before the classifier
    auxiliary_channels: int = 256  # of the 3x3 convolution in the auxiliary head
    dropout: float = 0.1  # probability of whole channels, in both heads
    input_size: int = 713  # height and width in pixels of the training crops
    source: str = "RepVGG (CVPR 2021), §4.3"  # where the specification is published

    def __post_init__(self) -> None:
        sizes = (self.output_stride, *self.bins, self.head_channels, self.auxiliary_channels, self.input_size)
        if not self.bins or not all(1 <= size < _MAX_PIXELS for size in sizes) or len(self.bins) > _MAX_BINS:
            raise UsageError(f"A PSPNet needs positive sizes and 1 to {_MAX_BINS} bins, not {self}.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be in [0, 1), got {self.dropout}.")


def spec_to_data(spec: ModelSpec | PSPNetSpec) -> dict[str, Any]:
    """Return the specification as data that JSON can represent."""
    data: dict[str, Any] = to_plain(spec)
    return data


def spec_from_data(data: Mapping[str, Any]) -> ModelSpec:
    """Rebuild the specification that :func:`spec_to_data` wrote; unknown fields of later versions are ignored.

    Raises:
        UsageError: the data do not describe a model.
    """
    try:
        # The default source is the paper, which a specification from a file need not come from.
        spec: ModelSpec = from_plain(ModelSpec, {"source": "", **data}, "spec", unknown="ignore")
        gate = 1 if spec.squeeze_excite is None else spec.squeeze_excite.reduction
        counts = [spec.groups, gate]
        for stage in (spec.stem, *spec.stages):
            counts += [stage.depth, stage.channels, stage.stride]
        if not all(1 <= count < _MAX_COUNT for count in counts) or not 1 <= spec.input_size < _MAX_PIXELS:
            raise UsageError("a size is out of range.")
        if not spec.stages:
            raise UsageError("it has no stage.")
    except UsageError as error:
        raise UsageError(f"This describes no model: {error}") from error
    return spec


def pspnet_spec_from_data(data: Mapping[str, Any]) -> PSPNetSpec:
    """Rebuild the specification of a PSPNet that :func:`spec_to_data` wrote; unknown fields are ignored.

    Raises:
        UsageError: the data do not describe one.
    """
    try:
        spec: PSPNetSpec = from_plain(PSPNetSpec, {"source": "", **data}, "spec", unknown="ignore")
    except UsageError as error:
        raise UsageError(f"This describes no PSPNet: {error}") from error
    return spec
