import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from repvgg.data import AffineJitter, Augment, DataConfig
from repvgg.data.counter_rng import CROP_STREAM, POLICY_STREAM, image_rng
from repvgg.data.decode import to_pil
from repvgg.data.transforms import (
    BatchTransforms,
    CenterCrop,
    PolicyTransform,
    RandomResizedCrop,
    erase_squares,
    jitter_matrices,
    pad_crop_flip,
    sample_affine,
)
from repvgg.errors import UsageError
from tests.data.helpers import noise


def pixels(n=8, channels=3, height=12, width=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8)


def transforms(augment, seed=0, channels=3):
    return BatchTransforms(augment, seed, (0.0,) * channels, (120.0,) * channels)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(10, 13), st.integers(10, 14), st.integers(0, 2**31))
def test_pad_crop_flip_equals_torchvision(padding, height, width, seed):
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


def test_every_offset_and_flip_occurs():
    images = torch.arange(11 * 11, dtype=torch.uint8).reshape(1, 1, 11, 11).expand(4000, 1, 11, 11).contiguous()
    out = transforms(Augment(crop="pad", crop_padding=2, flip=0.25), channels=1).jitter_crop_flip(
        images, 0, torch.arange(4000)
    )
    centres, counts = out[:, 0, 5, 5].unique(return_counts=True)
    assert set(centres.tolist()) == {11 * y + x for y in range(3, 8) for x in range(3, 8)}
    assert 100 < counts.min() <= counts.max() < 230
    flipped = (out[:, 0, 5, 5] > out[:, 0, 5, 6]).float().mean()
    assert 0.22 < flipped < 0.28


def test_flip_alone():
    images, keys = pixels(300), torch.arange(300)
    out = transforms(Augment(flip=0.3)).jitter_crop_flip(images, 0, keys)
    flipped = (out == images.flip(3)).all(3).all(2).all(1)
    unchanged = (out == images).all(3).all(2).all(1)
    assert (flipped ^ unchanged).all()
    assert 60 < flipped.sum() < 120
    padded = transforms(Augment(flip=0.3, crop="pad", crop_padding=0)).jitter_crop_flip(images, 0, keys)
    assert_close(padded, out, atol=0, rtol=0)


def test_alternating_flips_reverse_each_image_in_every_second_epoch():
    images, keys = pixels(300), torch.arange(300)
    alternating = transforms(Augment(flip=0.3, alternate_flip=True))
    epochs = [alternating.jitter_crop_flip(images, epoch, keys) for epoch in range(3)]
    # The first epoch is the one without alternation.
    assert_close(epochs[0], transforms(Augment(flip=0.3)).jitter_crop_flip(images, 0, keys), atol=0, rtol=0)
    assert_close(epochs[1], epochs[0].flip(3), atol=0, rtol=0)
    assert_close(epochs[2], epochs[0], atol=0, rtol=0)


def test_erased_squares():
    images = torch.zeros(3000, 1, 12, 12, dtype=torch.uint8)
    out = transforms(Augment(erase=0.5, erase_size=1 / 3), channels=1).erase(images, 0, torch.arange(3000))
    grey = (out == 120).sum((1, 2, 3))
    assert 0.46 < (grey > 0).float().mean() < 0.54
    assert grey.max() == 16
    assert int(grey[grey > 0].min()) == 4  # a quarter: the centre is the pixel in a corner
    assert set(out.unique().tolist()) == {0, 120}
    assert (images == 0).all()


def test_position_of_an_erased_square():
    images = pixels(2, 3, 8, 8)
    out = erase_squares(images, torch.tensor([1]), torch.tensor([[0.5, 0.999]]), 0.5, (1.0, 2.0, 3.0))
    expected = images.clone()
    expected[1, :, 2:6, 5:8] = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(3, 1, 1)
    assert_close(out, expected, atol=0, rtol=0)


def test_jitter_keeps_the_dtype():
    images, keys = pixels(6, 3, 16, 16), torch.arange(6)
    augment = Augment(jitter=AffineJitter(20, 0.1, 0.2))
    out = transforms(augment).jitter_crop_flip(images, 0, keys)
    as_float = BatchTransforms(augment, 0, (0.0,) * 3, (0.0,) * 3).jitter_crop_flip(images.float(), 0, keys)
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
def test_transforms_do_not_depend_on_the_batch(augment):
    images, keys = pixels(12), torch.arange(100, 112)
    batch = transforms(augment, seed=3)
    full = batch.erase(batch.jitter_crop_flip(images, 5, keys), 5, keys)
    some = torch.tensor([7, 2, 11])
    assert_close(
        batch.erase(batch.jitter_crop_flip(images[some], 5, keys[some]), 5, keys[some]), full[some], atol=0, rtol=0
    )
    assert not torch.equal(batch.erase(batch.jitter_crop_flip(images, 6, keys), 6, keys), full)


