"""``reparameterize(model, inputs)`` leaves no more than the conversion of each code base, and computes the same."""

import warnings

import pytest
import torch

import repvgg
from repvgg.errors import NothingFoldedWarning
from tests.collapse.foreign.catalog import FAST, SLOW
from tests.collapse.foreign.harness import count, default_dtype, outputs, relative_error
from tests.collapse.foreign.test_own_conversions import import_package, parameters

# Networks of docs/results/collapse-foreign.md whose row does not hold yet, and why.
MISSED: dict[str, str] = {}


def check_collapse(network, request):
    if network.name in MISSED:
        request.applymarker(pytest.mark.xfail(reason=MISSED[network.name], strict=True))
    model, inputs = network.model(), network.inputs()
    expected = outputs(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with default_dtype(torch.float64), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)  # the counts are the better message
        plain, _ = repvgg.reparameterize(model, inputs)
    assert relative_error(outputs(plain, inputs), expected) <= 1e-10
    ours, theirs = count(plain, inputs), count(network.converted(model), inputs)
    assert ours.exceeding(theirs) == []
    assert ours.norms <= network.norms
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("network", parameters(FAST))
def test_collapse_of_a_small_network(network, request):
    check_collapse(network, request)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # those of the packages
@pytest.mark.parametrize("network", parameters(SLOW))
def test_collapse(network, request):
    import_package(network)
    check_collapse(network, request)
