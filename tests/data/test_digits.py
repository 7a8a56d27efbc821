import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.testing import assert_close

from repvgg.data import DataConfig, open_data
from repvgg.data.digits import digit_pixels
from repvgg.errors import UsageError


@pytest.fixture(scope="module")
def pixels():
    return digit_pixels(32)


def test_shapes_and_counts(pixels):
    assert (pixels.pixels.shape, pixels.pixels.dtype) == ((1797, 1, 32, 32), torch.float32)
    assert (len(pixels.train), len(pixels.held_out)) == (1437, 360)
    assert sorted(pixels.train.tolist() + pixels.held_out.tolist()) == list(range(1797))
    assert 0 <= pixels.pixels.min() < pixels.pixels.max() <= 1


def test_split_is_stratified(pixels):
    of_all = torch.tensor(load_digits().target).bincount()
    of_held_out = pixels.labels[pixels.held_out].bincount(minlength=10)
    assert ((of_held_out - of_all * 0.2).abs() < 1).all()


def test_scans_are_what_they_were():
    scans = digit_pixels(8)
    assert_close(16 * scans.pixels[:, 0], torch.tensor(load_digits().images).float(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [8, 24])
def test_opened_ones_are_the_same_images(size):
    """The way from scikit-learn to what a model takes once more, with nothing of ours."""
    raw = load_digits()
    images = F.interpolate(torch.tensor(raw.images).float()[:, None] / 16, size=(size, size), mode="bilinear")
    parts = train_test_split(range(1797), test_size=0.2, stratify=raw.target, random_state=0)
    train, held_out = (sorted(part) for part in parts)
    mean, std = images[train].mean(), images[train].std(correction=0)
    data = open_data(DataConfig(train_size=size))
    assert data.input_shape == (1, size, size)
    assert data.classes == tuple("0123456789")
    assert_close(torch.tensor((*data.mean, *data.std)), torch.stack((mean, std)))
    ((found, labels),) = data.held_out_batches(360)
    assert_close(data.prepare(found), (images[held_out] - mean) / std)
    assert_close(labels, torch.tensor(raw.target[held_out]))
    ((found, labels),) = data.train_batches(1437)  # in the order of the epoch
    assert_close(data.prepare(found).sum(), ((images[train] - mean) / std).sum(), rtol=0, atol=0.5)
    assert_close(labels.bincount(), torch.tensor(raw.target[train]).bincount())


def test_always_the_same_and_without_a_trace_in_the_random_state(pixels):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = digit_pixels(32)
    assert_close(torch.get_rng_state(), before)
    assert_close(again.pixels, pixels.pixels, rtol=0, atol=0)
    assert_close(again.held_out, pixels.held_out)


def test_pixels_come_back():
    data = open_data(DataConfig())
    images, _ = data.held_out_images(range(5))
    shown = data.to_pixels(images)
    assert 0 <= shown.min() < shown.max() <= 1
    assert_close((shown - data.mean[0]) / data.std[0], images)


def test_too_small():
    with pytest.raises(UsageError, match="size 7"):
        digit_pixels(7)
