"""One builder for every row of the table, in the train form and in the plain form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from repvgg.blocks import RepVGGBlock, SqueezeExcite, rep_conv
from repvgg.errors import UsageError
from repvgg.models.spec import SPECS, ModelSpec, spec_of


class TrainingOutput(NamedTuple):
    """What a model with auxiliary heads returns in training mode; each entry is (N, num_classes)."""

    logits: Tensor
    auxiliary: tuple[Tensor, ...]


class RepVGG(nn.Module):
    """A stack of RepVGG blocks, a global average pool and a linear classifier (paper §3.4).

    Train form and plain form are the same class with other modules in the place of ``block.conv``: three branches, or
    one ``nn.Conv2d``. In training mode a row with auxiliary heads returns a :class:`TrainingOutput`; otherwise, and
    for all other rows, ``forward`` returns the logits (N, num_classes).
    """

    def __init__(self, spec: ModelSpec, num_classes: int, in_channels: int, plain: bool) -> None:
        super().__init__()
        blocks = _blocks(spec, in_channels, plain)
        self.spec = spec
        self.in_channels = in_channels
        self.stem = next(blocks)
        self.stages = nn.ModuleList(nn.Sequential(*(next(blocks) for _ in range(stage.depth))) for stage in spec.stages)
        self.auxiliary = nn.ModuleDict()
        if not plain:
            for index in spec.auxiliary:
                self.auxiliary[f"stage{index}"] = _auxiliary_head(spec.stages[index].channels, num_classes)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(spec.stages[-1].channels, num_classes)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps after the stem and after each stage, finest first, for other heads.

        Args:
            x: images (N, in_channels, H, W).

        Returns:
            For an ImageNet row five maps, of strides 2, 4, 8, 16, 32.
        """
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

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


def _blocks(spec: ModelSpec, in_channels: int, plain: bool) -> Iterator[RepVGGBlock]:
    """All blocks of a row, stem first. The groups fall on layers 2, 4, 6, … with the stem as layer 0."""
    layer = 0
    for stage in (spec.stem, *spec.stages):
        for position in range(stage.depth):
            stride = stage.stride if position == 0 else 1
            groups = spec.groups if layer >= 2 and layer % 2 == 0 else 1
            yield RepVGGBlock(_conv(in_channels, stage.channels, stride, groups, plain), _act(spec, stage.channels))
            in_channels, layer = stage.channels, layer + 1


def _conv(in_channels: int, out_channels: int, stride: int, groups: int, plain: bool) -> nn.Module:
    if plain:
        return nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups)
    return rep_conv(in_channels, out_channels, stride, groups)


def _act(spec: ModelSpec, channels: int) -> nn.Module:
    if spec.squeeze_excite is None:
        return nn.ReLU()
    gate = SqueezeExcite(channels, channels // spec.squeeze_excite.reduction)
    first_gate = spec.squeeze_excite.place == "before_relu"
    act = nn.Sequential()
    for name in ("se", "relu") if first_gate else ("relu", "se"):
        act.add_module(name, gate if name == "se" else nn.ReLU())
    return act


def _auxiliary_head(channels: int, num_classes: int) -> nn.Sequential:
    """Conv3x3 of stride 2, BN, ReLU, pool, linear (RepVGGplus); used while training only."""
    head = nn.Sequential()
    head.add_module("conv", nn.Conv2d(channels, channels, 3, 2, 1, bias=False))
    head.add_module("bn", nn.BatchNorm2d(channels))
    head.add_module("relu", nn.ReLU())
    head.add_module("pool", nn.AdaptiveAvgPool2d(1))
    head.add_module("flatten", nn.Flatten())
    head.add_module("head", nn.Linear(channels, num_classes))
    return head


def create_model(
    name: str | ModelSpec,
    num_classes: int = 1000,
    in_channels: int = 3,
    plain: bool = False,
    *,
    pretrained: bool = False,
) -> RepVGG:
    """Build a model of the table, freshly initialized with PyTorch's defaults, or with published weights.

    Args:
        name: a name from :func:`list_models`, or a :class:`ModelSpec` of your own.
        num_classes: number of logits, at least 1.
        in_channels: channels of the input images, at least 1.
        plain: build the plain form, with the very keys, shapes and geometry that collapsing the train form gives.
        pretrained: take the ImageNet-1k weights that timm publishes on the Hugging Face hub, through its cache. For
            another number of classes the classifier stays fresh, for another number of channels the first block.

    Returns:
        The model in training mode, as every new module is, with published weights, too: call ``eval()`` before you
        predict or collapse. :func:`repvgg.models.load_pretrained` also tells how its images are to be prepared.

    Raises:
        UnknownModelError: no row has that name.
        UsageError: a count below 1, or there are no published weights of the row.
        SourceError: the weights are not in the cache and the hub cannot be reached.
        CheckpointError: what the hub holds is not of that row.

    Warns:
        FreshWeightsWarning: some weights are not the published ones, for other classes or channels.
    """
    require_counts(num_classes, in_channels)
    if pretrained:
        from repvgg.models.pretrained import load_pretrained  # here, as it needs this function

        loaded = load_pretrained(name, num_classes=num_classes, in_channels=in_channels, plain=plain)
        return loaded.model.train()
    spec = name if isinstance(name, ModelSpec) else spec_of(name)
    return RepVGG(spec, num_classes, in_channels, plain)


def list_models() -> list[str]:
    """The names of all rows of the table, in its order."""
    return list(SPECS)


def require_counts(num_classes: int, in_channels: int) -> None:
    """Refuse a model without classes or channels.

    Raises:
        UsageError: a count is below 1.
    """
    if num_classes < 1 or in_channels < 1:
        raise UsageError(
            f"A model needs at least one class and one input channel, not {num_classes} and {in_channels}."
        )
