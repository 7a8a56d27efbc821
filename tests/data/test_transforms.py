import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from repvgg.data import AffineJitter
from repvgg.data.affine import jitter_matrices, sample_affine
from repvgg.errors import UsageError

JITTER = AffineJitter(degrees=20, translate=0.1, scale=0.2)


def moved(images, draw, jitter, fill):
    return sample_affine(images, jitter_matrices(draw, jitter, *images.shape[2:]), fill)


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (3, 2, 17, 29)])
def test_equals_torchvision_image_by_image(shape):
    images, draw = torch.rand(shape), torch.rand(4, shape[0]) * 2 - 1
    out = moved(images, draw, JITTER, (0.0,) * shape[1])
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


def test_amounts_differ_and_keep_their_range():
    torch.manual_seed(0)
    matrix = jitter_matrices(torch.rand(4, 500) * 2 - 1, JITTER, 8, 8)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]) * 180 / math.pi
    scale = 1 / matrix[:, 0, :2].norm(dim=1)
    shift = torch.linalg.solve(matrix[:, :, :2], -matrix[:, :, 2]) / 2
    assert 0.95 * 20 < angle.abs().max() <= 20
    assert 0.8 <= scale.min() < 0.82
    assert 1.18 < scale.max() <= 1.2
    assert 0.095 < shift.abs().max() <= 0.1 + 1e-6


def test_without_jitter_nothing_changes():
    images = torch.randn(3, 2, 9, 5)
    assert_close(moved(images, torch.rand(4, 3), AffineJitter(), (0.5, -1.0)), images)


def test_fill_lies_beyond_the_border():
    images = torch.ones(64, 2, 8, 8)
    torch.manual_seed(0)
    out = moved(images, torch.rand(4, 64) * 2 - 1, AffineJitter(translate=0.5), (-3.0, 7.0))
    assert_close(out.amin((0, 2, 3))[0], torch.tensor(-3.0))
    assert_close(out.amax((0, 2, 3))[1], torch.tensor(7.0))


@pytest.mark.parametrize("wrong", [{"degrees": -1}, {"degrees": 181}, {"translate": 1.0}, {"scale": 1.0}])
def test_jitter_refuses(wrong):
    with pytest.raises(UsageError):
        AffineJitter(**wrong)
