"""Small convolutions of random geometry, with closed formulas of their cost."""

import math
from dataclasses import dataclass

from hypothesis import strategies as st
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Call(nn.Module):
    """Wrap a function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@dataclass(frozen=True)
class Geometry:
    """Everything that the cost of a convolution depends on."""

    size: tuple[int, ...]
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: int
    dilation: int
    padding: int
    transposed: bool
    bias: bool

    def module(self) -> nn.Module:
        kind = (TRANSPOSED if self.transposed else CONV)[len(self.size)]
        more = {"stride": self.stride, "dilation": self.dilation, "padding": self.padding, "groups": self.groups}
        return kind(self.in_channels, self.out_channels, self.kernel, bias=self.bias, **more)

    @property
    def out_size(self) -> tuple[int, ...]:
        extent = [self.dilation * (k - 1) for k in self.kernel]
        if self.transposed:
            return tuple(
                (n - 1) * self.stride - 2 * self.padding + r + 1 for n, r in zip(self.size, extent, strict=True)
            )
        return tuple((n + 2 * self.padding - r - 1) // self.stride + 1 for n, r in zip(self.size, extent, strict=True))

    @property
    def params(self) -> int:
        return (
            self.in_channels * self.out_channels // self.groups * math.prod(self.kernel) + self.bias * self.out_channels
        )

    @property
    def macs(self) -> int:
        positions = math.prod(self.size if self.transposed else self.out_size)
        return self.batch * positions * self.in_channels * self.out_channels // self.groups * math.prod(self.kernel)

    @property
    def winograd(self) -> bool:
        return self.kernel == (3, 3) and self.stride == self.dilation == 1 and not self.transposed

    @property
    def values_in(self) -> int:
        return self.batch * self.in_channels * math.prod(self.size)

    @property
    def values_out(self) -> int:
        return self.batch * self.out_channels * math.prod(self.out_size)


@st.composite
def geometries(draw, dims=(1, 2, 2, 2, 3)) -> Geometry:
    axes = draw(st.sampled_from(dims))
    groups = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    return Geometry(
        size=tuple(draw(st.integers(7, 9)) for _ in range(axes)),
        batch=draw(small),
        in_channels=groups * draw(small),
        out_channels=groups * draw(small),
        groups=groups,
        kernel=draw(st.sampled_from([(1,) * axes, (3,) * axes, tuple(range(2, 2 + axes))])),
        stride=draw(st.integers(1, 2)),
        dilation=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 1)),
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
