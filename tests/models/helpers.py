"""Helpers of the model tests."""

from torch import nn

from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage

TINY = ModelSpec("tiny", Stage(1, 4), (Stage(2, 8), Stage(3, 8, stride=1)), groups=2, input_size=16)

# A small repvggplus_l2pse: gates after the ReLU, a stage split in two, auxiliary heads.
TINY_PLUS = ModelSpec(
    "tiny_plus",
    Stage(1, 4),
    (Stage(1, 8), Stage(2, 8), Stage(2, 16), Stage(2, 16, stride=1), Stage(1, 20)),
    squeeze_excite=SqueezeExciteSpec("after_relu", 4),
    auxiliary=(0, 1, 2),
)


def convolutions(model):
    """Return the geometry of every convolution by name."""
    return {
        name: (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
