"""Building blocks: plain ``nn.Module``s whose ``forward`` is their only definition.

No block knows how to fold itself; that is read off its ``forward`` by :mod:`repvgg.collapse`.
"""

from repvgg.blocks.basic import ConvBN, PointwiseConv2d
from repvgg.blocks.branches import BranchSum
from repvgg.blocks.fused import training_kernels
from repvgg.blocks.repvgg import RepVGGBlock, rep_conv
from repvgg.blocks.squeeze_excite import SqueezeExcite

__all__ = ["BranchSum", "ConvBN", "PointwiseConv2d", "RepVGGBlock", "SqueezeExcite", "rep_conv", "training_kernels"]
