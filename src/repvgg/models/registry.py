"""The registry of architectures: RepVGG models (paper Tables 2 and 3, and later ones), baselines, comparisons, PSPNets.

Entries are frozen data; :mod:`repvgg.models.factory` builds models from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar

from torch import Tensor, nn

from repvgg.errors import UnknownModelError, did_you_mean
from repvgg.models.dilation import DilationRule
from repvgg.models.spec import ModelSpec, PSPNetSpec, SqueezeExciteSpec, Stage
from repvgg.models.variants import delta_orthogonal_, dirac_net, plain_net, residual_reorg, resnet50_repvgg

T = TypeVar("T")

# --- RepVGG models ---------------------------------------------------------------------------------------------------


def _family(
    name: str,
    depths: tuple[int, int, int, int],
    widths: tuple[float, float, float, float],
    groups: int = 1,
    squeeze_excite: SqueezeExciteSpec | None = None,
    source: str = ModelSpec.source,
) -> ModelSpec:
    """Return a model of the ImageNet family: widths multiply [64, 128, 256, 512], the stem is min(64, 64a)."""
    channels = [int(base * width) for base, width in zip((64, 128, 256, 512), widths, strict=True)]
    stages = tuple(Stage(depth, width) for depth, width in zip(depths, channels, strict=True))
    return ModelSpec(name, Stage(1, min(64, channels[0])), stages, groups, squeeze_excite, source=source)


def _plus_l2pse() -> ModelSpec:
    # RepVGGplus splits the long third stage in two, with an auxiliary head after its first half.
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

_SPECS = (
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
        "repvgg_t0", Stage(1, 16, stride=1), (Stage(2, 32), Stage(3, 64), Stage(1, 128)), input_size=32, source=_SMALL
    ),
    ModelSpec(
        "repvgg_t1", Stage(1, 32, stride=1), (Stage(2, 64), Stage(4, 128), Stage(1, 256)), input_size=32, source=_SMALL
    ),
    ModelSpec(
        "repvgg_t2", Stage(1, 32, stride=1), (Stage(2, 96), Stage(4, 192), Stage(2, 256)), input_size=32, source=_SMALL
    ),
)

#: Specifications of all RepVGG models by name, in the order of the families.
SPECS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


# --- Baselines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """A network that RepVGG is compared with, built by the library that has the original model."""

    name: str  # the key for create_baseline()
    title: str  # the name as printed in papers
    source: str  # the library and its name for the model, for resolve(); imported on use only
    origin: str  # the publication
    input_size: int = 224  # height and width in pixels of the comparison; other sizes work
    # Whether the first 1x1 convolution of a bottleneck has its stride, as originally published. Libraries today move
    # the stride to the 3x3, which changes neither parameters nor tensor names.
    stride_in_1x1: bool = False
    note: str = ""  # why this source was chosen, or a common confusion


_RESNET = "He et al., Deep residual learning for image recognition, CVPR 2016"
_RESNEXT = "Xie et al., Aggregated residual transformations for deep neural networks, CVPR 2017"
_VGG = "Simonyan and Zisserman, Very deep convolutional networks for large-scale image recognition, ICLR 2015"
_EFFICIENTNET = "Tan and Le, EfficientNet, ICML 2019"
_REGNET = "Radosavovic et al., Designing network design spaces, CVPR 2020"
_SHUFFLENET = "Ma et al., ShuffleNet V2, ECCV 2018"
_MOBILENET_V2 = "Sandler et al., MobileNetV2, CVPR 2018"
_MOBILENET_V3 = "Howard et al., Searching for MobileNetV3, ICCV 2019"
_MOBILEONE = "Vasu et al., MobileOne, CVPR 2023"

_V1 = "the FLOPs in the paper's Table 4 are those of the published strides; torchvision builds 'v1.5'"
_V15 = "the 3x3 convolution of a bottleneck has its stride ('v1.5'), as in torchvision"
_ONLY_TIMM = "torchvision has no such width"
_ONLY_TIMM_FAMILY = "torchvision has no MobileOne"

_BASELINES = (
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
        note="the paper trains VGG-16 with BN (§3.2); with BN folded it has the architecture of the one without",
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

#: All baselines by name, in the order of the families.
BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in _BASELINES}


# --- Comparison networks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A network of the paper's comparisons that is built here, in :mod:`repvgg.models.variants`."""

    name: str  # the key for create_comparison()
    title: str  # the name as printed in papers
    make: Callable[[int, int], nn.Module]  # from the numbers of classes and of input channels; newly initialized
    origin: str  # the publication
    input_size: int = 224  # height and width in pixels of the comparison


