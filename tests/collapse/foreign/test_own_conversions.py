"""The conversions of other code bases, to which ours is compared, are right; and so are the comparison's measures."""

import pytest
import torch
from torch import nn

from tests.collapse.foreign.catalog import FAST, SLOW
from tests.collapse.foreign.harness import count, outputs, relative_error
from tests.collapse.foreign.packages import set_environment


def parameters(networks):
    return [pytest.param(network, id=network.name) for network in networks]


def import_package(network):
    if network.package:
        set_environment()
        # ImportError: a shared library that the package needs may be missing.
        pytest.importorskip(network.package, exc_type=ImportError)


def check_own_conversion(network):
    """The reference is right: the same function, with less in it."""
    model, inputs = network.model(), network.inputs()
    converted = network.converted(model)
    assert relative_error(outputs(converted, inputs), outputs(model, inputs)) <= 1e-10
    before, after = count(model, inputs), count(converted, inputs)
    assert after != before
    assert after.norms < before.norms or after.convolutions < before.convolutions


@pytest.mark.parametrize("network", parameters(FAST))
def test_own_conversion_of_a_small_network(network):
    check_own_conversion(network)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the packages
@pytest.mark.parametrize("network", parameters(SLOW))
def test_own_conversion(network):
    import_package(network)
    check_own_conversion(network)


def test_the_error_is_relative_to_each_output():
    large, small = torch.full((2,), 1e6), torch.tensor([1.0, 2.0])
    assert relative_error([large, small + 2e-3], [large, small]) == pytest.approx(1e-3, rel=1e-3)
    assert relative_error([large], [large, small]) == float("inf")
    labels = torch.tensor([1, 2])
    assert relative_error([labels], [labels]) == 0
    assert relative_error([labels + 1], [labels]) == float("inf")
    assert relative_error([small * float("nan")], [small]) == float("inf")
    assert relative_error([torch.tensor([1.0, float("inf")])], [torch.tensor([1.0, float("inf")])]) == 0


def test_counts_are_of_executed_convolutions_and_of_norms_with_running_statistics():
    conv = nn.Conv2d(2, 2, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(2), conv, nn.InstanceNorm2d(2), nn.Identity()).eval()
    model.uncalled = nn.Conv2d(2, 2, 1)
    model[4].forward = lambda x: nn.functional.batch_norm(nn.functional.batch_norm(x, *stats), *stats)
    stats = (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    model.forward = lambda x: [x := model[i](x) for i in range(5)]
    found = count(model.double(), (torch.randn(1, 2, 3, 3, dtype=torch.float64),))
    assert (found.norms, found.convolutions, found.parameters) == (3, 2, 6 + 4 + 6)
