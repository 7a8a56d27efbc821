"""The printed numbers of RepVGG (CVPR 2021) as data: Tables 1, 4, 5, 6 and 7, and Figure 1.

Models have the names of our architectures and baselines. Speeds are images per second on one NVIDIA GTX 1080 Ti in
float32, batches of 128, batch norms folded (§4.1). A multiply-add counts as one FLOP (§2.4). None stands
for a dash.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSpeed:
    """A row of Table 1: one convolution with batch 32, 2048 channels in and out, 56x56, stride 1.

    Attributes:
        kernel: height and width.
        flops_billions: multiply-adds, in 10⁹.
        milliseconds: of one call.
        tflops: floating point operations a second, in 10¹²; a multiply-add counts as two of them here.
    """

    kernel: int
    flops_billions: float
    milliseconds: float
    tflops: float


@dataclass(frozen=True)
class PrintedModel:
    """A row of Table 4 or 5.

    Attributes:
        model: name of an architecture or a baseline.
        top1_percent: on the validation set of ImageNet-1K.
        images_per_second: speed.
        params_millions: parameters in 10⁶, truncated to two decimals in nearly all rows.
        flops_billions: multiply-adds for one image, in 10⁹.
        winograd_muls_billions: multiplications where F(2x2, 3x3) is used (§2.4), in 10⁹.
    """

    model: str
    top1_percent: float
    images_per_second: float
    params_millions: float
    flops_billions: float
    winograd_muls_billions: float | None


@dataclass(frozen=True)
class PrintedAblation:
    """A row of Table 6, on RepVGG-B0 trained for 120 epochs.

    Attributes:
        identity: whether blocks have the identity branch.
        pointwise: whether blocks have the 1x1 branch.
        top1_percent: on the validation set of ImageNet-1K.
        images_per_second: speed of the train form, before conversion.
    """

    identity: bool
    pointwise: bool
    top1_percent: float
    images_per_second: float


@dataclass(frozen=True)
class PrintedVariant:
    """A row of Table 7, on RepVGG-B0 trained for 120 epochs.

    Attributes:
        name: of our block; for Residual Reorg, which no block makes, of our network.
        title: as printed.
        top1_percent: on the validation set of ImageNet-1K.
    """

    name: str
    title: str
    top1_percent: float


@dataclass(frozen=True)
class FigurePoint:
    """A point of Figure 1.

    Attributes:
        model: name of an architecture or a baseline.
        images_per_second: on the x axis.
        top1_percent: on the y axis.
        epochs: 120 in the left panel, 200 in the right one.
    """

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

#: The figure prints no numbers at its points: these are the rows of Tables 4 (left panel) and 5 (right panel).
FIGURE_1 = tuple(
    FigurePoint(row.model, row.images_per_second, row.top1_percent, epochs)
    for epochs, table in ((120, TABLE_4), (200, TABLE_5))
    for row in table
)
