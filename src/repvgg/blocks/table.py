"""The table of blocks: each entry builds a block for the geometry of the convolution that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from repvgg.blocks.acb_dbb import acb, dbb
from repvgg.blocks.basic import ConvBN
from repvgg.blocks.csla import ConstantScaleSum
from repvgg.blocks.depthwise import RepMixer, replk, unireplk
from repvgg.blocks.geometry import Geometry
from repvgg.blocks.orepa import OnlineConv2d
from repvgg.blocks.overparameterized import DiracConv2d, DOConv2d, IdentityConv2d, expand_ck, expand_cl
from repvgg.blocks.repvgg import Branch, BranchConfig, BranchSum, branches_of, sum_then_norm
from repvgg.errors import UsageError, did_you_mean

MakeModule = Callable[[Geometry], nn.Module]

_PAPER = "Ding et al., RepVGG, CVPR 2021"
_QA = "Chu et al., Make RepVGG greater again, AAAI 2024"
_YOLO = "Li et al., YOLOv6 v3.0, 2023, after Chu et al."
_DIRAC = "Zagoruyko and Komodakis, DiracNets, 2017"
_EXPAND = "Guo et al., ExpandNets, NeurIPS 2020"


@dataclass(frozen=True)
class BlockEntry:
    """A block in the table."""

    name: str  # the key for create_block()
    title: str  # the name as printed in papers
    make: MakeModule  # builds the block, newly initialized, for a geometry
    formula: str  # what it computes; N is a batch norm, W a kernel
    source: str  # the publication
    is_linear: bool = True  # whether the block equals one convolution in eval mode


def _branches(name: str, title: str, config: BranchConfig, formula: str, source: str = _PAPER) -> BlockEntry:
    return BlockEntry(name, title, partial(branches_of, config=config), formula, source, not config.relu)


def _with_norm(layers: MakeModule) -> MakeModule:
    """Append a batch norm to what ``layers`` builds."""

    def make(geometry: Geometry) -> nn.Module:
        return nn.Sequential(layers(geometry), nn.BatchNorm2d(geometry.out_channels))

    return make


def _conv_bn(geometry: Geometry) -> nn.Module:
    return ConvBN(geometry.conv())


def _constant_scale(geometry: Geometry) -> nn.Module:
    return sum_then_norm(BranchSum({"scaled": ConstantScaleSum(geometry)}), geometry)


_DENSE: frozenset[Branch] = frozenset({"dense"})
_WITHOUT_IDENTITY: frozenset[Branch] = frozenset({"dense", "pointwise"})

_ENTRIES = (
    BlockEntry("conv_bn", "conv-BN", _conv_bn, "N(W∗x)", "the plain layer"),
    _branches("repvgg", "RepVGG", BranchConfig(), "N(W∗x) + N(W1∗x) + N(x)"),
    _branches("repvgg_no_identity", "RepVGG w/o identity", BranchConfig(identity=False), "N(W∗x) + N(W1∗x)"),
    _branches("repvgg_no_pointwise", "RepVGG w/o 1×1", BranchConfig(pointwise=False), "N(W∗x) + N(x)"),
    _branches("repvgg_dense2", "RepVGG, two 3×3", BranchConfig(dense=2), "N(W∗x) + N(W'∗x) + N(W1∗x) + N(x)"),
    _branches(
        "repvgg_identity_without_bn", "Identity w/o BN", BranchConfig(norms=_WITHOUT_IDENTITY), "N(W∗x) + N(W1∗x) + x"
    ),
    _branches(
        "repvgg_post_bn", "Post-addition BN", BranchConfig(norms=frozenset(), norm_after=True), "N(W∗x + W1∗x + x)"
    ),
    _branches("repvgg_relu", "+ReLU in branches", BranchConfig(relu=True), "relu N(W∗x) + relu N(W1∗x) + relu N(x)"),
    BlockEntry("dirac", "DiracNet", _with_norm(DiracConv2d), "N((diag(α)I + diag(β)W/‖W‖)∗x)", _DIRAC),
    BlockEntry("trivial", "Trivial Re-param", _with_norm(IdentityConv2d), "N((I + W)∗x)", _DIRAC),
    BlockEntry("acb", "ACB", acb, "N(W∗x) + N(Wv∗x) + N(Wh∗x)", "Ding et al., ACNet, ICCV 2019"),
    BlockEntry(
        "dbb",
        "DBB",
        dbb,
        "N(W∗x) + N(W1∗x) + N(W∗N(W1∗x)) + N(mean N(W1∗x))",
        "Ding et al., Diverse Branch Block, CVPR 2021",
    ),
    BlockEntry("doconv", "DO-Conv", _with_norm(DOConv2d), "N((D∘W)∗x)", "Cao et al., DO-Conv, IEEE TIP 2022"),
    BlockEntry("expand_cl", "ExpandNet-CL", _with_norm(expand_cl), "N(W3∗(W2∗(W1∗x)))", _EXPAND),
    BlockEntry("expand_ck", "ExpandNet-CK", _with_norm(expand_ck), "N(…(W2∗(W1∗x)))", _EXPAND),
    _branches(
        "mobileone",
        "MobileOne",
        BranchConfig(dense=4),
        "Σ_j N(Wj∗x) + N(W1∗x) + N(x), j = 1..4",
        "Vasu et al., MobileOne, CVPR 2023",
    ),
    _branches("qarepvgg_s2", "QARepVGG S2", BranchConfig(norms=_WITHOUT_IDENTITY), "N(W∗x) + N(W1∗x) + x", _QA),
    _branches("qarepvgg_s3", "QARepVGG S3", BranchConfig(norms=_DENSE), "N(W∗x) + W1∗x + x", _QA),
    _branches("qarepvgg", "QARepVGG (S4)", BranchConfig(norms=_DENSE, norm_after=True), "N(N(W∗x) + W1∗x + x)", _QA),
    _branches(
        "qarepvgg_v2",
        "QARepVGG V2",
        BranchConfig(norms=_DENSE, norm_after=True, mean=True),
        "N(N(W∗x) + W1∗x + x + mean(x))",
        _YOLO,
    ),
    BlockEntry("replk", "RepLK", replk, "N(W∗x) + N(Ws∗x)", "Ding et al., RepLKNet, CVPR 2022"),
    BlockEntry(
        "unireplk", "UniRepLK", unireplk, "N(W∗x) + Σ_j N(Wj∗x), dilated", "Ding et al., UniRepLKNet, CVPR 2024"
    ),
    BlockEntry("repmixer", "RepMixer", RepMixer, "x + λ(M(x) − N(x))", "Vasu et al., FastViT, ICCV 2023"),
    BlockEntry("orepa", "OREPA", _with_norm(OnlineConv2d), "N((Σ_b v_b K_b)∗x)", "Hu et al., OREPA, CVPR 2022"),
    BlockEntry(
        "constant_scale", "CSLA", _constant_scale, "N(s3 W∗x + s1 W1∗x + w0 x)", "Ding et al., RepOptimizer, ICLR 2023"
    ),
)

#: All blocks by name.
BLOCKS: dict[str, BlockEntry] = {entry.name: entry for entry in _ENTRIES}


def block_of(name: str) -> BlockEntry:
    """Look up a block by name.

    Raises:
        UsageError: there is no such block; the text suggests the closest names, or lists all of them.
    """
    if name in BLOCKS:
        return BLOCKS[name]
    suggestion = did_you_mean(name, BLOCKS, f"known are {', '.join(BLOCKS)}.")
    raise UsageError(f"There is no block {name!r}: {suggestion}")


def create_block(name: str, geometry: Geometry) -> nn.Module:
    """Create a newly initialized block that replaces a convolution of that geometry.

    Raises:
        UsageError: there is no such block, or it does not support that geometry.
        BorderError: the padding does not centre the kernel.
    """
    return block_of(name).make(geometry)
