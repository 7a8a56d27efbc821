import pytest
import torch
import torch.nn.functional as F
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch.testing import assert_close

from repvgg.data import DataConfig, open_data
from repvgg.data.sources.local import load_digits
from repvgg.errors import UsageError


@pytest.fixture(scope="module")
def digits():
    return load_digits(32)


def test_shapes_and_counts(digits):
    assert (digits.pixels.shape, digits.pixels.dtype) == ((1797, 1, 32, 32), torch.float32)
    assert (len(digits.train), len(digits.val)) == (1437, 360)
    assert sorted(digits.train.tolist() + digits.val.tolist()) == list(range(1797))
    assert 0 <= digits.pixels.min() < digits.pixels.max() <= 1


def test_split_is_stratified(digits):
    of_all = torch.tensor(datasets.load_digits().target).bincount()
    of_val = digits.labels[digits.val].bincount(minlength=10)
    assert ((of_val - of_all * 0.2).abs() < 1).all()


def test_size_8_returns_the_original_scans():
    scans = load_digits(8)
    assert_close(16 * scans.pixels[:, 0], torch.tensor(datasets.load_digits().images).float(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [8, 24])
def test_open_data_equals_a_pipeline_of_scikit_learn_and_torch(size):
    raw = datasets.load_digits()
    images = F.interpolate(torch.tensor(raw.images).float()[:, None] / 16, size=(size, size), mode="bilinear")
    parts = train_test_split(range(1797), test_size=0.2, stratify=raw.target, random_state=0)
    train, val = (sorted(part) for part in parts)
    mean, std = images[train].mean(), images[train].std(correction=0)
    data = open_data(DataConfig(train_size=size))
    assert data.input_shape == (1, size, size)
    assert data.classes == tuple("0123456789")
    assert_close(torch.tensor((*data.mean, *data.std)), torch.stack((mean, std)))
    ((found, labels),) = data.val_batches(360)
    assert_close(data.prepare(found), (images[val] - mean) / std)
    assert_close(labels, torch.tensor(raw.target[val]))
    ((found, labels),) = data.train_batches(1437)  # shuffled, so only sums can be compared
    assert_close(data.prepare(found).sum(), ((images[train] - mean) / std).sum(), rtol=0, atol=0.5)
    assert_close(labels.bincount(), torch.tensor(raw.target[train]).bincount())


def test_loading_is_deterministic_and_leaves_the_random_state(digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = load_digits(32)
    assert_close(torch.get_rng_state(), before)
    assert_close(again.pixels, digits.pixels, rtol=0, atol=0)
    assert_close(again.val, digits.val)


def test_to_pixels_inverts_the_normalization():
    data = open_data(DataConfig())
    images, _ = data.val_images(range(5))
    shown = data.to_pixels(images)
    assert 0 <= shown.min() < shown.max() <= 1
    assert_close((shown - data.mean[0]) / data.std[0], images)


def test_sizes_below_8_are_rejected():
    with pytest.raises(UsageError, match="size 7"):
        load_digits(7)
