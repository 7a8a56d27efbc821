"""Networks that the paper compares RepVGG with (§4.2) and that no library provides: builders and initializations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from repvgg.blocks import BLOCKS, ConvBN, DiracConv2d, Geometry
from repvgg.errors import SourceError, UsageError
from repvgg.models.sources import build_torchvision
from repvgg.models.spec import ModelSpec


class StagedNet(nn.Module):
    """A stem, stages, a global average pool and a linear classifier: logits (N, num_classes) of images (N, C, H, W)."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], width: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


class ResidualBlock(nn.Module):
    """``y = relu(BN(W2 ∗ relu(BN(W1 ∗ x))) + S(x))``, the basic block of ResNet-18 (He et al., CVPR 2016, Fig. 2).

    The shortcut S is the identity where the shapes match, and otherwise a 1x1 convolution with the stride of the block
    and its batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvBN(Geometry.square(in_channels, out_channels, stride).conv())
        self.act = nn.ReLU()
        self.second = ConvBN(Geometry.square(out_channels, out_channels).conv())
        shortcut = Geometry.square(in_channels, out_channels, stride, kernel_size=1)
        self.shortcut = nn.Identity() if shortcut.keeps_shape else ConvBN(shortcut.conv())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.second(self.act(self.first(x))) + self.shortcut(x))
        return out


def residual_reorg(spec: ModelSpec, num_classes: int = 1000, in_channels: int = 3) -> StagedNet:
    """Arrange the layers of a RepVGG in residual blocks of two, as in ResNet-18 (paper §4.2, "Residual Reorg").

    A stage with an even number of layers becomes half as many residual blocks; with an odd number, its first layer
    stays outside. RepVGG-B0 becomes one layer, 2, 3 and 8 blocks, and one layer.

    Raises:
        UsageError: the specification has groups or gates.
    """
    _require_no_groups_or_gates(spec)
    widths = [spec.stem.channels, *(stage.channels for stage in spec.stages)]
    stages: list[nn.Module] = []
    for (in_width, width), stage in zip(pairwise(widths), spec.stages, strict=True):
        has_single, num_blocks = stage.depth % 2, stage.depth // 2
        layers: list[nn.Module] = [_conv_bn_relu(in_width, width, stage.stride)] if has_single else []
        for index in range(num_blocks):
            # The first layer of a stage carries its stride and changes the width, alone or in a residual block.
            is_first = index == 0 and not has_single
            layers.append(ResidualBlock(in_width if is_first else width, width, stage.stride if is_first else 1))
        stages.append(nn.Sequential(*layers))
    return StagedNet(_conv_bn_relu(in_channels, widths[0], spec.stem.stride), stages, widths[-1], num_classes)


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ConvBN(Geometry.square(in_channels, out_channels, stride).conv()), nn.ReLU())


def _require_no_groups_or_gates(spec: ModelSpec) -> None:
    if spec.groups != 1 or spec.squeeze_excite:
        raise UsageError(f"{spec.name} has groups or gates, which this network does not support: choose another model.")


def dirac_net(depths: tuple[int, ...], num_classes: int = 1000, in_channels: int = 3) -> StagedNet:
    """Build DiracNet for ImageNet: a ResNet without shortcuts, each kernel an identity plus a learned part.

    7x7 of stride 2 and max-pool; four stages of 64, 128, 256 and 512 channels with two layers for each of ``depths``,
    each :class:`repvgg.blocks.DiracConv2d`, BN and ReLU; max-pool 2x2 between stages. Collapsed, it has as many
    parameters as the folded weights that its authors publish.

    Source: Zagoruyko and Komodakis, DiracNets, arXiv:1706.00388, version 2, §4.2, and the authors' code.
    """
    stem = nn.Sequential(
        ConvBN(Geometry.square(in_channels, 64, 2, kernel_size=7).conv()), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    width, stages = 64, list[nn.Module]()
    for index, depth in enumerate(depths):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
        for _ in range(2 * depth):
            geometry = Geometry.square(width, 64 << index)
            layers += [DiracConv2d(geometry), nn.BatchNorm2d(geometry.out_channels), nn.ReLU()]
            width = geometry.out_channels
        stages.append(nn.Sequential(*layers))
    return StagedNet(stem, stages, width, num_classes)


def plain_net(
    spec: ModelSpec,
    act: Callable[[], nn.Module],
    start: Callable[[Tensor], object],
    num_classes: int = 1000,
    in_channels: int = 3,
) -> StagedNet:
    """Build a RepVGG's plain form with another activation and an initialization that makes it trainable without BN.

    Args:
        spec: depths, widths and strides.
        act: creates the activation after each convolution.
        start: initializes each kernel (O, I, 3, 3) in place; biases start at 0.
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        UsageError: the specification has groups or gates.
    """
    _require_no_groups_or_gates(spec)

    def layers() -> Iterator[nn.Module]:
        width = in_channels
        for stage in (spec.stem, *spec.stages):
            for index in range(stage.depth):
                conv = nn.Conv2d(width, stage.channels, 3, 1 if index else stage.stride, 1)
                start(conv.weight)
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # it has a bias
                yield nn.Sequential(conv, act())
                width = stage.channels

    in_order = layers()
    stem = next(in_order)
    stages: list[nn.Module] = [nn.Sequential(*(next(in_order) for _ in range(stage.depth))) for stage in spec.stages]
    return StagedNet(stem, stages, spec.stages[-1].channels, num_classes)


def resnet50_repvgg(num_classes: int = 1000, in_channels: int = 3) -> nn.Module:
    """Build a ResNet-50 with RepVGG's three branches in place of each 3x3 convolution and its BN (paper §4.2).

    The paper reports 76.34 % for it and 76.31 % for ResNet-50: the branches do not strengthen every network. Strides
    are those of the paper's baseline: its 3.9 GFLOPs (Table 4) are those of a ResNet-50 whose first 1x1 convolutions
    have the stride, not of torchvision's, where the 3x3 ones have it. So all 16 blocks have an identity branch.

    Raises:
        UsageError: ``in_channels`` is not 3, the only number that torchvision's builder supports.
    """
    if in_channels != 3:
        raise UsageError(f"ResNet-50 takes images of 3 channels, not {in_channels}.")
    model = build_torchvision("resnet50", num_classes).model
    move_strides_to_first_conv(model, "torchvision:resnet50")
    for module in model.modules():
        conv = dict(module.named_children()).get("conv2")
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            module.register_module("conv2", BLOCKS["repvgg"].make(Geometry.of(conv)))
            # The branches have their own batch norms; the attribute stays because Bottleneck.forward calls it.
            module.register_module("bn2", nn.Identity())
    return model


def move_strides_to_first_conv(model: nn.Module, source: str) -> None:
    """Move the stride of each bottleneck from its 3x3 convolution to its first 1x1, as originally published.

    Libraries today build "v1.5", with the stride in the 3x3. Parameters and tensor names are the same.

    Args:
        model: a ResNet whose bottlenecks are named ``conv1``, ``conv2``, ``conv3``; changed in place.
        source: of the model, for the message.

    Raises:
        SourceError: the model has no such bottleneck with a stride in ``conv2``.
    """
    moved = 0
    for module in model.modules():
        layers = dict(module.named_children())
        if {"conv1", "conv2", "conv3"} <= layers.keys():
            first, second = layers["conv1"], layers["conv2"]
            assert isinstance(first, nn.Conv2d)
            assert isinstance(second, nn.Conv2d)
            moved += first.stride != second.stride
            first.stride, second.stride = second.stride, first.stride
    if not moved:
        raise SourceError(
            f"{source} has no bottleneck whose stride could be moved to its first convolution: another version of the "
            "library is needed."
        )


@torch.no_grad()
def delta_orthogonal_(weight_OIHW: Tensor, gain: float = 1.0) -> Tensor:
    """Fill a kernel with zeros, and its centre with a matrix of orthonormal columns times ``gain``, in place.

    With at least as many output as input channels and stride 1, the convolution multiplies the norm of its input by the
    gain: ``‖K ∗ x‖ = gain · ‖x‖``. At gain 1, signals keep their norm through any number of layers.

    Args:
        weight_OIHW: kernel of a convolution without groups, or of one group; height and width are odd.
        gain: the common singular value.

    Returns:
        The kernel.

    Source: Xiao et al., Dynamical isometry and a mean field theory of CNNs, ICML 2018, §2.3 and Alg. 1.
    """
    height, width = weight_OIHW.shape[2:]
    centre = torch.empty_like(weight_OIHW[:, :, 0, 0])
    weight_OIHW.zero_()
    weight_OIHW[:, :, height // 2, width // 2] = nn.init.orthogonal_(centre, gain)
    return weight_OIHW


@torch.no_grad()
def max_norm_(model: nn.Module, limit: float) -> nn.Module:
    """Shrink each filter of each convolution to ``w · min(1, limit / ‖w‖₂)``, in place; call it after each step.

    For example ``optimizer.register_step_post_hook(lambda *_: max_norm_(model, 2.0))``.

    Args:
        model: all of its ``nn.Conv2d`` are bounded.
        limit: the largest norm of a filter, above 0.

    Returns:
        The model.

    Source: Srebro and Shraibman, Rank, trace-norm and max-norm, COLT 2005; used for plain networks by Oyedotun et al.,
    Going deeper with neural networks without skip connections, ICIP 2020.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # tiny: an all-zero filter stays zero instead of becoming NaN.
            norms = module.weight.flatten(1).norm(dim=1).clamp_min(torch.finfo(module.weight.dtype).tiny)
            module.weight.mul_((limit / norms).clamp_max(1).view(-1, 1, 1, 1))
    return model
