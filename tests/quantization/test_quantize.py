import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.errors import UsageError
from repvgg.quantization import (
    ActivationQuantizer,
    Histogram,
    PairedAccuracy,
    QualityMeter,
    QuantizationSettings,
    Reference,
    adapt_rounding,
    choose_quantizer,
    compare_outputs,
    in_batches,
    quantize,
    quantize_layer,
    quantize_weight,
    refinement,
    sqnr,
)
from repvgg.quantization.adaptive_rounding import _second_moments, _unfold
from repvgg.quantization.affine import PAIR_BOUND, adjacent_weights
from repvgg.quantization.calibration import run
from tests.quantization.networks import NETWORKS, Chain, Residual, images, random_

FULL = QuantizationSettings()
NEAREST = QuantizationSettings(equalize=False, correct_biases=False, rounding_sweeps=0, ranges="minmax")


def test_zero_is_represented_exactly():
    for low, high in ((-1.3, 2.7), (0.5, 3.0), (-4.0, -1.0), (0.0, 0.0)):
        quantizer = ActivationQuantizer.of_range(low, high)
        assert float(quantizer.dequantize(quantizer.quantize(torch.zeros(1)))) == 0
        below, above = quantizer.bounds
        assert below <= min(low, 0) + quantizer.scale
        assert above >= max(high, 0) - quantizer.scale


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", [8, 7, 4])
def test_weights_are_rounded_to_the_nearest_integer(granularity, bits):
    weight = random_(nn.Conv2d(6, 8, 3)).weight
    quantized = quantize_weight(weight, granularity, bits, clip=False)
    highest = 2 ** (bits - 1) - 1
    assert int(quantized.integers.abs().max()) == highest
    error = (quantized.dequantize() - weight).abs().flatten(1).amax(1)
    assert (error <= quantized.scale / 2 * (1 + 1e-5)).all()
    clipped = quantize_weight(weight, granularity, bits)
    assert sqnr(weight, clipped.dequantize()) >= sqnr(weight, quantized.dequantize())


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2), nn.Conv2d(6, 6, 3, groups=6)],
    ids=["strided", "dilated", "depthwise"],
)
def test_a_layer_computes_what_its_integers_say(layer):
    random_(layer)
    x = torch.randn(2, 6, 9, 11)
    quantizer = ActivationQuantizer.of_range(float(x.min()), 0.9 * float(x.max()))
    quantized = quantize_layer(layer, quantizer, "per_channel")
    as_float = quantizer.dequantize(quantizer.quantize(x)).double()
    weight = quantized.weight_integers.double() * quantized.weight_scale.double().reshape(-1, 1, 1, 1)
    bias = quantized.bias_integers.double() * quantized.accumulator_scale.double()
    expected = F.conv2d(as_float, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    # Three roundings to float32 after the exact sum: of the sum, of the scale and of the product.
    assert_close(quantized(x).double(), expected, rtol=4 * 2**-24, atol=1e-6)


def test_a_channel_of_zeros_keeps_its_bias():
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[1] = 100.0
    for granularity in ("per_channel", "per_tensor"):
        quantized = quantize_layer(layer, ActivationQuantizer.of_range(0, 1), granularity)
        assert_close(quantized(torch.rand(1, 3, 5, 5))[:, 1], torch.full((1, 3, 3), 100.0))


@pytest.mark.parametrize("network", NETWORKS)
def test_every_step_brings_the_network_closer(network):
    model, calibration, test = random_(NETWORKS[network]()), images(24), images(24, seed=9)
    expected = model(test)
    plain, first = quantize(model, calibration, NEAREST)
    full, report = quantize(model, calibration, FULL)
    assert sqnr(expected, full(test)) > sqnr(expected, plain(test))
    assert {layer.name for layer in report.layers} == {layer.name for layer in first.layers}
    assert not report.skipped
    assert all(layer.sqnr_alone > 10 for layer in report.layers)


@torch.no_grad()
def test_a_network_of_zeros_stays_one():
    model = nn.Conv2d(3, 4, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    quantized, report = quantize(nn.Sequential(model).eval(), torch.zeros(2, 3, 8, 8))
    assert not quantized(torch.zeros(1, 3, 8, 8)).any()
    assert all(math.isfinite(layer.bias_correction) for layer in report.layers)


def test_biases_are_corrected_to_the_float_means():
    model, calibration = random_(Chain()), images(32)
    settings = QuantizationSettings("per_tensor", equalize=False, rounding_sweeps=0)
    quantized, _ = quantize(model, calibration, settings)
    means = quantized(calibration).mean(0)
    assert_close(means, model(calibration).mean(0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_adaptive_rounding_lowers_the_output_error():
    layer, x = random_(nn.Conv2d(6, 8, 3, padding=1, groups=2)), torch.randn(16, 6, 9, 9).relu()
    quantized = quantize_layer(layer, ActivationQuantizer.of_range(0, float(x.max())), "per_channel", bits=4)
    exact = quantized.quantizer.dequantize(quantized.quantizer.quantize(x))
    before = float((quantized(x) - layer(exact)).square().sum())
    ratio = adapt_rounding(quantized, layer.weight, [x], highest=7)
    after = float((quantized(x) - layer(exact)).square().sum())
    assert after < before
    assert ratio < 1
    assert int(quantized.weight_integers.abs().max()) <= 7


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3, 2, 1, groups=2), nn.Linear(21, 4)], ids=["grouped", "linear"])
def test_moments_are_exact_however_inputs_are_divided(layer):
    x = 3 * torch.randn(50, 6, 19, 21, generator=torch.Generator().manual_seed(0))
    quantized = quantize_layer(layer, ActivationQuantizer.of_range(-9, 12), "per_channel")
    groups = getattr(layer, "groups", 1)
    one, several = (torch.stack(_second_moments(quantized, parts, groups)) for parts in ([x], torch.split(x, 7)))
    assert torch.equal(one, several)
    columns = quantized.centred_input(x)
    if groups > 1:
        columns = _unfold(columns, quantized).movedim(1, 0).reshape(groups, 27, -1)
    else:
        columns = columns.reshape(-1, 21).T[None]
    expected = columns @ columns.mT * float(quantized.input_scale) ** 2
    expected += 0.01 * torch.diag_embed(
        expected.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(groups, len(one[0]))
    )
    assert_close(one, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 3, 3, 3), (8, 1, 3, 3), (8, 15)], ids=str)