_PAPER = "Ding et al., RepVGG, CVPR 2021, §4.2"
_DIRAC = "Zagoruyko and Komodakis, DiracNets, 2017"
_B0 = SPECS["repvgg_b0"]
_LEAKY_SLOPE = 0.01  # PyTorch's default: the publication does not state its slope


def _kaiming_leaky(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, a=_LEAKY_SLOPE)


_COMPARISONS = (
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
        partial(plain_net, _B0, partial(nn.LeakyReLU, _LEAKY_SLOPE), _kaiming_leaky),
        "Oyedotun et al., Going deeper with neural networks without skip connections, ICIP 2020",
    ),
    Comparison("resnet50_repvgg", "ResNet-50 of RepVGG blocks", resnet50_repvgg, _PAPER),
)

#: All comparison networks by name.
COMPARISONS: dict[str, Comparison] = {comparison.name: comparison for comparison in _COMPARISONS}


# --- Segmentation ----------------------------------------------------------------------------------------------------

CITYSCAPES_CLASSES = 19  # the data set of the paper's §4.3

#: ResNet backbones of segmentation models: names of baselines, which torchvision builds.
RESNETS = ("resnet18", "resnet50", "resnet101")
_SMALL_PSPNET = "made here for small data sets"
_PSPNET_DILATIONS: tuple[tuple[str, DilationRule], ...] = (("", "paper"), ("_fast", "fast"))
_PSPNET_BACKBONES = ("a0", "a1", "a2", "b0", "b1g2", "b1", "b2")

_PSPNETS = (
    *(
        PSPNetSpec(f"pspnet_repvgg_{size}{suffix}", f"repvgg_{size}", dilation)
        for size in _PSPNET_BACKBONES
        for suffix, dilation in _PSPNET_DILATIONS
    ),
    *(PSPNetSpec(f"pspnet_{resnet}", resnet) for resnet in RESNETS),
    # For small data sets and few cores: a quarter of the arithmetic of output stride 8, and half of the head.
    *(
        PSPNetSpec(
            f"pspnet_small_{backbone}",
            backbone,
            output_stride=16,
            head_channels=256,
            input_size=241,
            source=_SMALL_PSPNET,
        )
        for backbone in ("repvgg_a0", "resnet18")
    ),
)

#: Specifications of all segmentation models by name.
PSPNETS: dict[str, PSPNetSpec] = {spec.name: spec for spec in _PSPNETS}


# --- Lookup ----------------------------------------------------------------------------------------------------------

Architecture: TypeAlias = ModelSpec | Baseline | Comparison | PSPNetSpec

#: All architectures by name. Names are unique across the groups.
ARCHITECTURES: dict[str, Architecture] = {**SPECS, **BASELINES, **COMPARISONS, **PSPNETS}


def list_models() -> list[str]:
    """Return the names of all RepVGG models."""
    return list(SPECS)


def list_segmentation_models() -> list[str]:
    """Return the names of all segmentation models."""
    return list(PSPNETS)


def list_baselines() -> list[str]:
    """Return the names of all baselines."""
    return list(BASELINES)


def spec_of(name: str) -> ModelSpec:
    """Look up the specification of a RepVGG model.

    Raises:
        UnknownModelError: there is no such model; the text suggests the closest names, or lists all of them.
    """
    return _look_up(name, SPECS, "model")


def pspnet_spec_of(name: str) -> PSPNetSpec:
    """Look up the specification of a segmentation model.

    Raises:
        UnknownModelError: there is no such model; the text suggests the closest names, or lists all of them.
    """
    return _look_up(name, PSPNETS, "segmentation model")


def baseline_of(name: str) -> Baseline:
    """Look up a baseline.

    Raises:
        UnknownModelError: there is no such baseline; the text suggests the closest names, or lists all of them.
    """
    return _look_up(name, BASELINES, "baseline")


def comparison_of(name: str) -> Comparison:
    """Look up a comparison network.

    Raises:
        UnknownModelError: there is no such network; the text suggests the closest names, or lists all of them.
    """
    return _look_up(name, COMPARISONS, "comparison network")


def _look_up(name: str, table: Mapping[str, T], kind: str) -> T:
    if name in table:
        return table[name]
    suggestion = did_you_mean(name, table, f"known are {', '.join(table)}.")
    raise UnknownModelError(f"There is no {kind} {name!r}: {suggestion}")
