"""Whole images, sliding windows, flips and scales, beside plain loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg.errors import UsageError
from repvgg.training import MULTI_SCALE, SegmentationInference
from repvgg.training.segmentation_inference import require_grid_size, window_starts


@pytest.fixture
def network():
    """A network that sees a neighbourhood, so that windows change its output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 5, padding=2).requires_grad_(False)


def images(height=21, width=30, number=2):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_a_single_pass_returns_logits(network):
    assert torch.equal(SegmentationInference().scores(network, images()), network(images()))


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(30, 9, 6, [0, 6, 12, 18, 21]), (9, 9, 6, [0]), (21, 9, 6, [0, 6, 12]), (10, 9, 9, [0, 1])],
)
def test_windows_cover_an_axis(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts
    assert set().union(*(range(start, start + window) for start in starts)) == set(range(length))


def test_windows_average_probabilities(network):
    x, window, stride = images(), 9, 5
    found = SegmentationInference(window, stride).probabilities(network, x)
    total, count = torch.zeros(2, 4, 21, 30), torch.zeros(21, 30)
    for top in (0, 5, 10, 12):
        for left in (0, 5, 10, 15, 20, 21):
            part = network(x[:, :, top : top + window, left : left + window]).softmax(1)
            total[:, :, top : top + window, left : left + window] += part
            count[top : top + window, left : left + window] += 1
    assert_close(found, total / count)
    assert_close(found.sum(1), torch.ones(2, 21, 30))


def test_a_window_larger_than_the_image_is_padded_with_the_mean(network):
    x = images(7, 30)
    found = SegmentationInference(33).probabilities(network, x)
    expected = network(F.pad(x, (0, 3, 0, 26))).softmax(1)[:, :, :7, :30]
    assert_close(found, expected)


def test_windows_change_nothing_where_pixels_are_independent():
    pixelwise = nn.Conv2d(3, 4, 1).requires_grad_(False)
    assert_close(SegmentationInference(9, 4).probabilities(pixelwise, images()), pixelwise(images()).softmax(1))


def test_a_flip_averages_both_directions(network):
    x = images()
    expected = (network(x).softmax(1) + network(x.flip(3)).softmax(1).flip(3)) / 2
    assert_close(SegmentationInference(flip=True).scores(network, x), expected)


def test_scales_are_averaged(network):
    x = images()
    half = F.interpolate(x, [10, 15], mode="bilinear", align_corners=False)
    upscaled = F.interpolate(network(half).softmax(1), [21, 30], mode="bilinear", align_corners=False)
    expected = (upscaled + network(x).softmax(1)) / 2
    assert_close(SegmentationInference(scales=(0.5, 1.0)).scores(network, x), expected)
    assert MULTI_SCALE[0] == 0.5


def test_as_text():
    assert str(SegmentationInference()) == "whole images"
    text = str(SegmentationInference(33, flip=True, scales=(0.5, 1)))
    assert text == "windows of 33 pixels at stride 22, averaged with their mirror images, scales 0.5, 1"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 720}, r"A window has a side of 8k \+ 1 pixels, not 720: take 713 or 721\."),
        ({"window": 8}, "take 9 or 17"),
        ({"stride": 5}, "A stride is at least 1 and at most the window"),
        ({"window": 9, "stride": 10}, "A stride is at least 1 and at most the window"),
        ({"scales": ()}, "Scales are one or more factors"),
        ({"scales": (0.0,)}, "Scales are one or more factors"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        SegmentationInference(**settings)


def test_grid_sizes():
    for size in (9, 33, 713):
        require_grid_size("A window", size)
