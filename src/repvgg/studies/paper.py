"""Published numbers as data: Tables 1, 4 to 8 and Figure 1 of RepVGG (CVPR 2021), and mobile networks.

Models have the names of our architectures and baselines. Accuracies are top-1 on the validation set of ImageNet-1K, in
percent. The paper's speeds are images per second on one NVIDIA GTX 1080 Ti in float32, in batches of 128 with batch
norms folded (§4.1). One multiply-add is one FLOP (§2.4), except in the TFLOPS of Table 1. None is a dash.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpeed:
    """A row of Table 1: one convolution with batch 32, 2048 channels in and out, 56x56, stride 1."""

    kernel: int  # height and width
    flops_billions: float
    milliseconds: float  # of one call
    tflops: float  # 10¹² operations a second; a multiply-add is two of them


@dataclass(frozen=True)
class PrintedModel:
    """A row of Table 4 or 5; parameters are truncated to two decimals in nearly all rows."""

    model: str
    top1_percent: float
    images_per_second: float
    params_millions: float
    flops_billions: float  # for one image
    winograd_muls_billions: float | None  # multiplications where F(2x2, 3x3) is used (§2.4)


@dataclass(frozen=True)
class PublishedModel:
    """Numbers that the authors of a mobile network publish, and where."""

    model: str
    top1_percent: float
    params_millions: float
    flops_billions: float
    source: str


@dataclass(frozen=True)
class PrintedAblation:
    """A row of Table 6, on RepVGG-B0 trained for 120 epochs: which branches blocks have, and the train form's speed."""

    identity: bool
    pointwise: bool
    top1_percent: float
    images_per_second: float


@dataclass(frozen=True)
class PrintedVariant:
    """A row of Table 7, on RepVGG-B0 trained for 120 epochs."""

    name: str  # of our block; for Residual Reorg, which no block implements, of our network
    title: str  # as printed
    top1_percent: float


@dataclass(frozen=True)
class PrintedSegmentation:
    """A row of Table 8: a PSPNet on the validation set of Cityscapes.

    The speed is that of images of 713x713 pixels in batches of 16, in float32 on a GTX 1080 Ti.
    """

    backbone: str  # name of an architecture or a baseline
    is_fast: bool  # dilation in five layers only
    miou_percent: float
    pixel_accuracy_percent: float
    images_per_second: float


@dataclass(frozen=True)
class FigurePoint:
    """A point of Figure 1; training took 120 epochs in the left panel, 200 in the right one."""

    model: str
    images_per_second: float
    top1_percent: float
    epochs: int


TABLE_1 = (
    KernelSpeed(1, 420.9, 84.5, 9.96),
    KernelSpeed(3, 3788.1, 198.8, 38.10),
    KernelSpeed(5, 10522.6, 2092.5, 10.57),  # as printed; 10.06 follows from the other columns
    KernelSpeed(7, 20624.4, 4394.3, 9.38),
)
TABLE_1_BATCH, TABLE_1_CHANNELS, TABLE_1_SIZE = 32, 2048, 56

TABLE_4 = (
    PrintedModel("repvgg_a0", 72.41, 3256, 8.30, 1.4, 0.7),
    PrintedModel("resnet18", 71.16, 2442, 11.68, 1.8, 1.0),
    PrintedModel("repvgg_a1", 74.46, 2339, 12.78, 2.4, 1.3),
    PrintedModel("repvgg_b0", 75.14, 1817, 14.33, 3.1, 1.6),
    PrintedModel("resnet34", 74.17, 1419, 21.78, 3.7, 1.8),
    PrintedModel("repvgg_a2", 76.48, 1322, 25.49, 5.1, 2.7),
    PrintedModel("repvgg_b1g4", 77.58, 868, 36.12, 7.3, 3.9),
    PrintedModel("efficientnet_b0", 75.11, 829, 5.26, 0.4, None),  # its 3x3 kernels are depthwise: no Winograd
    PrintedModel("repvgg_b1g2", 77.78, 792, 41.36, 8.8, 4.6),
    PrintedModel("resnet50", 76.31, 719, 25.53, 3.9, 2.8),
    PrintedModel("repvgg_b1", 78.37, 685, 51.82, 11.8, 5.9),
    PrintedModel("regnetx_3_2gf", 77.98, 671, 15.26, 3.2, 2.9),
    PrintedModel("repvgg_b2g4", 78.50, 581, 55.77, 11.3, 6.0),
    PrintedModel("resnext50_32x4d", 77.46, 484, 24.99, 4.2, 4.1),
    PrintedModel("repvgg_b2", 78.78, 460, 80.31, 18.4, 9.1),
    PrintedModel("resnet101", 77.21, 430, 44.49, 7.6, 5.5),
    PrintedModel("vgg16_bn", 72.21, 415, 138.35, 15.5, 6.9),
    PrintedModel("resnet152", 77.78, 297, 60.11, 11.3, 8.1),
    PrintedModel("resnext101_32x4d", 78.42, 295, 44.10, 8.0, 7.9),
)

