"""Building blocks: plain ``nn.Module``s whose ``forward`` is their only definition.

No block contains code that merges its branches: :mod:`repvgg.collapse` derives that from its ``forward``.
"""

from repvgg.blocks._cpu import dispatch as fused  # status() was published as repvgg.blocks.fused.status()
from repvgg.blocks._cpu.dispatch import training_kernels
from repvgg.blocks.acb_dbb import PaddedNorm
from repvgg.blocks.basic import ComputedConv2d, ConvBN, MeanFilter, SqueezeExcite
from repvgg.blocks.csla import ConstantScaleSum
from repvgg.blocks.depthwise import RepMixer
from repvgg.blocks.geometry import Geometry, PointwiseConv2d
from repvgg.blocks.orepa import OnlineConv2d
from repvgg.blocks.overparameterized import DiracConv2d, DOConv2d, IdentityConv2d
from repvgg.blocks.repvgg import BranchConfig, BranchSum, RepVGGBlock, branches_of, rep_conv
from repvgg.blocks.table import BLOCKS, BlockEntry, block_of, create_block

__all__ = [
    "BLOCKS",
    "BlockEntry",
    "BranchConfig",
    "BranchSum",
    "ComputedConv2d",
    "ConstantScaleSum",
    "ConvBN",
    "DOConv2d",
    "DiracConv2d",
    "Geometry",
    "IdentityConv2d",
    "MeanFilter",
    "OnlineConv2d",
    "PaddedNorm",
    "PointwiseConv2d",
    "RepMixer",
    "RepVGGBlock",
    "SqueezeExcite",
    "block_of",
    "branches_of",
    "create_block",
    "fused",
    "rep_conv",
    "training_kernels",
]
