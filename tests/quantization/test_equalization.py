import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage
from repvgg.quantization import equalize, trace_channels
from repvgg.quantization.channel_graph import FIXED
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
    graph = trace_channels(model, x)
    scales = torch.exp(torch.empty(graph.num_variables, dtype=torch.float64).uniform_(-6.9, 6.9))  # up to 1000x
    scales[FIXED] = 1
    sabotaged = copy.deepcopy(model)
    state = sabotaged.state_dict()
    for layer in graph.layers:
        weight = state[layer.weight]
        into = scales[layer.inputs].reshape(layer.groups, -1).repeat_interleave(len(weight) // layer.groups, 0)
        factor = into / scales[layer.outputs][:, None]
        weight *= factor.reshape(*factor.shape, *[1] * (weight.ndim - 2))
        state[layer.bias] /= scales[layer.outputs]
    assert_close(sabotaged(x), model(x))
    ours, _ = equalize(model, x)
    theirs, _ = equalize(sabotaged, x)
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