def test_adjacent_weights_stay_in_their_bound(granularity, shape):
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5  # all large and of one sign
    bounded = quantize_weight(weight, granularity, pair_bound=True)
    free = quantize_weight(weight, granularity)
    # What the kernels of CPUs without VNNI add in 16 bits: products of 255 with two weights that follow each other in
    # the order (position, input channel).
    in_order = [one.integers.int().reshape(*shape[:2], -1).transpose(1, 2).flatten(1) for one in (bounded, free)]
    pairs, free_pairs = (255 * (one[:, :-1:2] + one[:, 1::2]) for one in in_order)
    assert int(pairs.max()) <= 2**15 - 1 < int(free_pairs.max())
    # Twice the scale of the whole range, which is that of 7 bits, would do for every weight.
    seven = quantize_weight(weight, granularity, 7)
    assert sqnr(weight, bounded.dequantize()) >= sqnr(weight, seven.dequantize()) - 0.1
    partner = adjacent_weights(shape)
    assert torch.equal(partner[partner], torch.arange(len(partner)))


@torch.no_grad()
def test_adaptive_rounding_keeps_the_bound():
    layer, x = nn.Conv2d(6, 8, 3, padding=1), torch.randn(16, 6, 9, 9).relu()
    layer.weight.copy_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    quantizer = ActivationQuantizer.of_range(0, float(x.max()))
    quantized = quantize_layer(layer, quantizer, "per_channel", pair_bound=True)
    before = quantized.weight_integers.clone()
    assert adapt_rounding(quantized, layer.weight, [x], pair_bound=True) < 1
    assert not torch.equal(before, quantized.weight_integers)
    in_order = quantized.weight_integers.int().flatten(2).transpose(1, 2).flatten(1)
    assert int((in_order[:, ::2] + in_order[:, 1::2]).abs().max()) <= PAIR_BOUND


def test_little_memory_changes_nothing_that_matters(monkeypatch):
    model, calibration, test = random_(Residual()), images(24), images(24, seed=9)
    expected = model(test)
    together, _ = quantize(model, calibration)
    runs = []
    monkeypatch.setattr(refinement, "run", lambda net, x: runs.append(len(x)) or run(net, x))
    monkeypatch.setattr(refinement, "MEMORY_BYTES", 5 * 12 * 24 * calibration[0, 0].numel())  # of maps of 24 channels
    in_parts, report = quantize(model, calibration)
    assert max(runs) < len(calibration)
    assert sum(runs) == len(calibration) * len(report.layers)
    # Only the order of float additions differs, so that weights halfway between two integers may go either way.
    assert abs(sqnr(expected, together(test)) - sqnr(expected, in_parts(test))) < 1
    assert all(layer.rounding_error_ratio <= 1 and layer.bias_correction is not None for layer in report.layers)


def test_masks_are_compared_by_iou():
    truth = torch.tensor([[[0, 1, 1, 255]]])
    reference = F.one_hot(torch.tensor([[[0, 1, 1, 0]]]), 3).movedim(3, 1).float()
    candidate = F.one_hot(torch.tensor([[[0, 1, 0, 1]]]), 3).movedim(3, 1).float()
    meter = QualityMeter()
    meter.add(reference, candidate, truth)
    quality = meter.quality
    assert (quality.agreement, quality.images, quality.accuracy) == (0.5, 1, None)
    assert quality.segmentation.reference.miou == 1
    assert quality.segmentation.difference == pytest.approx((1 / 2 + 1 / 2) / 2 - 1)  # the third class is absent
    assert "mIoU 50.00%, reference 100.00%: -50.00 points" in str(quality)


