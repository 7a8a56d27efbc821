"""PSPNet (Zhao et al., CVPR 2017) over any backbone: pyramid pooling and a head for semantic segmentation."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg.blocks import ConvBN
from repvgg.models.repvgg import RepVGG, TrainingOutput, require_counts
from repvgg.models.spec import PSPNetSpec


class Backbone(Protocol):
    """What a PSPNet needs of its backbone, besides being an ``nn.Module``."""

    channels: tuple[int, ...]  # of the feature maps

    def features(self, x: Tensor) -> list[Tensor]:
        """Return feature maps of images (N, C, H, W), finest first; the last two feed the two heads."""


class PSPNet(nn.Module):
    """A dilated backbone, pyramid pooling and a head: per-pixel logits (N, num_classes, H, W) of images (N, C, H, W).

    ``logits = up(W2 · drop(relu(BN(W1 ∗ [f, up(p_1), …, up(p_6)]))))`` with ``p_b = relu(BN(Wb · pool_b(f)))`` and f
    the last feature map of the backbone; ``up`` interpolates bilinearly between the centres of the corner pixels
    (``align_corners=True``). Any image size works; sizes of 8k + 1 pixels keep the corners of image and feature map
    aligned. In training mode the output is a :class:`TrainingOutput` whose auxiliary logits (N, num_classes, H, W) come
    from the feature map before the last. The plain form has no auxiliary head and no batch norm.

    Args:
        spec: the sizes.
        backbone: with ``features()`` and ``channels``, in the form that ``plain`` says; dilated by the caller.
        num_classes: number of logits of a pixel.
        plain: build the heads of the plain form.

    Raises:
        UsageError: ``num_classes`` is below 1.
    """

    def __init__(self, spec: PSPNetSpec, backbone: nn.Module, num_classes: int, plain: bool = False) -> None:
        super().__init__()
        channels: tuple[int, ...] = backbone.channels  # type: ignore[assignment]  # nn.Module types attributes as tensors
        require_counts(num_classes, 1)
        self.spec = spec
        self.backbone = backbone
        self.pyramid = PyramidPooling(channels[-1], spec.bins, plain)
        self.head = _head(self.pyramid.out_channels, spec.head_channels, num_classes, spec.dropout, plain)
        # None in the plain form, which therefore has no keys for it.
        self.auxiliary = (
            None if plain else _head(channels[-2], spec.auxiliary_channels, num_classes, spec.dropout, plain)
        )

    @property
    def num_classes(self) -> int:
        classifier = self.head.get_submodule("classifier")
        assert isinstance(classifier, nn.Conv2d)
        return classifier.out_channels

    @property
    def in_channels(self) -> int:
        """Channels of the images, those of the first convolution."""
        return next(module.in_channels for module in self.backbone.modules() if isinstance(module, nn.Conv2d))

    def forward(self, x: Tensor) -> Tensor | TrainingOutput:
        """Return per-pixel logits of images (N, in_channels, H, W); see the class for training mode."""
        *_, before, last = self.backbone.features(x)  # type: ignore[operator]
        logits = _resize(self.head(self.pyramid(last)), x)
        if self.training and self.auxiliary is not None:
            return TrainingOutput(logits, (_resize(self.auxiliary(before), x),))
        return logits

    def replace_classifier(self, num_classes: int) -> None:
        """Replace the last convolution of both heads by new ones for another number of classes."""
        require_counts(num_classes, 1)
        for head in (self.head, self.auxiliary):
            if head is not None:
                old = head.get_submodule("classifier")
                assert isinstance(old, nn.Conv2d)
                head.set_submodule("classifier", nn.Conv2d(old.in_channels, num_classes, 1))


class PyramidPooling(nn.Module):
    """Append the averages over grids of ``bins`` x ``bins`` cells to a feature map, C → 2C channels.

    Each grid is reduced to ``C / len(bins)`` channels by a 1x1 convolution, batch norm and ReLU, and interpolated to
    the size of the map (Zhao et al., CVPR 2017, §3.2 and Fig. 3).
    """

    def __init__(self, channels: int, bins: tuple[int, ...], plain: bool) -> None:
        super().__init__()
        width = channels // len(bins)
        self.out_channels = channels + len(bins) * width
        self.grids = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    pool=nn.AdaptiveAvgPool2d(size),
                    conv=_conv_bn(channels, width, 1, plain, BatchNormOfFewValues(width)),
                    relu=nn.ReLU(),
                )
            )
            for size in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(_resize(grid(x), x) for grid in self.grids)], 1)


class BatchNormOfFewValues(nn.BatchNorm2d):
    """A batch norm that also trains on a single value per channel, which has no variance.

    Such a batch, one image in the 1 x 1 grid, is normalized by the running statistics, which it leaves as they are;
    ``nn.BatchNorm2d`` raises. All other batches are treated as there.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.BatchNorm2d uses
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


#: A model of the registry that checkpoints hold.
Model: TypeAlias = RepVGG | PSPNet


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


def _conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, plain: bool, bn: nn.BatchNorm2d | None = None
) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=plain)
    return conv if plain else ConvBN(conv, bn)


def _head(in_channels: int, channels: int, num_classes: int, dropout: float, plain: bool) -> nn.Sequential:
    layers: OrderedDict[str, Any] = OrderedDict(
        conv=_conv_bn(in_channels, channels, 3, plain),
        relu=nn.ReLU(),
        dropout=nn.Dropout2d(dropout),
        classifier=nn.Conv2d(channels, num_classes, 1),
    )
    return nn.Sequential(layers)
