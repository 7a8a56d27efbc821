"""One kernel on buffers with canaries around them, and a convolution in float64 beside it."""

import ctypes
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import GENERIC_ISAS, MachineCode, VectorIsa, compile_to_object, host_isa
from repvgg.engine.graph import Conv, ConvGeometry
from repvgg.engine.runtime.memory import FeatureMapLayout, aligned_zeros

CANARY = np.float32(-12345.678)
GUARD = 4096  # floats
_X86 = ("sse2", "avx2", "avx512")


def isas() -> list[VectorIsa]:
    """All vectors that this processor can run code for."""
    host = host_isa()
    return [GENERIC_ISAS[name] for name in _X86[: _X86.index(host.name) + 1]] if host.name in _X86 else [host]


class Guarded:
    """Memory between canaries: whatever is written beyond either end is seen."""

    def __init__(self, floats: int, fill: float = 0.0) -> None:
        self.whole = aligned_zeros(floats + 2 * GUARD)
        self.whole[:] = CANARY
        self.inside = self.whole[GUARD : GUARD + floats]
        self.inside[:] = fill

    def assert_whole(self) -> None:
        assert (self.whole[:GUARD] == CANARY).all()
        assert (self.whole[GUARD + self.inside.size :] == CANARY).all()


def maps(images: FeatureMapLayout, numbers: np.ndarray) -> np.ndarray:
    """The numbers of a buffer by (image, row, column, channel), borders and padding among them."""
    axes = zip(images.size, images.border, images.overhang, strict=True)
    height, width = (size + 2 * border + more for size, border, more in axes)
    return numbers.reshape(-1, height, width, images.pixel_stride)


def inside(images: FeatureMapLayout, numbers: np.ndarray) -> np.ndarray:
    """The same without borders and padding."""
    (height, width), (above, left) = images.size, images.border
    return maps(images, numbers)[:, above : above + height, left : left + width, : images.channels]


def run(
    kernel, source: np.ndarray, target: np.ndarray, weights, bias, batch: int, isa: VectorIsa, parts: int = 1
) -> None:
    """Compile a kernel and run all of its units, in so many parts, the last one first."""
    code = MachineCode([compile_to_object(build_module(kernel.emit("kernel")), isa)], isa)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)(code.address("kernel"))
    pointers = [array.ctypes.data for array in (source, target, weights, bias)]
    units = batch * kernel.units_per_block
    cuts = [units * part // parts for part in range(parts + 1)]
    for begin, end in reversed(list(itertools.pairwise(cuts))):
        function(*pointers, batch, begin, end)


def random_conv(inputs: int, outputs: int, geometry: ConvGeometry, relu: bool = True, seed: int = 0) -> Conv:
    """A convolution with weights of about unit gain."""
    random = np.random.default_rng(seed)
    shape = (outputs, inputs // geometry.groups, *geometry.kernel)
    weight = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return Conv("conv", weight.astype(np.float32), random.standard_normal(outputs).astype(np.float32), geometry, relu)


def expected(conv: Conv, x_NHWC: np.ndarray) -> torch.Tensor:
    """What PyTorch computes in float64, (N, H, W, C)."""
    geometry = conv.geometry
    x = torch.from_numpy(x_NHWC.copy()).double().permute(0, 3, 1, 2)
    weight, bias = torch.from_numpy(conv.weight).double(), torch.from_numpy(conv.bias).double()
    where = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out = F.conv2d(x, weight, bias, *where)
    return (out.relu() if conv.relu else out).permute(0, 2, 3, 1)
