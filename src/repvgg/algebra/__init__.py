"""The algebra of convolutions, on tensors; nothing here depends on ``nn.Module``."""

from repvgg.algebra.axis import Axis
from repvgg.algebra.convmap import Border, ConvMap
from repvgg.algebra.kernel import Kernel
from repvgg.algebra.operations import (
    add,
    common_border,
    compose,
    concatenate,
    constant,
    embed,
    open_groups,
    over_axes,
    pad_with_bias,
    replace_channels,
    resample,
    scale,
    select_channels,
    shift,
    with_symmetric_padding,
)

__all__ = [
    "Axis",
    "Border",
    "ConvMap",
    "Kernel",
    "add",
    "common_border",
    "compose",
    "concatenate",
    "constant",
    "embed",
    "open_groups",
    "over_axes",
    "pad_with_bias",
    "replace_channels",
    "resample",
    "scale",
    "select_channels",
    "shift",
    "with_symmetric_padding",
]