TABLE_5 = (
    PrintedModel("repvgg_b2g4", 79.38, 581, 55.77, 11.3, 6.0),  # also in Table 4, after a shorter training
    PrintedModel("repvgg_b3g4", 80.21, 464, 75.62, 16.1, 8.4),
    PrintedModel("repvgg_b3", 80.52, 363, 110.96, 26.2, 12.9),
    PrintedModel("regnetx_12gf", 80.55, 277, 46.05, 12.1, 10.9),
    PrintedModel("efficientnet_b3", 79.31, 224, 12.19, 1.8, None),  # on images of 300x300
)

TABLE_6 = (
    PrintedAblation(identity=False, pointwise=False, top1_percent=72.39, images_per_second=1810),
    PrintedAblation(identity=True, pointwise=False, top1_percent=74.79, images_per_second=1569),
    PrintedAblation(identity=False, pointwise=True, top1_percent=73.15, images_per_second=1230),
    PrintedAblation(identity=True, pointwise=True, top1_percent=75.14, images_per_second=1061),
)

TABLE_7 = (
    PrintedVariant("repvgg_identity_without_bn", "Identity w/o BN", 74.18),
    PrintedVariant("repvgg_post_bn", "Post-addition BN", 73.52),
    PrintedVariant("repvgg", "Full-featured reparam", 75.14),
    PrintedVariant("repvgg_relu", "+ReLU in branch", 75.69),
    PrintedVariant("dirac", "DiracNet", 73.97),
    PrintedVariant("trivial", "Trivial Re-param", 73.51),
    PrintedVariant("acb", "ACB", 73.58),
    PrintedVariant("residual_reorg", "Residual Reorg", 74.56),
)

TABLE_8 = (
    PrintedSegmentation("repvgg_b1g2", True, 78.88, 96.19, 10.9),
    PrintedSegmentation("resnet50", False, 77.17, 95.99, 10.4),
    PrintedSegmentation("repvgg_b1g2", False, 78.70, 96.27, 8.0),
    PrintedSegmentation("repvgg_b2", True, 79.52, 96.36, 6.9),
    PrintedSegmentation("resnet101", False, 78.51, 96.30, 6.7),
    PrintedSegmentation("repvgg_b2", False, 80.57, 96.50, 4.5),
)
TABLE_8_BATCH, TABLE_8_SIZE = 16, 713

#: The speeds that the paper compares in §4.1, each a RepVGG with another network; ratios follow from the tables.
SPEED_CLAIMS = (
    ("repvgg_a0", "resnet18"),  # "33% better"
    ("repvgg_a1", "resnet34"),  # "64%"
    ("repvgg_a2", "resnet50"),  # "83%"
    ("repvgg_b1g4", "resnet101"),  # "101%"
    ("repvgg_b1g2", "resnet152"),  # "2.66x as fast"
    ("repvgg_b2", "vgg16_bn"),  # "runs 10% faster"
    ("repvgg_a2", "efficientnet_b0"),  # "59% better"
    ("repvgg_b1", "regnetx_3_2gf"),  # "runs slightly faster"
    ("repvgg_b3", "regnetx_12gf"),  # "runs 31% faster"
)

#: The figure prints no numbers at its points; they are the rows of Tables 4 (left panel) and 5 (right panel).
FIGURE_1 = tuple(
    FigurePoint(row.model, row.images_per_second, row.top1_percent, epochs)
    for epochs, table in ((120, TABLE_4), (200, TABLE_5))
    for row in table
)

_MOBILE_REPVGGS = ("repvgg_a0", "repvgg_a1", "repvgg_b0", "repvgg_a2")
_SHUFFLENET = "Ma et al., ECCV 2018"
_MOBILEONE = "Vasu et al., CVPR 2023"

MOBILE_MODELS = (
    *(
        PublishedModel(row.model, row.top1_percent, row.params_millions, row.flops_billions, "RepVGG, Table 4")
        for row in TABLE_4
        if row.model in _MOBILE_REPVGGS
    ),
    # 1x1 and depthwise convolutions: few multiply-adds, many bytes for each.
    PublishedModel("shufflenet_v2_x0_5", 60.3, 1.4, 0.041, _SHUFFLENET),
    PublishedModel("shufflenet_v2_x1_0", 69.4, 2.3, 0.146, _SHUFFLENET),
    PublishedModel("shufflenet_v2_x2_0", 74.9, 7.4, 0.591, _SHUFFLENET),
    PublishedModel("mobilenet_v2", 72.0, 3.4, 0.300, "Sandler et al., CVPR 2018"),
    PublishedModel("mobilenet_v3_large", 75.2, 5.4, 0.219, "Howard et al., ICCV 2019"),
    PublishedModel("mobileone_s0", 71.4, 2.1, 0.275, _MOBILEONE),
    PublishedModel("mobileone_s1", 75.9, 4.8, 0.825, _MOBILEONE),
    PublishedModel("mobileone_s2", 77.4, 7.8, 1.299, _MOBILEONE),
    PublishedModel("mobileone_s3", 78.1, 10.1, 1.896, _MOBILEONE),
    PublishedModel("mobileone_s4", 79.4, 14.8, 2.978, _MOBILEONE),
)