def test_without_augmentation_images_are_unchanged():
    images = pixels()
    assert transforms(Augment()).jitter_crop_flip(images, 0, torch.arange(8)) is images
    assert transforms(Augment()).erase(images, 0, torch.arange(8)) is images


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 37), (37, 50), (24, 24), (100, 31)])
def test_center_crop_equals_torchvision(interpolation, size):
    image = noise(0, size)
    config = DataConfig(interpolation=interpolation, crop_fraction=0.875)
    ours = CenterCrop(config, 28, 3)(image, "x.png")
    peer = v2.Compose([v2.Resize(32, InterpolationMode(interpolation)), v2.CenterCrop(28), v2.PILToTensor()])
    assert_close(ours, peer(image), atol=0, rtol=0)


def test_center_crop_keeps_images_of_its_size():
    image = noise(0, (28, 28))
    assert_close(CenterCrop(DataConfig(), 28, 3)(image, "x.png"), v2.PILToTensor()(image), atol=0, rtol=0)


def test_random_resized_crop_equals_torchvision():
    config = DataConfig(augment=Augment(crop="random-resized", crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0)))
    crop, image = RandomResizedCrop(config, 20, 3, seed=4), noise(0, (50, 40))
    peer = v2.Compose([v2.RandomResizedCrop(20, (0.2, 0.6), (0.5, 2.0)), v2.PILToTensor()])
    for epoch, key in ((0, 0), (0, 1), (1, 0)):
        with image_rng(4, epoch, key, CROP_STREAM):
            expected = peer(image)
        assert_close(crop(image, "x.png", epoch, key), expected, atol=0, rtol=0)


PEERS = {
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR),
    "autoaugment-cifar10": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, InterpolationMode.BILINEAR),
    "randaugment": v2.RandAugment(3, 12, interpolation=InterpolationMode.BILINEAR),
    "trivialaugment": v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR),
}


@pytest.mark.parametrize("policy", PEERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_equal_torchvision(policy, channels):
    images, keys = pixels(20, channels, 24, 24), torch.arange(20)
    augment = Augment(policy=policy, randaugment_ops=3, randaugment_magnitude=12)
    out = PolicyTransform(augment, "bilinear", seed=1)(images, 2, keys)
    for image, key, ours in zip(images, keys.tolist(), out, strict=True):
        with image_rng(1, 2, key, POLICY_STREAM):
            expected = TF.pil_to_tensor(PEERS[policy](to_pil(image)))
        assert_close(ours, expected, atol=0, rtol=0)
    assert (out != images).flatten(1).any(1).sum() > 8


# Jitter

JITTER = AffineJitter(degrees=20, translate=0.1, scale=0.2)


def jittered(images, draw, jitter, fill):
    return sample_affine(images, jitter_matrices(draw, jitter, *images.shape[2:]), fill)


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (3, 2, 17, 29)])
def test_jitter_equals_torchvision_affine(shape):
    images, draw = torch.rand(shape), torch.rand(4, shape[0]) * 2 - 1
    out = jittered(images, draw, JITTER, (0.0,) * shape[1])
    angle, scale, dx, dy = draw
    for i, image in enumerate(images):
        expected = TF.affine(
            image,
            angle=float(angle[i]) * JITTER.degrees,
            translate=[float(dx[i]) * JITTER.translate * shape[3], float(dy[i]) * JITTER.translate * shape[2]],
            scale=1 + float(scale[i]) * JITTER.scale,
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        assert_close(out[i], expected, atol=1e-4, rtol=0)


def test_jitter_stays_in_its_range():
    torch.manual_seed(0)
    matrix = jitter_matrices(torch.rand(4, 500) * 2 - 1, JITTER, 8, 8)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]) * 180 / math.pi
    scale = 1 / matrix[:, 0, :2].norm(dim=1)
    shift = torch.linalg.solve(matrix[:, :, :2], -matrix[:, :, 2]) / 2
    assert 0.95 * 20 < angle.abs().max() <= 20
    assert 0.8 <= scale.min() < 0.82
    assert 1.18 < scale.max() <= 1.2
    assert 0.095 < shift.abs().max() <= 0.1 + 1e-6


def test_jitter_of_zero_is_the_identity():
    images = torch.randn(3, 2, 9, 5)
    assert_close(jittered(images, torch.rand(4, 3), AffineJitter(), (0.5, -1.0)), images)


def test_fill_beyond_the_border():
    images = torch.ones(64, 2, 8, 8)
    torch.manual_seed(0)
    out = jittered(images, torch.rand(4, 64) * 2 - 1, AffineJitter(translate=0.5), (-3.0, 7.0))
    assert_close(out.amin((0, 2, 3))[0], torch.tensor(-3.0))
    assert_close(out.amax((0, 2, 3))[1], torch.tensor(7.0))


@pytest.mark.parametrize("wrong", [{"degrees": -1}, {"degrees": 181}, {"translate": 1.0}, {"scale": 1.0}])
def test_jitter_rejects_invalid_ranges(wrong):
    with pytest.raises(UsageError):
        AffineJitter(**wrong)
