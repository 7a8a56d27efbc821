"""What the tests of the models share."""

from torch import nn

from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage

TINY = ModelSpec("tiny", Stage(1, 4), (Stage(2, 8), Stage(3, 8, stride=1)), groups=2, input_size=16)

# Of the kind of repvggplus_l2pse, small: gates behind the ReLU, a stage cut in two, auxiliary heads.
TINY_PLUS = ModelSpec(
    "tiny_plus",
    Stage(1, 4),
    (Stage(1, 8), Stage(2, 8), Stage(2, 16), Stage(2, 16, stride=1), Stage(1, 20)),
    squeeze_excite=SqueezeExciteSpec("after_relu", 4),
    auxiliary=(0, 1, 2),
)


def convolutions(model):
    """Geometry of every convolution of 3x3 or 1x1, by name."""
    return {
        name: (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
