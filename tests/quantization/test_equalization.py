import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage
from repvgg.quantization import equalize, rescale_randomly
from repvgg.quantization.equalization import channel_spread
from tests.bn_statistics import trained_like
from tests.quantization.networks import NETWORKS, Chain, Residual, Smooth, images, random_

TINY = ModelSpec(
    "tiny", Stage(1, 8), (Stage(2, 8), Stage(2, 16)), groups=2, squeeze_excite=SqueezeExciteSpec("after_relu", 4)
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("network", NETWORKS)
def test_the_function_stays_the_same(network):
    model = random_(NETWORKS[network]()).double()
    x = images().double()
    before = copy.deepcopy(model.state_dict())
    equalized, report = equalize(model, x)
    expected = model(x)
    assert float((equalized(x) - expected).abs().max() / expected.abs().max()) <= 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(layer.after < 0.9 * layer.before for layer in report.layers)


def test_a_plain_repvgg_is_equalized_in_every_layer_but_gates_and_the_last():
    model = trained_like(repvgg.create_model(TINY, 5)).double()
    plain, _ = repvgg.reparameterize(model, torch.randn(1, 3, 33, 33, dtype=torch.float64))
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64)
    equalized, report = equalize(plain, x)
    expected = plain(x)
    assert float((equalized(x) - expected).abs().max() / expected.abs().max()) <= 1e-12
    gates = {name: reason for name, reason in report.skipped.items() if name != "head"}
    assert len(gates) == 5  # of five blocks
    assert set(gates.values()) == {"sigmoid is not positively homogeneous"}
    assert report.skipped["head"] == "it is an output of the network"
    assert repvgg.is_plain(equalized)


def test_one_pair_gets_equal_ranges():
    model = random_(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    equalized, _ = equalize(model, images())
    written = equalized[0].weight.abs().flatten(1).amax(1)
    read = equalized[2].weight.abs().movedim(1, 0).flatten(1).amax(1)
    assert_close(written, read)  # Nagel et al. 2019, equation 11


@pytest.mark.parametrize("network", [Chain, Residual])
def test_the_result_does_not_depend_on_how_channels_were_scaled(network):
    model = random_(network()).double()
    x = images().double()
    before = copy.deepcopy(model.state_dict())
    rescaled = rescale_randomly(model, x, largest=1000)
    assert_close(rescaled(x), model(x))
    first = model.body[0] if network is Chain else model.stem
    changed = rescaled.body[0] if network is Chain else rescaled.stem
    assert channel_spread(changed.weight) > 20 * channel_spread(first.weight)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    ours, _ = equalize(model, x)
    theirs, _ = equalize(rescaled, x)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(one, other)


def test_says_why_layers_are_skipped():
    _, report = equalize(random_(Smooth()), images())
    assert report.skipped == {
        "first": "gelu is not positively homogeneous",
        "second": "relu6 is not positively homogeneous",
        "head": "it is an output of the network",
    }
    assert "not rescaled: first: gelu is not positively homogeneous" in str(report)
