"""Kernels as sums that are multiplied out once."""

import pytest
import torch
from torch.testing import assert_close

from repvgg.algebra import ConvMap, add, kernel, scale


def branches():
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    three = ConvMap.of(rand(6, 2, 3, 3), rand(6).double(), padding=(1, 1, 1, 1), groups=3, border="zeros")
    one = ConvMap.of(rand(6, 2, 1, 1), rand(6).double(), groups=3)
    factor = rand(6).double()
    return add(scale(three, factor), scale(one, factor), scale(ConvMap.identity(6), factor))


@pytest.mark.parametrize("size", [1, 20, 40, 1 << 15])
def test_chunks_equal_the_dense_kernel(monkeypatch, size):
    monkeypatch.setattr(kernel, "_LARGE_CHUNK", size)
    conv = branches()
    chunks = [(channels, sums.clone()) for channels, sums in conv.kernel.chunks()]
    assert chunks[0][0].start == 0
    assert chunks[-1][0].stop == 6
    assert_close(torch.cat([sums for _, sums in chunks]), conv.weight, rtol=0, atol=0)


def test_small_chunks_follow_a_slow_one(monkeypatch):
    """Chunks change size; the numbers are the same."""
    clock = iter(range(0, 10000, 1))
    monkeypatch.setattr(kernel, "_SMALL_CHUNK", 20)
    monkeypatch.setattr(kernel, "_LARGE_CHUNK", 40)
    monkeypatch.setattr(kernel, "_SMALL_CHUNKS_FOR_SECONDS", 1000.0)
    monkeypatch.setattr(kernel, "_small_chunks_until", float("-inf"))
    monkeypatch.setattr(kernel.time, "monotonic", lambda: next(clock))
    conv = branches()
    chunks = [(channels, sums.clone()) for channels, sums in conv.kernel.chunks()]
    assert [channels.stop - channels.start for channels, _ in chunks] == [2, 1, 1, 1, 1]
    assert_close(torch.cat([sums for _, sums in chunks]), conv.weight, rtol=0, atol=0)


def test_sums_are_in_float64_whatever_the_dtype_of_the_terms():
    conv = branches()
    assert {term.weight.dtype for term in conv.kernel.terms} == {torch.float32, torch.float64}
    assert conv.weight.dtype == conv.dtype == torch.float64


def test_gradients_reach_every_term():
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    factor = torch.randn(4, dtype=torch.float64, requires_grad=True)
    conv = ConvMap.of(weight, torch.zeros(4, dtype=torch.float64), padding=(1, 1, 1, 1), border="zeros")
    merged = add(scale(conv, factor), scale(ConvMap.identity(4), factor))
    merged.weight.sum().backward()
    assert_close(weight.grad, factor.detach().float().view(-1, 1, 1, 1).expand_as(weight), rtol=1e-6, atol=1e-6)
    assert_close(factor.grad, weight.detach().double().sum((1, 2, 3)) + 1, rtol=1e-12, atol=1e-12)


def test_inputs_are_never_written_to():
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    before = weight.clone()
    conv = ConvMap.of(weight, padding=(1, 1, 1, 1), border="zeros")
    add(conv, ConvMap.identity(4), conv).weight.mul_(2)
    assert_close(weight, before, rtol=0, atol=0)
