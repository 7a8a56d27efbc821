import pytest
import torch
from sklearn.datasets import load_digits
from torch.testing import assert_close

from repvgg.data import ImagesInMemory, ImageSplit, digits
from repvgg.errors import DataError, UsageError


@pytest.fixture(scope="module")
def split():
    return digits()


def test_shapes_and_counts(split):
    assert split.input_shape == (1, 32, 32)
    assert split.train.images.shape == (1437, 1, 32, 32)
    assert split.held_out.images.shape == (360, 1, 32, 32)
    assert split.train.images.dtype == torch.float32
    assert split.classes == tuple("0123456789")
    image, label = split.held_out[3]
    assert_close(image, split.held_out.images[3])
    assert label == split.held_out.labels[3]


def test_training_part_is_normalized(split):
    assert_close(split.train.images.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert_close(split.train.images.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert abs(float(split.held_out.images.mean())) > 1e-4  # its statistics play no part


def test_split_is_stratified(split):
    of_all = torch.tensor(load_digits().target).bincount()
    of_held_out = split.held_out.labels.bincount(minlength=10)
    assert ((of_held_out - of_all * 0.2).abs() < 1).all()


def test_no_image_is_lost_or_in_both_parts():
    split = digits(8)
    both = torch.cat((split.train.images, split.held_out.images))
    rows = sorted(tuple((16 * split.to_pixels(image)).round().int().flatten().tolist()) for image in both)
    scans = sorted(tuple(scan.flatten().astype(int).tolist()) for scan in load_digits().images)
    assert rows == scans


def test_always_the_same_and_without_a_trace_in_the_random_state(split):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = digits()
    assert_close(torch.get_rng_state(), before)
    assert_close(again.train.images, split.train.images, rtol=0, atol=0)
    assert_close(again.held_out.labels, split.held_out.labels)


def test_pixels_come_back(split):
    images = split.held_out.images[:5]
    pixels = split.to_pixels(images)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert_close(split.normalize(pixels), images)
    assert_close(split.normalize(torch.zeros(1, 2, 2)), torch.full((1, 2, 2), split.black[0]))


def test_too_small():
    with pytest.raises(UsageError, match="size 7"):
        digits(7)


IMAGES, LABELS = torch.zeros(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES[0], LABELS),
        (IMAGES.double(), LABELS),
        (IMAGES[:0], LABELS[:0]),
        (IMAGES, LABELS[:2]),
        (IMAGES, LABELS.float()),
    ],
)
def test_images_in_memory_refuses(images, labels):
    with pytest.raises(DataError):
        ImagesInMemory(images, labels)


@pytest.mark.parametrize(
    "wrong", [{"classes": ("a",)}, {"mean": (0.0,)}, {"std": (1.0, 1.0, 1.0)}, {"std": (1.0, 0.0)}, {"train": []}]
)
def test_split_refuses(wrong):
    part = ImagesInMemory(IMAGES, LABELS)
    good = {
        "name": "test",
        "train": part,
        "held_out": part,
        "classes": ("a", "b"),
        "mean": (0.0, 0.0),
        "std": (1.0, 1.0),
        "input_shape": (2, 4, 4),
    }
    ImageSplit(**good)
    with pytest.raises(DataError, match="test"):
        ImageSplit(**(good | wrong))
