import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.blocks import BLOCKS, Geometry
from repvgg.deploy import OnnxRunner
from repvgg.deploy.qdq import export_qdq
from repvgg.errors import CheckpointError, UsageError
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage, create_model, create_variant
from repvgg.quantization import (
    ActivationQuantizer,
    FakeQuantLayer,
    QuantizationSettings,
    QuantizedLayer,
    load_quantized,
    prepare_qat,
    quantize,
    refinement,
    save_quantized,
    sqnr,
)
from repvgg.quantization.calibration import run
from repvgg.symbolic import equivalent_conv
from repvgg.training import merge_constant_scale_branches, seeded
from tests.bn_statistics import trained_like
from tests.quantization.networks import images

SPEC = ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(2, 8), Stage(2, 8)), groups=2)
BARE = QuantizationSettings("per_tensor", 7, equalize=False, rounding_sweeps=0)
SETTINGS = [
    QuantizationSettings("per_channel", 8),
    QuantizationSettings("per_tensor", 8, ranges="minmax", equalize=False),
    QuantizationSettings("per_tensor", 4, ranges="percentile"),
]


def tiny(spec=SPEC):
    with seeded("tiny", 1):
        return trained_like(create_model(spec, 5, 3))


def variant(block):
    with seeded("variant", 1):
        return trained_like(create_variant(SPEC, block, 5, 3))


def merged_rep_optimizer():
    return trained_like(merge_constant_scale_branches(variant("constant_scale"))[0])


def conv_bn_chain():
    with seeded("chain", 1):
        layers = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        return trained_like(nn.Sequential(*layers))


def with_gates():
    return tiny(ModelSpec("gated", Stage(1, 8), (Stage(2, 8),), squeeze_excite=SqueezeExciteSpec("before_relu", 2)))


NETWORKS = {
    "repvgg": tiny,
    "gates": with_gates,
    "conv and batch norm": conv_bn_chain,
    "merged kernels of RepOptimizer": merged_rep_optimizer,
    **{name: lambda name=name: variant(name) for name in ("qarepvgg", "qarepvgg_v2", "constant_scale", "dbb", "acb")},
}


