"""Plain models of random forwards answer as the models do, or refuse the call; never otherwise."""

import copy
import warnings

import pytest
import torch

import repvgg
from repvgg._structure import tensors
from repvgg.errors import NothingFoldedWarning, UsageError
from tests.collapse.models import image
from tests.collapse.random_forwards import random_model

FAST, SLOW = 60, 1000


def agree(model, plain, *args, **kwargs):
    """Whether both give the same; None if the plain model refuses the call, or the model does not run."""
    with torch.no_grad():
        try:
            expected = tensors(model(*copy.deepcopy(args), **kwargs))
        except Exception:
            return None
        try:
            found = tensors(plain(*copy.deepcopy(args), **kwargs))
        except UsageError:
            return None
    scale = [float(value.abs().max().clamp_min(1e-9)) for value in expected]
    return all(float((a - b).abs().max()) <= 1e-10 * s for a, b, s in zip(expected, found, scale, strict=True))


def check(seed):
    model, code = random_model(seed)
    x, given = image(), seed % 2 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        plain, _ = repvgg.reparameterize(model, x if given else None, prove=seed % 5 == 0)
    assert agree(model, plain, x), code
    other_calls = [((image(seed=3),), {}), ((x, True), {}), ((x,), {"mode": "b"}), ((image(4, 24, 25),), {})]
    results = [agree(model, plain, *args, **kwargs) for args, kwargs in other_calls]
    if not given:
        assert results[0], code
    assert False not in results, code
    model.switch = plain.switch = not model.switch
    assert agree(model, plain, x) is not False, code


@pytest.mark.parametrize("start", range(0, FAST, 10))
def test_random_forwards(start):
    for seed in range(start, start + 10):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(FAST, SLOW, 50))
def test_many_random_forwards(start):
    for seed in range(start, min(start + 50, SLOW)):
        check(seed)
