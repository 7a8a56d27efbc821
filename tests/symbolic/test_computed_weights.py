"""Weights that torch's utilities compute: weight norm, spectral norm, pruning, parametrizations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from repvgg import equivalent_conv, trace
from repvgg.symbolic import shadow_of
from repvgg.symbolic.shadow import computes_weight

EXACT = {"rtol": 1e-12, "atol": 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")

STYLES = {
    "weight_norm": nn.utils.weight_norm,
    "weight_norm of all": lambda m: nn.utils.weight_norm(m, dim=None),
    "spectral_norm": nn.utils.spectral_norm,
    "weight_norm, parametrization": parametrizations.weight_norm,
    "spectral_norm, parametrization": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two parametrizations": lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m)),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.4),
    "pruned channels, twice": lambda m: prune.ln_structured(
        prune.random_unstructured(m, "weight", amount=3), "weight", amount=0.5, n=2, dim=0
    ),
    "pruned bias": lambda m: prune.random_unstructured(prune.l1_unstructured(m, "weight", amount=5), "bias", amount=1),
    "weight_norm, pruned": lambda m: prune.l1_unstructured(nn.utils.weight_norm(m), "weight_v", amount=0.4),
}
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 7)),
    "linear": (lambda: nn.Linear(4, 4), (3, 4)),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weight_is_what_eval_mode_computes(style, layer):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = STYLES[style](make()).eval()
    with torch.no_grad():
        module(torch.ones(shape))  # hooks store the weight at the first call
        for parameter in module.parameters():  # what they stored is then out of date
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = copy.deepcopy(module.state_dict()), dict(vars(module)), {n: id(p) for n, p in module.named_parameters()}
    conv = trace(module)
    weight, bias = equivalent_conv(module)
    (weight.sum() + bias.sum()).backward()
    grads = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert grads == set()
    assert_close(module.state_dict(), before[0], rtol=0, atol=0)
    assert all(vars(module)[name] is value for name, value in before[1].items())
    assert {n: id(p) for n, p in module.named_parameters()} == before[2]
    # The original in float32 is the reference: some of these utilities cannot be converted to float64.
    with torch.no_grad():
        x = torch.randn(shape)
        module(x)
        expected = module(x)  # a hook may read what a later one computed in the call before
        assert_close(conv(x.double()).float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", ["weight_norm", "spectral_norm", "weight_norm, parametrization", "pruned"])
def test_inside_of_a_block(style):
    torch.manual_seed(0)
    block = nn.Sequential(STYLES[style](nn.Conv2d(4, 4, 3, bias=False)), nn.BatchNorm2d(4)).double().eval()
    block[1].running_mean.normal_()
    block[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    assert_close(trace(block)(x), block(x), **EXACT)


def test_hooks_of_others_stay():
    seen = []
    module = nn.utils.weight_norm(nn.Linear(3, 3)).eval()
    module.register_forward_pre_hook(lambda m, args: seen.append(m))
    shadow = shadow_of(module, lambda t: t.double(), compute_weights=True)
    assert [computes_weight(hook) for hook in module._forward_pre_hooks.values()] == [True, False]
    assert [computes_weight(hook) for hook in shadow._forward_pre_hooks.values()] == [False]
    shadow(torch.ones(1, 3, dtype=torch.float64))
    assert seen == [shadow]
    assert len(shadow_of(module, lambda t: t.double())._forward_pre_hooks) == 2
