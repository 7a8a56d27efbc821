"""Plans of whole networks: every layer is there, the batch is chunked, and equal layers share buffers."""

import numpy as np
import pytest
import torch
from torch import nn

from repvgg import create_model
from repvgg.engine.codegen.jit import GENERIC_ISAS
from repvgg.engine.frontend import read
from repvgg.engine.graph import AdaptivePool, Conv, ConvGeometry, Op, chain, infer_shapes
from repvgg.engine.kernels.border import BorderKernel
from repvgg.engine.kernels.direct_conv import DirectConvKernel
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.plan import BatchChunks, chunk_batch, plan
from repvgg.engine.winograd.convolution import WinogradFused, WinogradStagedGemm
from repvgg.errors import UnsupportedError
from tests.engine.helpers import isas, random_conv

PADDED = ConvGeometry((3, 3), padding=(1, 1))


@pytest.mark.parametrize("name", ["repvgg_t0", "repvgg_t1", "repvgg_t2", "repvgg_a0"])
def test_every_convolution_of_an_architecture_has_a_kernel(name):
    """With weights of zeros, which take no time to make."""
    with torch.device("meta"):
        model = create_model(name, plain=True)
    small = model.spec.input_size if model.spec.input_size < 64 else 64
    steps = plan(read(_zeros(model)), [(2, 3, small, small)], Target(isas()[-1])).steps
    convs = {
        step.name for step in steps if isinstance(step.kernel, (DirectConvKernel, WinogradFused, WinogradStagedGemm))
    }
    assert {name for name, module in model.named_modules() if type(module) is nn.Conv2d and ".se" not in name} <= convs


def _zeros(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((1, 3, 224, 224), (0, 1)),
        ((16, 3, 224, 224), (2, 4)),
        ((64, 3, 224, 224), (2, 4)),
        ((17, 3, 224, 224), (2, 1)),
        ((2, 3, 224, 224), (0, 2)),
        ((64, 3, 32, 32), (0, 64)),
        ((4, 3, 713, 713), (7, 1)),
    ],
    ids=str,
)
def test_which_layers_are_chunked_by_how_many_images(shape, found):
    """Of A0: its stem and the next layer, whose feature maps of 16 images exceed L3; the chunks are equal."""
    with torch.device("meta"):
        model = create_model("repvgg_a0", plain=True)
    ops: list[Op] = [
        Conv(np.empty(part.weight.shape), np.empty(0), ConvGeometry((3, 3), part.stride, (1, 1)))
        for part in model.modules()
        if isinstance(part, nn.Conv2d)
    ]
    graph, behind_pool = chain(ops, shape[1]), chain([AdaptivePool("avg", (1, 1)), *ops], shape[1])
    assert chunk_batch(graph, infer_shapes(graph, [shape[2:]]), shape[0]) == BatchChunks(*found)
    assert chunk_batch(behind_pool, infer_shapes(behind_pool, [shape[2:]]), shape[0]) == BatchChunks(0, shape[0])


def test_shapes_between_layers():
    linear = random_conv(8, 5, ConvGeometry((1, 1)))
    strided = random_conv(3, 8, ConvGeometry((3, 3), (2, 2), (1, 1)))
    pool = AdaptivePool("avg", (1, 1))
    shapes = infer_shapes(chain([strided, pool, linear], 3), [(9, 10)])
    assert [(shape.channels, shape.size) for shape in shapes] == [(3, (9, 10)), (8, (5, 5)), (8, (1, 1)), (5, (1, 1))]
    with pytest.raises(UnsupportedError, match="'linear' expects 8 channels but receives 3: pass an input_shape"):
        infer_shapes(chain([pool, linear], 3, names=["pool", "linear"]), [(9, 10)])


def test_equal_layers_alternate_between_two_buffers():
    graph = chain([random_conv(32, 32, PADDED) for _ in range(5)], 32)
    result = plan(graph, [(2, 32, 20, 20)], Target(GENERIC_ISAS["avx2"]))
    maps = [buffer for buffer in result.buffers if buffer.layout.size == (20, 20)]
    # The first reads with a border and an overhang, the output has neither; whatever lies between alternates.
    assert len(maps) <= 3
    assert all(step.source != step.target for step in result.steps if not isinstance(step.kernel, BorderKernel))
