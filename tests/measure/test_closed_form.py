"""Totals of a walk against closed formulas on random geometries, and against PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repvgg.measure import profile, walk
from tests.measure.networks import Call, geometries

FLOAT = 4


def torch_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-adds by PyTorch's counter, which counts two operations for each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


@settings(max_examples=60)
@given(geometries())
def test_convolution(geometry):
    model = geometry.module()
    x = torch.zeros(geometry.batch, geometry.in_channels, *geometry.size)
    total = profile(model, x).total
    assert total.params == geometry.params
    assert total.macs == geometry.macs == torch_macs(model, x)
    assert total.winograd_muls == (geometry.macs * 4 // 9 if geometry.winograd else geometry.macs)
    assert profile(model, x, tile=4).total.winograd_muls == (geometry.macs // 4 if geometry.winograd else geometry.macs)
    assert total.bytes_read == FLOAT * (geometry.values_in + geometry.params)
    assert total.bytes_written == FLOAT * geometry.values_out
    on_meta = profile(model.to("meta"), x.to("meta")).total
    assert on_meta.peak_bytes == FLOAT * (geometry.values_in + geometry.values_out)
    assert total.peak_bytes >= on_meta.peak_bytes  # some kernels allocate more than their output fills
    assert replace(total, peak_bytes=on_meta.peak_bytes) == on_meta
    assert (total.unknown, total.unknown_traffic) == ((), ())


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=5), st.integers(1, 4))
def test_chain_of_linear_layers(layers, batch):
    """While a layer runs, images, its input and its output are live; a ReLU in place allocates nothing."""
    model, width, macs, moved, peak = nn.Sequential(), 5, 0, 0, 0
    first = batch * width
    for index, (out, inplace) in enumerate(layers):
        model.append(nn.Linear(width, out)).append(nn.ReLU(inplace))
        before = first + (batch * width if index else 0)
        macs += batch * width * out
        moved += batch * width + width * out + out + batch * out + 2 * batch * out
        peak = max(peak, before + batch * out, first + batch * out * (1 if inplace else 2))
        width = out
    for device in ("cpu", "meta"):
        total = profile(model.to(device), torch.zeros(batch, 5, device=device)).total
        assert (total.macs, total.winograd_muls) == (macs, macs)
        assert (total.bytes_moved, total.peak_bytes) == (FLOAT * moved, FLOAT * peak)


small = st.integers(1, 6)


@settings(max_examples=30)
@given(small, small, st.integers(2, 6), small)
def test_matrix_products(batch, rows, inner, columns):
    """The inner size is at least 2: for 1, einsum multiplies elementwise."""
    left, right = torch.zeros(batch, rows, inner), torch.zeros(batch, inner, columns)
    for function, inputs in (
        (torch.bmm, (left, right)),
        (torch.matmul, (left, right[0])),
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (left, right)),
    ):
        done = walk(Call(function), inputs)
        assert done.macs == batch * rows * inner * columns == torch_macs(Call(function), *inputs)
    assert walk(Call(torch.bmm), (left, right)).bytes_moved == FLOAT * batch * (
        rows * inner + inner * columns + rows * columns
    )


@settings(max_examples=30)
@given(small, small, small, small, small)
def test_attention(batch, heads, queries, keys, width):
    shapes = [(batch, heads, length, width) for length in (queries, keys, keys)]
    inputs = [torch.zeros(shape) for shape in shapes]
    expected = 2 * batch * heads * queries * keys * width
    model = Call(F.scaled_dot_product_attention)
    assert walk(model, inputs).macs == expected == torch_macs(model, *inputs)
    assert walk(model, [x.to("meta") for x in inputs]).macs == expected


@pytest.mark.parametrize("size", [8, 9])
def test_winograd_ignores_the_padding_of_odd_sizes(size):
    """The paper counts 4/9 at every size; a real kernel pads 9 outputs to 10 and multiplies more."""
    total = profile(nn.Conv2d(2, 3, 3, padding=1), torch.zeros(1, 2, size, size)).total
    assert total.winograd_muls == size * size * 2 * 3 * 4
