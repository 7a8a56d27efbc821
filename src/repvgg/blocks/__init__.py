"""Building blocks: plain ``nn.Module``s whose ``forward`` is their only definition.

No block knows how to fold itself; that is read off its ``forward`` by :mod:`repvgg.collapse`.
"""

from repvgg.blocks.basic import ConvBN, PointwiseConv2d
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.computed import ComputedConv2d
from repvgg.blocks.constant_scale import ConstantScaleSum
from repvgg.blocks.diverse import PaddedNorm
from repvgg.blocks.encoded import DiracConv2d, IdentityConv2d
from repvgg.blocks.fused import training_kernels
from repvgg.blocks.geometry import Geometry
from repvgg.blocks.mean import MeanFilter
from repvgg.blocks.mixer import RepMixer
from repvgg.blocks.online import OnlineConv2d
from repvgg.blocks.overparameterized import DOConv2d
from repvgg.blocks.repvgg import RepVGGBlock, Switches, branches_of, rep_conv
from repvgg.blocks.squeeze_excite import SqueezeExcite
from repvgg.blocks.table import BLOCKS, BlockRow, block_of, create_block

__all__ = [
    "BLOCKS",
    "BlockRow",
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
    "Switches",
    "block_of",
    "branches_of",
    "create_block",
    "rep_conv",
    "training_kernels",
]