def test_the_float_network_runs_once_for_any_number_of_comparisons():
    calls = []
    model = random_(Chain())
    model.register_forward_hook(lambda *_: calls.append(1))
    reference = Reference(model, in_batches(images(5), torch.arange(5), size=2))
    assert reference.shape == (3, 21, 23)
    first, second = (reference.compare(lambda x: torch.zeros(len(x), 5)) for _ in range(2))
    assert first == second
    assert first.accuracy.images == 5
    assert len(calls) == 3
    few = reference.first(3)
    assert [len(batch.images) for batch in few] == [len(batch.outputs) for batch in few] == [2, 1]
    assert few.compare(lambda x: torch.zeros(len(x), 5)).accuracy.images == 3
    assert len(calls) == 3
    assert Reference(model, in_batches(images(5), size=2)).first(3).compare(model).images == 3
    assert len(calls) == 3 + 2 * 2


def test_rescaled_channels_come_back():
    model, calibration, test = random_(Chain()), images(24), images(24, seed=9)
    rescaled = random_(Chain())
    with torch.no_grad():
        scales = 10 ** torch.empty(8).uniform_(-3, 3, generator=torch.Generator().manual_seed(0))
        rescaled.body[0].weight.mul_(scales.reshape(-1, 1, 1, 1))
        rescaled.body[0].bias.mul_(scales)
        rescaled.body[2].weight.div_(scales.reshape(1, -1, 1, 1))
    expected = model(test)
    assert_close(rescaled(test), expected, rtol=1e-3, atol=1e-4)
    ours, theirs = (sqnr(expected, quantize(net, calibration)[0](test)) for net in (model, rescaled))
    broken = sqnr(expected, quantize(rescaled, calibration, NEAREST)[0](test))
    assert abs(ours - theirs) < 0.5
    assert broken < theirs - 10


def test_inputs_are_left_as_they_are():
    model, calibration = random_(Chain()), images(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = calibration.clone()
    quantize(model, calibration)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(copy, calibration)
    assert not any(module._forward_hooks for module in model.modules())


def test_batch_norms_stay_in_float32_and_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1))
    quantized, report = quantize(model.eval(), images(4))
    assert report.skipped == {
        "1": "it is a batch norm: call repvgg.reparameterize first, which folds most of them",
        "2": "its padding mode is 'reflect', not zeros",
    }
    assert "in float32: 2, because its padding mode is 'reflect', not zeros" in str(report)
    assert isinstance(quantized[2], nn.Conv2d)


def test_a_histogram_keeps_extremes_and_counts():
    histogram, x = Histogram(), torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    histogram.observe_range(x)
    histogram.count(x)
    assert float(histogram.counts.sum()) == len(x)
    full = choose_quantizer(histogram, "minmax")
    tight = choose_quantizer(histogram, "percentile", 99.0)
    assert histogram.clipped_share(full) < 1e-3
    assert 0.01 < histogram.clipped_share(tight) < 0.03
    best = choose_quantizer(histogram, "mse")
    errors = [float((q.dequantize(q.quantize(x)) - x).square().sum()) for q in (best, full, tight)]
    assert errors[0] <= min(errors[1:]) * 1.001


def test_quality_of_outputs():
    reference = torch.eye(4)
    candidate = torch.eye(4)[[0, 1, 2, 2]]
    quality = compare_outputs(reference, candidate, torch.tensor([0, 1, 2, 3]))
    assert quality.agreement == 0.75
    assert quality.sqnr == pytest.approx(10 * math.log10(4 / 2))
    assert quality.accuracy == PairedAccuracy(4, 3, 1, 0, 4)
    assert quality.accuracy.difference == -0.25
    low, high = quality.accuracy.interval
    assert low < -0.25 < high
    assert sqnr(reference, reference) == math.inf


@pytest.mark.parametrize(
    ("model", "calibration", "sentence"),
    [
        (nn.Sequential(nn.ReLU()), images(2), "no convolution or linear layer"),
        (nn.Conv2d(3, 4, 3), images(2), "give nn.Sequential"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), [], "Calibration images are a tensor"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(3, 8, 8), "got the shape"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.full((1, 3, 8, 8), torch.nan), "NaN or infinite"),
    ],
)
def test_bad_input_is_refused(model, calibration, sentence):
    with pytest.raises(UsageError, match=sentence):
        quantize(model.eval(), calibration)


@pytest.mark.parametrize(
    "bad", [{"granularity": "x"}, {"weight_bits": 9}, {"ranges": "x"}, {"percentile": 50}, {"rounding_sweeps": -1}]
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UsageError):
        QuantizationSettings(**bad)


def test_is_public():
    assert repvgg.quantize is quantize
