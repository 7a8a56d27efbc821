import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from repvgg.data.counter_rng import (
    CROP_STREAM,
    POLICY_STREAM,
    epoch_order,
    image_bits,
    image_rng,
    random_bits,
    uniforms,
)

SEEDS = st.integers(-(2**63), 2**63 - 1)


def splitmix64(state):
    """Reference implementation of the finalizer, in Python integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@given(SEEDS, st.integers(0, 2**40), st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_random_bits_equal_splitmix64(seed, epoch, keys):
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    state = splitmix64(((seed & mask) + golden) & mask)
    state = splitmix64(((state ^ epoch) + golden) & mask)
    expected = [splitmix64(((state ^ splitmix64((key + golden) & mask)) + golden) & mask) for key in keys]
    assert random_bits(seed, epoch, np.array(keys, np.uint64)).tolist() == expected


@given(SEEDS, st.integers(0, 2**40), st.integers(0, 2**63 - 1), st.integers(0, 20))
def test_image_bits_equal_random_bits(seed, epoch, image, stream):
    state = int(random_bits(seed, epoch, np.array([image], np.uint64))[0])
    assert image_bits(seed, epoch, image, stream) == splitmix64((state + stream * 0x9E3779B97F4A7C15) % 2**64)


def test_uniforms_are_uniform_and_uncorrelated():
    draws = uniforms(0, 0, torch.arange(20_000), 10).double()
    assert draws.shape == (20_000, 10)
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.035
    neighbours = torch.stack((draws[:-1, 0], draws[1:, 0]))
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.035


@pytest.mark.parametrize("other", [(1, 0), (0, 1)])
def test_uniforms_depend_on_seed_and_epoch(other):
    here, there = uniforms(0, 0, torch.arange(2000), 3), uniforms(*other, torch.arange(2000), 3)
    assert torch.corrcoef(torch.stack((here.flatten(), there.flatten())))[0, 1].abs() < 0.06


@given(SEEDS, st.integers(0, 1000), st.permutations(range(20)))
def test_uniforms_of_an_image_do_not_depend_on_its_position(seed, epoch, order):
    full = uniforms(seed, epoch, torch.arange(20), 4)
    assert_close(uniforms(seed, epoch, torch.tensor(order), 4), full[order], atol=0, rtol=0)
    assert 0 <= full.min() <= full.max() < 1


@given(SEEDS, st.integers(0, 1000), st.integers(1, 60))
def test_epoch_order_is_a_permutation(seed, epoch, length):
    order = epoch_order(seed, epoch, length)
    assert sorted(order.tolist()) == list(range(length))
    assert_close(order, epoch_order(seed, epoch, length), atol=0, rtol=0)


def test_epoch_orders_differ():
    orders = {tuple(epoch_order(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_image_rng_restores_the_global_generator():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    seen = []
    for where in ((0, 0, 0, CROP_STREAM), (0, 0, 0, POLICY_STREAM), (0, 0, 1, CROP_STREAM), (0, 1, 0, CROP_STREAM)):
        with image_rng(*where):
            seen.append(float(torch.rand(())))
    with image_rng(0, 0, 0, CROP_STREAM):
        assert float(torch.rand(())) == seen[0]
    with pytest.raises(ZeroDivisionError), image_rng(0, 0, 0, CROP_STREAM):
        1 / 0  # noqa: B018
    assert len(set(seen)) == 4
    assert_close(torch.get_rng_state(), before, atol=0, rtol=0)
