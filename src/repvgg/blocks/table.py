"""The table of blocks: one row each, made for the geometry of the convolution that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from repvgg.blocks.basic import ConvBN
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.constant_scale import ConstantScaleSum
from repvgg.blocks.diverse import diverse
from repvgg.blocks.encoded import DiracConv2d, IdentityConv2d
from repvgg.blocks.geometry import Geometry
from repvgg.blocks.large import dilated_kernels, large_kernel
from repvgg.blocks.mixer import RepMixer
from repvgg.blocks.online import OnlineConv2d
from repvgg.blocks.overparameterized import DOConv2d, expand_kernel, expand_layers
from repvgg.blocks.repvgg import Branch, Switches, branches_of, summed
from repvgg.blocks.strips import asymmetric
from repvgg.errors import UsageError, did_you_mean

MakeModule = Callable[[Geometry], nn.Module]

_PAPER = "Ding et al., RepVGG, CVPR 2021"
_QA = "Chu et al., Make RepVGG greater again, AAAI 2024"
_YOLO = "Li et al., YOLOv6 v3.0, 2023, after Chu et al."
_DIRAC = "Zagoruyko and Komodakis, DiracNets, 2017"
_EXPAND = "Guo et al., ExpandNets, NeurIPS 2020"


@dataclass(frozen=True)
class BlockRow:
    """One row of the table.

    Attributes:
        name: what :func:`create_block` calls it.
        title: as papers print it.
        make: from a geometry to a fresh block.
        formula: what it computes; N is a batch norm, W a kernel.
        source: who published it.
        is_linear: whether one convolution equals it in eval mode.
    """

    name: str
    title: str
    make: MakeModule
    formula: str
    source: str
    is_linear: bool = True


def _switched(name: str, title: str, switches: Switches, formula: str, source: str = _PAPER) -> BlockRow:
    return BlockRow(name, title, partial(branches_of, switches=switches), formula, source, not switches.relu)


def _normed(layers: MakeModule) -> MakeModule:
    """A convolution, or a chain of them, and the batch norm behind it."""

    def make(geometry: Geometry) -> nn.Module:
        return nn.Sequential(layers(geometry), nn.BatchNorm2d(geometry.out_channels))

    return make


def _conv_bn(geometry: Geometry) -> nn.Module:
    return ConvBN(geometry.conv())


def _constant_scale(geometry: Geometry) -> nn.Module:
    return summed(BranchSum({"scaled": ConstantScaleSum(geometry)}), geometry)


_DENSE: frozenset[Branch] = frozenset({"dense"})
_WITHOUT_IDENTITY: frozenset[Branch] = frozenset({"dense", "pointwise"})

_ROWS = (
    BlockRow("conv_bn", "conv-BN", _conv_bn, "N(W∗x)", "the plain layer"),
    _switched("repvgg", "RepVGG", Switches(), "N(W∗x) + N(W1∗x) + N(x)"),
    _switched("repvgg_no_identity", "RepVGG w/o identity", Switches(identity=False), "N(W∗x) + N(W1∗x)"),
    _switched("repvgg_no_pointwise", "RepVGG w/o 1×1", Switches(pointwise=False), "N(W∗x) + N(x)"),
    _switched("repvgg_dense2", "RepVGG, two 3×3", Switches(dense=2), "N(W∗x) + N(W'∗x) + N(W1∗x) + N(x)"),
    _switched(
        "repvgg_identity_without_bn",
        "Identity w/o BN",
        Switches(norms=_WITHOUT_IDENTITY),
        "N(W∗x) + N(W1∗x) + x",
    ),
    _switched(
        "repvgg_post_bn",
        "Post-addition BN",
        Switches(norms=frozenset(), norm_after=True),
        "N(W∗x + W1∗x + x)",
    ),
    _switched("repvgg_relu", "+ReLU in branches", Switches(relu=True), "relu N(W∗x) + relu N(W1∗x) + relu N(x)"),
    BlockRow("dirac", "DiracNet", _normed(DiracConv2d), "N((diag(α)I + diag(β)W/‖W‖)∗x)", _DIRAC),
    BlockRow("trivial", "Trivial Re-param", _normed(IdentityConv2d), "N((I + W)∗x)", _DIRAC),
    BlockRow("acb", "ACB", asymmetric, "N(W∗x) + N(Wv∗x) + N(Wh∗x)", "Ding et al., ACNet, ICCV 2019"),
    BlockRow(
        "dbb",
        "DBB",
        diverse,
        "N(W∗x) + N(W1∗x) + N(W∗N(W1∗x)) + N(mean N(W1∗x))",
        "Ding et al., Diverse Branch Block, CVPR 2021",
    ),
    BlockRow("doconv", "DO-Conv", _normed(DOConv2d), "N((D∘W)∗x)", "Cao et al., DO-Conv, IEEE TIP 2022"),
    BlockRow("expand_cl", "ExpandNet-CL", _normed(expand_layers), "N(W3∗(W2∗(W1∗x)))", _EXPAND),
    BlockRow("expand_ck", "ExpandNet-CK", _normed(expand_kernel), "N(…(W2∗(W1∗x)))", _EXPAND),
    _switched(
        "mobileone",
        "MobileOne",
        Switches(dense=4),
        "Σ_j N(Wj∗x) + N(W1∗x) + N(x), j = 1..4",
        "Vasu et al., MobileOne, CVPR 2023",
    ),
    _switched("qarepvgg_s2", "QARepVGG S2", Switches(norms=_WITHOUT_IDENTITY), "N(W∗x) + N(W1∗x) + x", _QA),
    _switched("qarepvgg_s3", "QARepVGG S3", Switches(norms=_DENSE), "N(W∗x) + W1∗x + x", _QA),
    _switched("qarepvgg", "QARepVGG (S4)", Switches(norms=_DENSE, norm_after=True), "N(N(W∗x) + W1∗x + x)", _QA),
    _switched(
        "qarepvgg_v2",
        "QARepVGG V2",
        Switches(norms=_DENSE, norm_after=True, mean=True),
        "N(N(W∗x) + W1∗x + x + mean(x))",
        _YOLO,
    ),
    BlockRow("replk", "RepLK", large_kernel, "N(W∗x) + N(Ws∗x)", "Ding et al., RepLKNet, CVPR 2022"),
    BlockRow(
        "unireplk", "UniRepLK", dilated_kernels, "N(W∗x) + Σ_j N(Wj∗x), dilated", "Ding et al., UniRepLKNet, CVPR 2024"
    ),
    BlockRow("repmixer", "RepMixer", RepMixer, "x + λ(M(x) − N(x))", "Vasu et al., FastViT, ICCV 2023"),
    BlockRow("orepa", "OREPA", _normed(OnlineConv2d), "N((Σ_b v_b K_b)∗x)", "Hu et al., OREPA, CVPR 2022"),
    BlockRow(
        "constant_scale",
        "CSLA",
        _constant_scale,
        "N(s3 W∗x + s1 W1∗x + w0 x)",
        "Ding et al., RepOptimizer, ICLR 2023",
    ),
)

#: Every row by its name.
BLOCKS: dict[str, BlockRow] = {row.name: row for row in _ROWS}


def block_of(name: str) -> BlockRow:
    """The row called ``name``.

    Raises:
        UsageError: there is none; the text lists the names that are closest, or all of them.
    """
    if name in BLOCKS:
        return BLOCKS[name]
    known = did_you_mean(name, BLOCKS, f"known are {', '.join(BLOCKS)}.")
    raise UsageError(f"There is no block {name!r}: {known}")


def create_block(name: str, geometry: Geometry) -> nn.Module:
    """A fresh block of the table in the place of a convolution of that geometry.

    Raises:
        UsageError: no row has that name, or the block has no form in that geometry.
        BorderError: its branches would read around other pixels.
    """
    return block_of(name).make(geometry)
