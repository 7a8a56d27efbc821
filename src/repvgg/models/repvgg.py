"""The RepVGG network, in the train form and in the plain form, built from a specification."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor, nn

from repvgg.blocks import RepVGGBlock, SqueezeExcite, rep_conv
from repvgg.errors import UsageError
from repvgg.models.spec import ModelSpec


class TrainingOutput(NamedTuple):
    """The output of a model with auxiliary heads in training mode.

    Each tensor is (N, num_classes), or (N, num_classes, H, W) of a segmentation model.
    """

    logits: Tensor
    auxiliary: tuple[Tensor, ...]


class RepVGGBackbone(nn.Module):
    """The blocks of a RepVGG: a stem and stages, without a classifier.

    Both forms are this class and differ in ``block.conv`` only: three branches in the train form, one ``nn.Conv2d`` in
    the plain form. The arguments are those of :class:`RepVGG`.
    """

    def __init__(self, spec: ModelSpec, in_channels: int, plain: bool) -> None:
        super().__init__()
        require_counts(1, in_channels)
        # An iterator consumed in order: layer numbers for groups, and random numbers for a seed, follow the depth.
        blocks = _build_blocks(spec, in_channels, plain)
        self.spec = spec
        self.in_channels = in_channels
        self.stem = next(blocks)
        self.stages = nn.ModuleList(nn.Sequential(*(next(blocks) for _ in range(stage.depth))) for stage in spec.stages)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps that :meth:`features` returns."""
        return (self.spec.stem.channels, *(stage.channels for stage in self.spec.stages))

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps after the stem and after each stage, finest first, for use by other heads.

        Args:
            x: images (N, in_channels, H, W).

        Returns:
            For an ImageNet model five maps, with strides 2, 4, 8, 16 and 32.
        """
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Any:
        """Return :meth:`features`; subclasses return logits."""
        return self.features(x)


class RepVGG(RepVGGBackbone):
    """A stack of RepVGG blocks, a global average pool and a linear classifier (paper §3.4).

    ``forward`` returns the logits (N, num_classes). In training mode, a model with auxiliary heads returns a
    :class:`TrainingOutput` instead.

    Args:
        spec: depths, widths, strides, groups and gates.
        num_classes: number of logits.
        in_channels: channels of the input images.
        plain: build the plain form, which has no auxiliary heads.

    Raises:
        UsageError: ``num_classes`` or ``in_channels`` is below 1.
    """

    def __init__(self, spec: ModelSpec, num_classes: int, in_channels: int, plain: bool) -> None:
        require_counts(num_classes, in_channels)
        super().__init__(spec, in_channels, plain)
        self.auxiliary = nn.ModuleDict()  # empty in the plain form, which therefore has no keys for it
        if not plain:
            for index in spec.auxiliary:
                self.auxiliary[f"stage{index}"] = _auxiliary_head(spec.stages[index].channels, num_classes)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(spec.stages[-1].channels, num_classes)

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def replace_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one for another number of classes; auxiliary heads stay."""
        require_counts(num_classes, 1)
        self.head = nn.Linear(self.head.in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        """Return the logits of images (N, in_channels, H, W); see the class for training mode."""
        x = self.stem(x)
        auxiliary = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if self.training and f"stage{index}" in self.auxiliary:
                auxiliary.append(self.auxiliary[f"stage{index}"](x))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return TrainingOutput(logits, tuple(auxiliary)) if auxiliary else logits


def require_counts(num_classes: int, in_channels: int) -> None:
    """Check the numbers of classes and of input channels.

    Raises:
        UsageError: one of them is below 1, or no integer.
    """
    counts: tuple[Any, ...] = (num_classes, in_channels)
    if not all(isinstance(count, Integral) and int(count) >= 1 for count in counts):
        raise UsageError(
            f"A model needs at least one class and one input channel, not {num_classes!r} and {in_channels!r}."
        )


def _build_blocks(spec: ModelSpec, in_channels: int, plain: bool) -> Iterator[RepVGGBlock]:
    """Yield all blocks, stem first."""
    layer = 0
    for stage in (spec.stem, *spec.stages):
        for position in range(stage.depth):
            channels, stride = stage.channels, stage.stride if position == 0 else 1
            # Grouped layers alternate with dense ones, so that information crosses groups: layers 2, 4, 6, … of 0, 1, …
            groups = spec.groups if layer >= 2 and layer % 2 == 0 else 1
            conv: nn.Module
            if plain:
                conv = nn.Conv2d(in_channels, channels, 3, stride, 1, groups=groups)
            else:
                conv = rep_conv(in_channels, channels, stride, groups)
            yield RepVGGBlock(conv, _activation(spec, channels))
            in_channels, layer = channels, layer + 1


def _activation(spec: ModelSpec, channels: int) -> nn.Module:
    """Return a ReLU, or a sequence of gate and ReLU whose submodules are named ``se`` and ``relu``."""
    if spec.squeeze_excite is None:
        return nn.ReLU()
    gate = SqueezeExcite(channels, channels // spec.squeeze_excite.reduction)
    if spec.squeeze_excite.place == "before_relu":
        return nn.Sequential(OrderedDict(se=gate, relu=nn.ReLU()))
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), se=gate))


def _auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """Build RepVGGplus's auxiliary head: conv3x3 of stride 2, BN, ReLU, pool, linear."""
    layers = OrderedDict(
        conv=nn.Conv2d(channels, channels, 3, 2, 1, bias=False),
        bn=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(channels, num_classes),
    )
    return nn.Sequential(layers)
