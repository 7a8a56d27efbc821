"""Run one kernel on guarded buffers, and the same convolution in float64."""

import ctypes
import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import GENERIC_ISAS, MachineCode, VectorIsa, compile_to_object, host_isa
from repvgg.engine.graph import RELU, Conv, ConvGeometry
from repvgg.engine.runtime.memory import FeatureMapLayout, aligned_zeros
from tests.engine.emulation import emulated_isas, is_emulated, isa_parameters, run_kernel

CANARY = np.float32(-12345.678)
GUARD_FLOATS = 4096
_X86 = ("sse2", "avx2", "avx512")


def isas() -> list[VectorIsa]:
    """Return all vector instruction sets that this processor can run, the widest last."""
    host = host_isa()
    return [GENERIC_ISAS[name] for name in _X86[: _X86.index(host.name) + 1]] if host.name in _X86 else [host]


def every_isa() -> list[VectorIsa]:
    """Return :func:`isas`, and those that an emulator runs; :func:`tests.engine.covering.covering` marks them."""
    return [*isas(), *emulated_isas()]


def isa_params() -> list[Any]:
    """Return :func:`every_isa` as test parameters; those that an emulator runs are ``slow``."""
    return isa_parameters(isas())


class Guarded:
    """Memory between canaries, which show writes beyond either end."""

    def __init__(self, floats: int, fill: float = 0.0) -> None:
        self.memory = aligned_zeros(floats + 2 * GUARD_FLOATS)
        self.memory[:] = CANARY
        self.data = self.memory[GUARD_FLOATS : GUARD_FLOATS + floats]
        self.data[:] = fill

    def assert_intact(self) -> None:
        assert (self.memory[:GUARD_FLOATS] == CANARY).all()
        assert (self.memory[GUARD_FLOATS + self.data.size :] == CANARY).all()


def with_border(layout: FeatureMapLayout, data: np.ndarray) -> np.ndarray:
    """View NHWC feature maps with border, overhang and padding channels."""
    axes = zip(layout.size, layout.border, layout.overhang, strict=True)
    height, width = (size + 2 * border + overhang for size, border, overhang in axes)
    return data.reshape(-1, height, width, layout.pixel_stride)


def interior(layout: FeatureMapLayout, data: np.ndarray) -> np.ndarray:
    """View NHWC feature maps without border, overhang and padding channels."""
    (height, width), (above, left) = layout.size, layout.border
    return with_border(layout, data)[:, above : above + height, left : left + width, : layout.channels]


def run(
    kernel, source: np.ndarray, target: np.ndarray, weights, bias, batch: int, isa: VectorIsa, parts: int = 1
) -> None:
    """Compile a kernel and run its units in ``parts`` calls, the last ones first; in an emulator for a foreign ISA."""
    units = batch * kernel.units_per_block
    cuts = [units * part // parts for part in range(parts + 1)]
    if is_emulated(isa):
        run_kernel(kernel, (source, target, weights, bias), 1, batch, cuts, isa)
        return
    code = MachineCode([compile_to_object(build_module(kernel.emit("kernel")), isa)], isa)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)(code.address("kernel"))
    pointers = [array.ctypes.data for array in (source, target, weights, bias)]
    for begin, end in reversed(list(itertools.pairwise(cuts))):
        function(*pointers, batch, begin, end)


def random_conv(inputs: int, outputs: int, geometry: ConvGeometry, relu: bool = True, seed: int = 0) -> Conv:
    """Return a convolution with random weights of about unit gain."""
    random = np.random.default_rng(seed)
    shape = (outputs, inputs // geometry.groups, *geometry.kernel)
    weight = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    bias = random.standard_normal(outputs).astype(np.float32)
    return Conv(weight.astype(np.float32), bias, geometry, RELU if relu else ())


def expected(conv: Conv, x_NHWC: np.ndarray) -> torch.Tensor:
    """Return PyTorch's result in float64, (N, H, W, C)."""
    geometry = conv.geometry
    x = torch.from_numpy(x_NHWC.copy()).double().permute(0, 3, 1, 2)
    weight, bias = torch.from_numpy(conv.weight).double(), torch.from_numpy(conv.bias).double()
    where = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    out = F.conv2d(x, weight, bias, *where)
    return (out.relu() if conv.epilogue == RELU else out).permute(0, 2, 3, 1)
