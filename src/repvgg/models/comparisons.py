"""Whole networks that the paper compares RepVGG with (§4.2), and RepVGG's own skeleton with other blocks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from repvgg.blocks import BLOCKS, BranchSum, ConvBN, DiracConv2d, Geometry, RepVGGBlock, block_of
from repvgg.errors import BorderError, OtherBlockWarning, UnknownModelError, UsageError, did_you_mean
from repvgg.models.baselines import create_baseline
from repvgg.models.builder import RepVGG, require_counts
from repvgg.models.spec import ModelSpec, spec_of
from repvgg.models.starting_values import delta_orthogonal_

_SLOPE = 0.01  # of a leaky ReLU, PyTorch's own: what its source took is not known here


def create_variant(
    spec: str | ModelSpec, block: str, num_classes: int = 1000, in_channels: int = 3, *, otherwise: str = "conv_bn"
) -> RepVGG:
    """A RepVGG whose layers are blocks of the table, each followed by the activation of the row.

    Every row of Tables 6 and 7 but Residual Reorg is one of these. All of linear blocks collapse to the plain form of
    ``spec``.

    Args:
        spec: a row of the table of models, or its name.
        block: a name of :data:`repvgg.blocks.BLOCKS`.
        num_classes: number of logits.
        in_channels: channels of the images.
        otherwise: the block of those layers in whose geometry ``block`` has no form: RepMixer keeps its shape.

    Returns:
        The model, freshly initialized, in training mode.

    Raises:
        UnknownModelError: no row has that name.
        UsageError: there is no such block, or no layer has a geometry for it; or a count below 1.

    Warns:
        OtherBlockWarning: some layers are of ``otherwise``; the text says how many, and why.
    """
    require_counts(num_classes, in_channels)
    row, other = block_of(block), block_of(otherwise)
    model = RepVGG(spec if isinstance(spec, ModelSpec) else spec_of(spec), num_classes, in_channels, plain=False)
    reasons = []
    layers = [part for part in model.modules() if isinstance(part, RepVGGBlock)]
    for layer in layers:
        geometry = _geometry(layer)
        try:
            layer.conv = row.make(geometry)
        except (UsageError, BorderError) as error:
            reasons.append(str(error))
            layer.conv = other.make(geometry)
    if len(reasons) == len(layers):
        raise UsageError(f"No layer of {model.spec.name} can be a block {block!r}: {reasons[0]}")
    if reasons:
        text = f"{len(reasons)} of {len(layers)} layers are {otherwise!r} in place of {block!r}: {reasons[0]}"
        warnings.warn(text, OtherBlockWarning, stacklevel=2)
    return model


def _geometry(layer: RepVGGBlock) -> Geometry:
    """Of the convolution that the branches of a layer stand for."""
    assert isinstance(layer.conv, BranchSum)  # the train form
    dense = layer.conv["dense"]
    assert isinstance(dense, ConvBN)
    return Geometry.of(dense.conv)


class Staged(nn.Module):
    """A stem, stages, a global average pool and a linear classifier: logits (N, num_classes) of images (N, C, H, W)."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """``y = relu(BN(W2 ∗ relu(BN(W1 ∗ x))) + S(x))``, the basic block of ResNet-18 (He et al., CVPR 2016, Fig. 2).

    S is the identity where the shapes match, and else a 1x1 convolution with the stride of the block, and its BN.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvBN(Geometry.square(in_channels, out_channels, stride).conv())
        self.act = nn.ReLU()
        self.second = ConvBN(Geometry.square(out_channels, out_channels).conv())
        shortcut = Geometry.square(in_channels, out_channels, stride, kernel_size=1)
        self.shortcut = nn.Identity() if shortcut.keeps_shape else ConvBN(shortcut.conv())

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways, after the ReLU."""
        out: Tensor = self.act(self.second(self.act(self.first(x))) + self.shortcut(x))
        return out


def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    conv = Geometry.square(in_channels, out_channels, stride).conv()
    return nn.Sequential(ConvBN(conv), nn.ReLU())


def residual_reorg(spec: ModelSpec, num_classes: int = 1000, in_channels: int = 3) -> Staged:
    """The layers of a RepVGG, two a residual block as in ResNet-18 (paper §4.2, "Residual Reorg").

    A stage of an even number of layers becomes half as many residual blocks; of an odd number, the first layer stays
    one of its own. RepVGG-B0 becomes a layer, 2, 3 and 8 blocks, and a layer.

    Args:
        spec: whose depths, widths and strides; it has no groups and no gates.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UsageError: the row has groups or gates.
    """
    _require_bare(spec)
    widths = [spec.stem.channels, *(stage.channels for stage in spec.stages)]
    stages: list[nn.Module] = []
    for (before, width), stage in zip(pairwise(widths), spec.stages, strict=True):
        single, pairs = stage.depth % 2, stage.depth // 2
        parts: list[nn.Module] = [_layer(before, width, stage.stride)] if single else []
        for place in range(pairs):
            first = place == 0 and not single
            parts.append(ResidualBlock(before if first else width, width, stage.stride if first else 1))
        stages.append(nn.Sequential(*parts))
    return Staged(_layer(in_channels, widths[0], spec.stem.stride), stages, widths[-1], num_classes)


def _require_bare(spec: ModelSpec) -> None:
    if spec.groups != 1 or spec.squeeze_excite:
        raise UsageError(f"{spec.name} has groups or gates, which this network has not: take a row without.")


def dirac_net(depths: tuple[int, ...], num_classes: int = 1000, in_channels: int = 3) -> Staged:
    """DiracNet for ImageNet: the layers of a ResNet without its shortcuts, their kernels encoded with an identity.

    7x7 of stride 2 and max-pool; four stages of 64, 128, 256 and 512 channels with two layers for each of ``depths``,
    of :class:`repvgg.blocks.DiracConv2d`, BN and ReLU; max-pool 2x2 between stages. Collapsed, it has as many
    parameters as the weights that its authors publish folded.

    Source: Zagoruyko and Komodakis, DiracNets, arXiv:1706.00388, version 2, §4.2, and the authors' code.
    """
    stem = nn.Sequential(
        ConvBN(Geometry.square(in_channels, 64, 2, kernel_size=7).conv()), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    before, stages = 64, list[nn.Module]()
    for place, depth in enumerate(depths):
        parts: list[nn.Module] = [nn.MaxPool2d(2)] if place else []
        for _ in range(2 * depth):
            geometry = Geometry.square(before, 64 << place)
            parts += [DiracConv2d(geometry), nn.BatchNorm2d(geometry.out_channels), nn.ReLU()]
            before = geometry.out_channels
        stages.append(nn.Sequential(*parts))
    return Staged(stem, stages, before, num_classes)


def plain_net(
    spec: ModelSpec,
    act: Callable[[], nn.Module],
    start: Callable[[Tensor], object],
    num_classes: int = 1000,
    in_channels: int = 3,
) -> Staged:
    """The plain form of a RepVGG with another activation, no batch norm, and first values that let it train.

    Args:
        spec: whose depths, widths and strides.
        act: makes the activation behind each convolution.
        start: fills each kernel (O, I, 3, 3); biases begin at 0.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UsageError: the row has groups or gates.
    """
    _require_bare(spec)
    layers: Iterator[nn.Module] = _plain_layers(spec, act, start, in_channels)
    stem = next(layers)
    stages: list[nn.Module] = [nn.Sequential(*(next(layers) for _ in range(stage.depth))) for stage in spec.stages]
    return Staged(stem, stages, spec.stages[-1].channels, num_classes)


def _plain_layers(
    spec: ModelSpec, act: Callable[[], nn.Module], start: Callable[[Tensor], object], before: int
) -> Iterator[nn.Module]:
    for stage in (spec.stem, *spec.stages):
        for place in range(stage.depth):
            conv = nn.Conv2d(before, stage.channels, 3, 1 if place else stage.stride, 1)
            start(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has one
            yield nn.Sequential(conv, act())
            before = stage.channels


def _kaiming(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, a=_SLOPE)


def resnet50_repvgg(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """ResNet-50 with the three branches of RepVGG in the place of each 3x3 convolution and its BN (paper §4.2).

    76.34 against the 76.31 of ResNet-50: the branches are no general way to strengthen a network. Strides are where the
    paper's baseline has them, see :data:`repvgg.models.BASELINES`: its 3.9 GFLOPs (Table 4) are those of a ResNet-50
    whose first 1x1 convolutions stride, and not of torchvision's, where the 3x3 do. So all 16 blocks have an identity.

    Raises:
        UsageError: images of other than 3 channels, which the builder of ResNet-50 does not take.
    """
    if in_channels != 3:
        raise UsageError(f"ResNet-50 takes images of 3 channels, not {in_channels}.")
    model = create_baseline("resnet50", num_classes)
    for part in model.modules():
        children = dict(part.named_children())
        conv = children.get("conv2")
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            part.register_module("conv2", BLOCKS["repvgg"].make(Geometry.of(conv)))
            part.register_module("bn2", nn.Identity())
    return model


@dataclass(frozen=True)
class Comparison:
    """One row of the table of whole networks.

    Attributes:
        name: what :func:`create_comparison` calls it.
        title: as papers print it.
        make: from numbers of classes and of input channels to the model, freshly initialized.
        origin: who published it.
        input_size: height and width in pixels that it is compared at.
    """

    name: str
    title: str
    make: Callable[[int, int], nn.Module]
    origin: str
    input_size: int = 224


_PAPER = "Ding et al., RepVGG, CVPR 2021, §4.2"
_DIRAC = "Zagoruyko and Komodakis, DiracNets, 2017"
_B0 = spec_of("repvgg_b0")

_ROWS = (
    Comparison("residual_reorg_b0", "Residual Reorg", partial(residual_reorg, _B0), _PAPER),
    Comparison("diracnet18", "DiracNet-18", partial(dirac_net, (2, 2, 2, 2)), _DIRAC),
    Comparison("diracnet34", "DiracNet-34", partial(dirac_net, (3, 4, 6, 3)), _DIRAC),
    Comparison(
        "plain_b0_delta_orthogonal",
        "plain, delta-orthogonal",
        partial(plain_net, _B0, nn.Tanh, delta_orthogonal_),
        "Xiao et al., Dynamical isometry and a mean field theory of CNNs, ICML 2018",
    ),
    Comparison(
        "plain_b0_leaky",
        "plain, leaky ReLU (with max-norm)",
        partial(plain_net, _B0, partial(nn.LeakyReLU, _SLOPE), _kaiming),
        "Oyedotun et al., Going deeper with neural networks without skip connections, ICIP 2020",
    ),
    Comparison("resnet50_repvgg", "ResNet-50 of RepVGG blocks", resnet50_repvgg, _PAPER),
)

#: Every row by its name.
COMPARISONS: dict[str, Comparison] = {row.name: row for row in _ROWS}


def create_comparison(name: str, num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build a network that RepVGG is compared with, freshly initialized, in training mode.

    Raises:
        UnknownModelError: no row has that name; the text lists the names that are closest, or all of them.
        UsageError: a count below 1, or channels that the row does not take.
    """
    require_counts(num_classes, in_channels)
    if name not in COMPARISONS:
        known = did_you_mean(name, COMPARISONS, f"known are {', '.join(COMPARISONS)}.")
        raise UnknownModelError(f"There is no network {name!r} to compare with: {known}")
    return COMPARISONS[name].make(num_classes, in_channels)