def train(network, steps=3, observing=False):
    """A few steps with a learning rate at which integers change."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.02, momentum=0.9)
    network.train()
    network.observe(observing)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images(6, seed=20 + step)), torch.arange(6) % 5).backward()
        optimizer.step()
    return network.eval()


def layers_of(quantized):
    return {name: part for name, part in quantized.named_modules() if isinstance(part, QuantizedLayer)}


@pytest.mark.parametrize(
    "settings", [SETTINGS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in SETTINGS[1:])], ids=str
)
def test_training_starts_from_the_integers_of_a_quantization_afterwards(settings):
    model, calibration = tiny(), images(16)
    plain, _ = repvgg.reparameterize(model)
    settings = replace(settings, correct_biases=False, rounding_sweeps=0)
    network, report = prepare_qat(model, calibration, settings)
    expected = layers_of(quantize(plain, calibration, settings)[0])
    found = layers_of(network.to_integers())
    assert tuple(found) == tuple(expected) == report.layers
    assert report.merged == 5
    for name, layer in expected.items():
        # Scales by way of the clipping ratio: a rounding of float64, which seldom shows in float32.
        assert_close(found[name].weight_scale, layer.weight_scale, rtol=2.0**-23, atol=0)
        assert_close(found[name].input_scale, layer.input_scale, rtol=2.0**-22, atol=0)
        assert int((found[name].weight_integers.int() - layer.weight_integers.int()).abs().max()) <= 1
        assert (found[name].weight_integers != layer.weight_integers).double().mean() < 0.002


FAST = ("qarepvgg", "conv and batch norm", "merged kernels of RepOptimizer")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_the_simulation_is_the_integer_network(name):
    model = NETWORKS[name]()
    before = copy.deepcopy(model.state_dict())
    network, report = prepare_qat(model, images(16), QuantizationSettings(weight_bits=6))
    start = network.to_integers()
    train(network, steps=6, observing=True)  # adapted weights may be far inside of their integers
    integers, test = network.to_integers(), images(7, side=25, seed=9)
    assert report.untrained == 0
    assert all(p.grad is not None for p in network.parameters())
    assert max(layer.largest_sum for layer in network.layers.values()) < 2**24
    with torch.no_grad():
        assert_close(network(test), integers(test), rtol=0, atol=0)
    # Training has moved the integers, and only those of the copy.
    changed = [
        name for name, layer in layers_of(integers).items()
        if (layer.weight_integers != layers_of(start)[name].weight_integers).any()
    ]  # fmt: skip
    assert len(changed) > len(report.layers) / 2
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_float_form_after_training_is_that_of_the_integers():
    network = train(prepare_qat(tiny(), images(16), QuantizationSettings("per_channel", 8))[0])
    plain, _ = repvgg.reparameterize(network.train_form)
    test = images(7, seed=9)
    assert sqnr(plain(test), network.to_integers()(test)) > 25


def test_gradients_pass_the_rounding_and_stop_at_clipped_values():
    block = trained_like(BLOCKS["repvgg"].make(Geometry.square(4, 4)))
    conv, x = nn.Conv2d(4, 4, 3, padding=1), images(3)[:, :1].expand(-1, 4, -1, -1).clone().requires_grad_()
    quantizer = ActivationQuantizer.of_range(-1.0, 1.5)
    layer = FakeQuantLayer(conv, block, quantizer, QuantizationSettings("per_tensor", 4)).train()
    weights = torch.randn(3, 4, *x.shape[2:], generator=torch.Generator().manual_seed(1))
    (layer(x) * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in block.named_parameters()}

    integers = layer.to_integers()
    represented = quantizer.dequantize(quantizer.quantize(x.detach())).requires_grad_()
    kernel = (integers.weight_integers.float() * integers.weight_scale).requires_grad_()
    bias = (integers.bias_integers * integers.accumulator_scale).requires_grad_()
    (F.conv2d(represented, kernel, bias, padding=1) * weights).sum().backward()
    lowest, highest = quantizer.bounds
    half = quantizer.scale / 2
    inside = (x > lowest - half) & (x < highest + half)
    assert 0.1 < inside.double().mean() < 0.95
    assert_close(x.grad, represented.grad * inside, rtol=1e-4, atol=1e-5)

    merged = equivalent_conv(block)
    unclipped = merged.weight.detach().abs() <= integers.weight_scale * 7.5
    assert not unclipped.all()
    block.zero_grad()
    torch.autograd.backward([merged.weight, merged.bias], [kernel.grad * unclipped, bias.grad])
    for name, parameter in block.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, name=name: name + text)


def test_a_learned_range_follows_the_error_of_the_output():
    conv = nn.Conv2d(2, 3, 1, bias=False)
    x = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 3
    layer = FakeQuantLayer(
        conv, conv, ActivationQuantizer.of_range(0, 1), QuantizationSettings(), learn_range=True
    ).train()

    def loss():
        return (layer(x) - conv(x).detach()).square().sum()

    before = loss()
    before.backward()
    # Two thirds of the inputs are clipped: a wider range lowers the error.
    assert float(layer.log_factor.grad) < 0
    optimizer = torch.optim.SGD([layer.log_factor], 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert layer.quantizer.bounds[1] > 2.5
    assert loss().item() < 0.01 * before.item()
    assert layer.quantizer.zero_point == 0
    assert_close(layer(x), layer.to_integers()(x), rtol=0, atol=0)


def test_ranges_move_while_they_are_observed_and_statistics_never():
    def state(network):
        ranges = torch.stack([layer.highest for layer in network.layers.values()])
        means = torch.cat([m.running_mean for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
        return ranges.clone(), means.clone()

    network, _ = prepare_qat(tiny(), images(16), BARE)
    before = state(network)
    train(network)
    assert_close(state(network), before, rtol=0, atol=0)
    train(network, observing=True)
    assert (state(network)[0] != before[0]).all()
    assert_close(state(network)[1], before[1], rtol=0, atol=0)
    assert not any(m.training for m in network.train().modules() if isinstance(m, nn.BatchNorm2d))


def test_auxiliary_heads_are_not_trained():
    spec = ModelSpec("aux", Stage(1, 4), (Stage(1, 8), Stage(1, 8)), auxiliary=(0,))
    network, report = prepare_qat(tiny(spec), images(8), BARE)
    head = network.train_form.auxiliary
    assert report.untrained == sum(p.numel() for p in head.parameters()) > 0
    assert "not in the plain form" in str(report)
    assert not any(p.requires_grad for p in head.parameters())
    assert network.train()(images(2)).shape == (2, 5)


def test_a_file_gives_the_network_back(tmp_path):
    network = train(prepare_qat(tiny(), images(16), BARE)[0])
    integers, test = network.to_integers(), images(5, seed=9)
    file = save_quantized(tmp_path / "int8.safetensors", integers)
    plain, _ = repvgg.reparameterize(network.train_form)
    assert_close(load_quantized(file, plain)(test), integers(test), rtol=0, atol=0)
    other, _ = repvgg.reparameterize(variant("repvgg_no_identity"))
    load_quantized(file, other)  # the same architecture
    with pytest.raises(CheckpointError, match="does not have"):
        load_quantized(file, nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_onnx_runtime_computes_the_trained_integers(tmp_path):
    network = train(prepare_qat(tiny(), images(16), BARE)[0], observing=True)
    integers, test = network.to_integers(), images(6, seed=9)
    file = export_qdq(integers, tmp_path / "int8.onnx", tuple(test.shape[1:])).path
    simulated, plain = integers(test), repvgg.reparameterize(network.train_form)[0]
    for optimize in (False, True):
        # Scales are multiplied in another order, so that a sum halfway between two integers may go either way.
        assert sqnr(simulated, OnnxRunner(file, optimize=optimize)(test)) > sqnr(plain(test), simulated) + 6


@pytest.mark.parametrize("name", ["repvgg", pytest.param("qarepvgg", marks=pytest.mark.slow)])
def test_biases_start_corrected_to_the_float_means(name):
    model, calibration = NETWORKS[name](), images(16)
    settings = QuantizationSettings("per_tensor", 4, equalize=False, rounding_sweeps=0)
    network, report = prepare_qat(model, calibration, settings)
    assert report.corrected == len(report.layers) == 6
    plain, _ = repvgg.reparameterize(model)
    without, _ = prepare_qat(model, calibration, replace(settings, correct_biases=False))

    def means(net):
        found = {}
        for layer in report.layers:

            def keep(_, __, y, layer=layer):
                found[layer] = y.double().movedim(1, -1).flatten(0, -2).mean(0)

            net.get_submodule(layer).register_forward_hook(keep)
        return net(calibration), found

    with torch.no_grad():
        reference, expected = means(plain)
        corrected, found = means(network.eval().simulated)
        uncorrected, others = means(without.eval().simulated)
    for layer, fake in network.layers.items():
        left, was = ((one[layer] - expected[layer]).abs().max() for one in (found, others))
        # What is left is the rounding of biases to integers, of this layer and of those before it.
        assert left < fake.to_integers().accumulator_scale / 2 * (1 + 1e-4) + 0.1 * was, layer
    assert sqnr(reference, corrected) > sqnr(reference, uncorrected) + 3


def test_adaptive_rounding_is_where_training_starts():
    model, calibration = tiny(), images(16)
    settings = QuantizationSettings("per_channel", 4, equalize=False)
    network, report = prepare_qat(model, calibration, settings)
    assert report.rounded == len(report.layers) == 6
    plain, _ = repvgg.reparameterize(model)
    afterwards, _ = quantize(plain, calibration, settings)
    reference, start = plain(calibration), network.to_integers()(calibration)
    assert sqnr(reference, start) > sqnr(reference, afterwards(calibration)) - 1
    stem = layers_of(afterwards)["stem.conv"].weight_integers  # its input is the same in both
    assert_close(network.layers["stem.conv"].to_integers().weight_integers, stem, rtol=0, atol=0)
    nearest, _ = prepare_qat(model, calibration, replace(settings, rounding_sweeps=0))
    assert (nearest.layers["stem.conv"].to_integers().weight_integers != stem).any()


def test_little_memory_gives_the_same_start(monkeypatch):
    model, calibration = tiny(), images(16)
    settings = QuantizationSettings("per_channel", 4)
    together, report = prepare_qat(model, calibration, settings)
    runs = []
    monkeypatch.setattr(refinement, "run", lambda net, x: runs.append(len(x)) or run(net, x))
    monkeypatch.setattr(refinement, "MEMORY_BYTES", 5 * 12 * 8 * calibration[0, 0].numel())  # of maps of 8 channels
    in_parts, in_parts_report = prepare_qat(model, calibration, settings)
    assert max(runs) < len(calibration)
    assert sum(runs) == len(calibration) * report.rounded
    assert in_parts_report == report
    # Sums of integers are exact, so they are equal; means are added in float64, and parameters rounded to float32.
    for name, layer in layers_of(together.to_integers()).items():
        other = layers_of(in_parts.to_integers())[name]
        assert torch.equal(layer.weight_integers, other.weight_integers), name
        assert_close(layer.bias_integers, other.bias_integers, rtol=0, atol=1)


class Open(nn.Module):
    """Branches that meet in a forward, not in a module of their own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return (self.left(x) + self.right(x)).relu()


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(UsageError, match="branches meet in a forward"):
        prepare_qat(nn.Sequential(Open(), nn.Conv2d(4, 2, 1)).eval(), images(4))
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        prepare_qat(nn.Sequential(nn.ReLU()).eval(), images(4))
