"""The networks that RepVGG is compared with: one frozen row each, built by the library that has the paper's model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from repvgg.errors import SourceError, UnknownModelError, did_you_mean
from repvgg.models.sources import resolve

_RESNET = "He et al., Deep residual learning for image recognition, CVPR 2016"
_RESNEXT = "Xie et al., Aggregated residual transformations for deep neural networks, CVPR 2017"
_VGG = "Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, ICLR 2015"
_EFFICIENTNET = "Tan and Le, EfficientNet, ICML 2019"
_REGNET = "Radosavovic et al., Designing network design spaces, CVPR 2020"
_SHUFFLENET = "Ma et al., ShuffleNet V2, ECCV 2018"
_MOBILENET_V2 = "Sandler et al., MobileNetV2, CVPR 2018"
_MOBILENET_V3 = "Howard et al., Searching for MobileNetV3, ICCV 2019"
_MOBILEONE = "Vasu et al., MobileOne, CVPR 2023"


@dataclass(frozen=True)
class Baseline:
    """One row of the table.

    Attributes:
        name: what :func:`create_baseline` calls it.
        title: as papers print it.
        source: where it is built, as :func:`repvgg.models.resolve` reads it. Nothing is imported before that.
        origin: who published it.
        input_size: height and width in pixels that it is compared at; others work.
        stride_in_1x1: the first 1x1 convolution of a bottleneck carries its stride, as published; libraries of today
            move it to the 3x3. Parameters and names of tensors are the same.
        note: why this source, or what is easily mistaken; empty where there is nothing to say.
    """

    name: str
    title: str
    source: str
    origin: str
    input_size: int = 224
    stride_in_1x1: bool = False
    note: str = ""


_V1 = "FLOPs of the paper's Table 4 are those of the published strides; torchvision's are 'v1.5'"
_V15 = "the stride of a bottleneck is in its 3x3 ('v1.5'), as torchvision builds it"
_ONLY_TIMM = "torchvision has no such width"
_ONLY_TIMM_FAMILY = "torchvision has no MobileOne"

_ROWS = (
    Baseline("resnet18", "ResNet-18", "torchvision:resnet18", _RESNET),
    Baseline("resnet34", "ResNet-34", "torchvision:resnet34", _RESNET),
    Baseline("resnet50", "ResNet-50", "torchvision:resnet50", _RESNET, stride_in_1x1=True, note=_V1),
    Baseline("resnet101", "ResNet-101", "torchvision:resnet101", _RESNET, stride_in_1x1=True, note=_V1),
    Baseline("resnet152", "ResNet-152", "torchvision:resnet152", _RESNET, stride_in_1x1=True, note=_V1),
    Baseline("resnet50_v1_5", "ResNet-50 v1.5", "torchvision:resnet50", _RESNET, note=_V15),
    Baseline("resnet101_v1_5", "ResNet-101 v1.5", "torchvision:resnet101", _RESNET, note=_V15),
    Baseline("resnet152_v1_5", "ResNet-152 v1.5", "torchvision:resnet152", _RESNET, note=_V15),
    Baseline("resnext50_32x4d", "ResNeXt-50", "torchvision:resnext50_32x4d", _RESNEXT),
    Baseline("resnext101_32x4d", "ResNeXt-101", "timm:resnext101_32x4d", _RESNEXT, note=_ONLY_TIMM),
    Baseline("vgg16", "VGG-16 without BN", "torchvision:vgg16", _VGG),
    Baseline(
        "vgg16_bn",
        "VGG-16",
        "torchvision:vgg16_bn",
        _VGG,
        note="the paper trains VGG-16 with BN (§3.2); folded, it is the architecture of the one without",
    ),
    Baseline("efficientnet_b0", "EfficientNet-B0", "torchvision:efficientnet_b0", _EFFICIENTNET),
    Baseline("efficientnet_b3", "EfficientNet-B3", "torchvision:efficientnet_b3", _EFFICIENTNET, input_size=300),
    Baseline("regnetx_3_2gf", "RegNetX-3.2GF", "torchvision:regnet_x_3_2gf", _REGNET),
    Baseline("regnetx_12gf", "RegNetX-12GF", "timm:regnetx_120", _REGNET, note=_ONLY_TIMM),
    Baseline("shufflenet_v2_x0_5", "ShuffleNetV2 0.5x", "torchvision:shufflenet_v2_x0_5", _SHUFFLENET),
    Baseline("shufflenet_v2_x1_0", "ShuffleNetV2 1.0x", "torchvision:shufflenet_v2_x1_0", _SHUFFLENET),
    Baseline("shufflenet_v2_x2_0", "ShuffleNetV2 2.0x", "torchvision:shufflenet_v2_x2_0", _SHUFFLENET),
    Baseline("mobilenet_v2", "MobileNetV2", "torchvision:mobilenet_v2", _MOBILENET_V2),
    Baseline("mobilenet_v3_large", "MobileNetV3-Large", "torchvision:mobilenet_v3_large", _MOBILENET_V3),
    *(
        Baseline(
            f"mobileone_s{size}", f"MobileOne-S{size}", f"timm:mobileone_s{size}", _MOBILEONE, note=_ONLY_TIMM_FAMILY
        )
        for size in range(5)
    ),
)

#: Every row by its name, in the order of the families.
BASELINES: dict[str, Baseline] = {row.name: row for row in _ROWS}


def list_baselines() -> list[str]:
    """The names of all rows of the table, in its order."""
    return list(BASELINES)


def baseline_of(name: str) -> Baseline:
    """The row called ``name``.

    Raises:
        UnknownModelError: there is none; the text lists the names that are closest, or all of them.
    """
    if name in BASELINES:
        return BASELINES[name]
    known = did_you_mean(name, BASELINES, f"known are {', '.join(BASELINES)}.")
    raise UnknownModelError(f"There is no baseline {name!r}: {known}")


def create_baseline(name: str, num_classes: int = 1000, *, values: bool = True) -> nn.Module:
    """Build a baseline with random weights, in the form that it is trained in.

    Args:
        name: a name from :func:`list_baselines`.
        num_classes: number of logits, at least 1.
        values: False builds it on the meta device, for counting; see :func:`repvgg.models.resolve`.

    Returns:
        The model in training mode, as every new module is: call ``eval()`` before you predict, fold or measure. The
        paper folds batch norms of the baselines before it measures them (§4.1): see :func:`repvgg.fold_batch_norms`.

    Raises:
        UnknownModelError: no row has that name.
        UsageError: ``num_classes`` below 1.
        MissingDependencyError: the row is built by timm, which is not installed.
        SourceError: the library that is installed builds another network under that name.
    """
    row = baseline_of(name)
    model = resolve(row.source, num_classes=num_classes, values=values).model.train()
    if row.stride_in_1x1:
        _move_strides(model, row)
    return model


def _move_strides(model: nn.Module, row: Baseline) -> None:
    """Swap the strides of the first 1x1 and of the 3x3 of each bottleneck."""
    parts = [dict(block.named_children()) for block in model.modules()]
    moved = 0
    for first, second in [
        (part["conv1"], part["conv2"]) for part in parts if {"conv1", "conv2", "conv3"} <= part.keys()
    ]:
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        moved += first.stride != second.stride
        first.stride, second.stride = second.stride, first.stride
    if not moved:
        raise SourceError(
            f"{row.source} has no bottleneck whose stride could be moved: another version of it is needed."
        )
