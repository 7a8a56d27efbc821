import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from repvgg.data import AffineJitter, Augment, DataConfig
from repvgg.data.batch_ops import BatchOps, erase_squares, pad_crop_flip
from repvgg.data.drawing import CROP_LANE, POLICY_LANE, drawing_for
from repvgg.data.image_ops import CentreCrop, PolicyOps, RandomCrop
from repvgg.data.parts import to_image
from tests.data.helpers import noise


def pixels(n=8, channels=3, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8)


def ops(augment, seed=0, channels=3):
    return BatchOps(augment, seed, (0.0,) * channels, (120.0,) * channels)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(10, 13), st.integers(10, 14), st.integers(0, 2**31))
def test_pad_crop_flip_is_what_torchvision_does(padding, height, width, seed):
    images = pixels(4, 3, height, width, seed)
    generator = torch.Generator().manual_seed(seed)
    draws, flip = torch.rand(4, 2, generator=generator), torch.rand(4, generator=generator) < 0.5
    out = pad_crop_flip(images, padding, draws, flip)
    for index in range(4):
        top, left = (int(draw * (2 * padding + 1)) for draw in draws[index])
        padded = TF.pad(images[index], [padding] * 4, padding_mode="reflect")
        expected = TF.crop(padded, top, left, height, width)
        expected = TF.horizontal_flip(expected) if flip[index] else expected
        assert_close(out[index], expected, atol=0, rtol=0)


def test_every_offset_and_both_sides_occur():
    images = torch.arange(11 * 11, dtype=torch.uint8).reshape(1, 1, 11, 11).expand(4000, 1, 11, 11).contiguous()
    out = ops(Augment(crop="pad", crop_padding=2, flip=0.25), channels=1).move(images, 0, torch.arange(4000))
    centres, counts = out[:, 0, 5, 5].unique(return_counts=True)
    assert set(centres.tolist()) == {11 * y + x for y in range(3, 8) for x in range(3, 8)}
    assert 100 < counts.min() <= counts.max() < 230
    flipped = (out[:, 0, 5, 5] > out[:, 0, 5, 6]).float().mean()
    assert 0.22 < flipped < 0.28


def test_flipping_alone():
    images, keys = pixels(300), torch.arange(300)
    out = ops(Augment(flip=0.3)).move(images, 0, keys)
    flipped = (out == images.flip(3)).all(3).all(2).all(1)
    kept = (out == images).all(3).all(2).all(1)
    assert (flipped ^ kept).all()
    assert 60 < flipped.sum() < 120
    padded = ops(Augment(flip=0.3, crop="pad", crop_padding=0)).move(images, 0, keys)
    assert_close(padded, out, atol=0, rtol=0)


def test_squares_are_greyed_out():
    images = torch.zeros(3000, 1, 12, 12, dtype=torch.uint8)
    out = ops(Augment(erase=0.5, erase_size=1 / 3), channels=1).erase(images, 0, torch.arange(3000))
    grey = (out == 120).sum((1, 2, 3))
    assert 0.46 < (grey > 0).float().mean() < 0.54
    assert grey.max() == 16
    assert int(grey[grey > 0].min()) == 4  # half of it lies beyond a corner
    assert set(out.unique().tolist()) == {0, 120}
    assert (images == 0).all()


def test_where_a_square_lies():
    images = pixels(2, 3, 8, 8)
    out = erase_squares(images, torch.tensor([1]), torch.tensor([[0.5, 0.999]]), 0.5, (1.0, 2.0, 3.0))
    expected = images.clone()
    expected[1, :, 2:6, 5:8] = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(3, 1, 1)
    assert_close(out, expected, atol=0, rtol=0)


def test_jitter_keeps_the_kind_of_the_images():
    images, keys = pixels(6, 3, 16, 16), torch.arange(6)
    augment = Augment(jitter=AffineJitter(20, 0.1, 0.2))
    out = ops(augment).move(images, 0, keys)
    as_float = BatchOps(augment, 0, (0.0,) * 3, (0.0,) * 3).move(images.float(), 0, keys)
    assert (out.dtype, as_float.dtype) == (torch.uint8, torch.float32)
    assert_close(out.float(), as_float, atol=0.5, rtol=0)
    assert (out != images).float().mean() > 0.5


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop="pad", flip=0.5, erase=0.5),
        Augment(jitter=AffineJitter(20, 0.1, 0.2), flip=0.5),
    ],
)
def test_an_image_does_not_feel_its_neighbours(augment):
    images, keys = pixels(12), torch.arange(100, 112)
    done = ops(augment, seed=3)
    whole = done.erase(done.move(images, 5, keys), 5, keys)
    some = torch.tensor([7, 2, 11])
    assert_close(done.erase(done.move(images[some], 5, keys[some]), 5, keys[some]), whole[some], atol=0, rtol=0)
    assert not torch.equal(done.erase(done.move(images, 6, keys), 6, keys), whole)


def test_without_augmentation_nothing_changes():
    images = pixels()
    assert ops(Augment()).move(images, 0, torch.arange(8)) is images
    assert ops(Augment()).erase(images, 0, torch.arange(8)) is images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 37), (37, 50), (24, 24), (100, 31)])
def test_centre_crop_is_what_torchvision_does(interpolation, size):
    image = noise(0, size)
    config = DataConfig(interpolation=interpolation, crop_fraction=0.875)
    ours = CentreCrop(config, 28, 3)(image, "here")
    peer = v2.Compose([v2.Resize(32, InterpolationMode(interpolation)), v2.CenterCrop(28), v2.PILToTensor()])
    assert_close(ours, peer(image), atol=0, rtol=0)


def test_images_of_the_right_size_stay_as_they_are():
    image = noise(0, (28, 28))
    assert_close(CentreCrop(DataConfig(), 28, 3)(image, "here"), v2.PILToTensor()(image), atol=0, rtol=0)


def test_random_crops_are_those_of_torchvision():
    config = DataConfig(augment=Augment(crop="random-resized", crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0)))
    crop, image = RandomCrop(config, 20, 3, seed=4), noise(0, (50, 40))
    peer = v2.Compose([v2.RandomResizedCrop(20, (0.2, 0.6), (0.5, 2.0)), v2.PILToTensor()])
    for epoch, key in ((0, 0), (0, 1), (1, 0)):
        with drawing_for(4, epoch, key, CROP_LANE):
            expected = peer(image)
        assert_close(crop(image, "here", epoch, key), expected, atol=0, rtol=0)


PEERS = {
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR),
    "autoaugment-cifar10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, InterpolationMode.BILINEAR),
    "randaugment": v2.RandAugment(3, 12, interpolation=InterpolationMode.BILINEAR),
    "trivialaugment": v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
}


@pytest.mark.parametrize("policy", PEERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_those_of_torchvision(policy, channels):
    images, keys = pixels(20, channels, 24, 24), torch.arange(20)
    augment = Augment(policy=policy, randaugment_ops=3, randaugment_magnitude=12)
    out = PolicyOps(augment, "bilinear", seed=1)(images, 2, keys)
    for image, key, ours in zip(images, keys.tolist(), out, strict=True):
        with drawing_for(1, 2, key, POLICY_LANE):
            expected = TF.pil_to_tensor(PEERS[policy](to_image(image)))
        assert_close(ours, expected, atol=0, rtol=0)
    assert (out != images).flatten(1).any(1).sum() > 8
