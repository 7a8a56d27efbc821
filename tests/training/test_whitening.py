"""A stem that starts as whitened patches."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from train_helpers import CONFIG, fingerprint, opened, tiny

from repvgg.errors import UsageError
from repvgg.training import seeded, whiten
from repvgg.training.starting import starting_model
from repvgg.training.whitening import principal_patches


def correlated(seed, size=12):
    """Two batches whose neighbouring pixels and channels are alike, as those of photographs are."""
    with seeded(seed):
        mixed = torch.einsum("oi,nihw->nohw", torch.randn(3, 3), torch.randn(2, 40, 3, size, size).flatten(0, 1))
    return list((nn.functional.avg_pool2d(mixed, 3, 1, 1) + 0.1 * mixed).split(40))


def outputs_of(kernels, images):
    """(patches, kernels): one number for each kernel at each place."""
    return torch.cat([nn.functional.conv2d(batch.double(), kernels.double()) for batch in images]).transpose(0, 1)


def test_outputs_are_uncorrelated_and_sorted():
    images = correlated(0)
    components = principal_patches(images, 3)
    assert components.shape == (27, 3, 3, 3)
    found = outputs_of(components, images).flatten(1)
    moment = found @ found.T / found.shape[1]
    assert_close(moment, moment.diag().diag(), rtol=0, atol=1e-5 * float(moment.max()))
    assert moment.diag().diff().max() <= 1e-6
    assert moment[0, 0] > 20 * moment[-1, -1]  # there was something to whiten
    assert_close(components.flatten(1) @ components.flatten(1).T, torch.eye(27), rtol=0, atol=1e-5)
    assert (components.flatten(1).amax(1) == components.flatten(1).abs().amax(1)).all()


@pytest.mark.parametrize(("channels", "taken"), [(70, 54), (54, 54), (9, 9)])
def test_kernels_come_in_pairs_and_the_rest_stays(channels, taken):
    conv, images = nn.Conv2d(3, channels, 3, stride=2, bias=False), correlated(1)
    before = conv.weight.detach().clone()
    assert whiten(conv, iter(images)) == taken
    components = principal_patches(images, 3)
    assert_close(conv.weight[0:taken:2].detach(), components[: (taken + 1) // 2], rtol=0, atol=0)
    assert_close(conv.weight[1:taken:2].detach(), -components[: taken // 2], rtol=0, atol=0)
    assert_close(conv.weight[taken:].detach(), before[taken:], rtol=0, atol=0)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(3, 8, 3, dilation=2), nn.Conv2d(3, 8, (3, 1))]
)
def test_what_is_not_whitened(conv):
    before = conv.weight.detach().clone()
    with pytest.raises(UsageError, match="is not whitened"):
        whiten(conv, correlated(2))
    assert_close(conv.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("model", ["repvgg_t0", "repvgg_a0"])
def test_a_run_starts_with_it_the_same_each_time(model):
    config = replace(CONFIG, model=model, whitened_stem=True)
    start = starting_model(config, opened())
    other = starting_model(replace(config, whitened_stem=False), opened()).model.state_dict()
    same = {name for name, value in start.model.state_dict().items() if torch.equal(value, other[name])}
    assert set(other) - same == {"stem.conv.dense.conv.weight"}
    width = len(other["stem.conv.dense.conv.weight"])
    assert start.notes == (f"the stem starts with {width} whitened patches of training images",)
    assert fingerprint(starting_model(config, opened()).model) == fingerprint(start.model)


def test_a_checkpoint_keeps_its_stem():
    with pytest.raises(UsageError, match="leave out whitened_stem"):
        replace(CONFIG, init="a.safetensors", whitened_stem=True)


def test_small_images_and_other_channels():
    model = tiny(in_channels=1)
    assert whiten(model.stem.conv["dense"].conv, [torch.randn(50, 1, 3, 3)]) == 4
