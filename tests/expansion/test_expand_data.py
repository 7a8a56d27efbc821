"""Statistics from data: eval mode is unchanged, and training mode starts close to it."""

import pytest
import torch
from torch import nn

import repvgg
from repvgg.errors import UsageError
from repvgg.expansion.statistics import ChannelStatistics
from tests.expansion.models import assert_same_outputs, image, module, trained, untouched, vgg


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eval_mode_is_unchanged_and_training_mode_starts_close(dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    model, x = trained(vgg(), dtype), image(batch=6, dtype=dtype)
    expanded, _ = untouched(repvgg.expand, model, data=x)
    assert_same_outputs(model, expanded, x, image(3, 16, 11, dtype=dtype), tolerance=tolerance)
    wanted = model(x).detach()
    torch.testing.assert_close(expanded.train()(x), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    fresh, _ = repvgg.expand(model)
    assert float((fresh.train()(x) - wanted).detach().abs().max()) > 0.05


def test_statistics_weight_all_batches_equally():
    model, x = trained(vgg()), image(batch=7)
    expanded, _ = repvgg.expand(model, data=[x[:1], (x[1:3], torch.arange(2)), x[3:]])
    block = expanded[0]
    seen = block["dense"].conv(x)
    torch.testing.assert_close(block["dense"].bn.running_mean, seen.mean((0, 2, 3)).detach())
    torch.testing.assert_close(block["dense"].bn.running_var, seen.var((0, 2, 3), correction=0).detach())
    assert block["dense"].bn.num_batches_tracked == 3
    assert_same_outputs(model, expanded, x)


def test_statistics_of_batches_of_other_sizes():
    statistics, batches = ChannelStatistics(), [image(3, 5, 7), image(3, 2, 9, seed=2), image(3)[:0]]
    for batch in batches:
        statistics.add(batch)
    pixels = torch.cat([batch.movedim(1, -1).flatten(0, 2) for batch in batches])
    torch.testing.assert_close(statistics.mean_C, pixels.mean(0))
    torch.testing.assert_close(statistics.variance, pixels.var(0, correction=0))
    assert (statistics.batches, statistics.count) == (2, len(pixels))


def test_a_batch_of_float32_for_a_model_of_another_dtype():
    model = trained(vgg(), torch.bfloat16)
    expanded, _ = untouched(repvgg.expand, model, data=image(dtype=torch.float32))
    assert_same_outputs(model, expanded, image(dtype=torch.bfloat16), tolerance=5e-2)


def test_blocks_that_the_data_never_reaches_keep_their_statistics():
    parts = {"a": nn.Conv2d(3, 3, 3, padding=1), "aside": nn.Conv2d(3, 3, 3, padding=1)}
    model = trained(module(lambda self, x: self.a(x), **parts))
    expanded, report = untouched(repvgg.expand, model, data=image())
    assert len(report.expanded) == 2
    fresh = expanded.aside["dense"].bn
    torch.testing.assert_close(fresh.running_var, torch.ones_like(fresh.running_var), rtol=0, atol=0)
    assert (fresh.num_batches_tracked, expanded.a["dense"].bn.num_batches_tracked) == (0, 1)
    assert_same_outputs(model.aside, expanded.aside, image())


def test_existing_norms_keep_their_statistics():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    expanded, _ = untouched(repvgg.expand, model, data=image())
    torch.testing.assert_close(expanded[1].state_dict(), model[1].state_dict(), rtol=0, atol=0)


def test_dead_channels():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, -1
    x = image(batch=4)
    expanded, report = repvgg.expand(model, data=x)
    assert len(report.expanded) == 2
    assert float(expanded[2]["identity"].running_var[1]) < 1e-20
    assert_same_outputs(model, expanded, x)
    torch.testing.assert_close(expanded.train()(x), model(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("verb", [lambda model, data: repvgg.expand(model, data=data), repvgg.insert_bn])
def test_invalid_data_raises(verb):
    with pytest.raises(UsageError, match="There is no data"):
        verb(trained(vgg()), [])
    with pytest.raises(UsageError, match="not a str"):
        verb(trained(vgg()), ["an image"])
