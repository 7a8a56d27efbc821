"""Masks as pictures."""

import numpy as np
import pytest
from PIL import Image

from repvgg.data.label_sets import voc_colours
from repvgg.data.mask_images import (
    IGNORED_COLOUR,
    RIGHT_COLOUR,
    WRONG_COLOUR,
    colours_of,
    error_map,
    overlay,
    write_mask,
)
from repvgg.errors import OutputExistsError

PALETTE = ((10, 20, 30), (200, 100, 0))
MASK = np.array([[0, 1, 1], [255, 0, 1]], np.uint8)


def test_the_colours_of_voc():
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128]]
    assert voc_colours(7).tolist() == expected
    assert voc_colours(256)[8].tolist() == [64, 0, 0]
    assert len(np.unique(voc_colours(256), axis=0)) == 256


def test_a_mask_is_an_index_png_with_its_palette(tmp_path):
    write_mask(tmp_path / "mask.png", MASK, PALETTE)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), MASK)
        assert np.array_equal(np.asarray(image.convert("RGB")), colours_of(MASK, PALETTE))
    with pytest.raises(OutputExistsError):
        write_mask(tmp_path / "mask.png", MASK, PALETTE)


def test_colours():
    colours = colours_of(MASK, PALETTE)
    assert colours.shape == (2, 3, 3)
    assert tuple(colours[0, 1]) == PALETTE[1]
    assert tuple(colours[1, 0]) == (255, 255, 255)


def test_a_map_of_errors():
    truth = np.array([[0, 0, 1], [0, 255, 1]], np.uint8)
    found = error_map(MASK, truth, ignore_index=255)
    expected = [[RIGHT_COLOUR, WRONG_COLOUR, RIGHT_COLOUR], [WRONG_COLOUR, IGNORED_COLOUR, RIGHT_COLOUR]]
    assert np.array_equal(found, np.array(expected))


def test_an_overlay_has_a_row_of_legend_for_each_class_that_occurs():
    mask = np.zeros((40, 100), np.uint8)
    mask[:10] = 1
    image = np.full((40, 100, 3), 100, np.uint8)
    picture = overlay(image, mask, PALETTE, ("ground", "sky"))
    assert picture.size == (100, 40 + 2 * 8 + 2 * 18)
    mixed = np.asarray(picture)
    assert tuple(mixed[0, 0]) == tuple(round(0.45 * 100 + 0.55 * value) for value in PALETTE[1])
    assert tuple(mixed[40 + 8 + 8, 8 + 6]) == PALETTE[0]  # the larger class comes first
    assert tuple(mixed[40 + 8 + 18 + 8, 8 + 6]) == PALETTE[1]
