import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.v2 import functional

from repvgg.data import (
    Augment,
    DataConfig,
    ImageData,
    MaskAugment,
    SegmentationData,
    open_data,
    open_evaluation_data,
    open_image_data,
)
from repvgg.data.mask_files import Pair
from repvgg.data.mask_transforms import MaskCrop, colour_map, gaussian_blur
from repvgg.errors import DataError, UsageError
from tests.data.helpers import assert_same_batches, order_of, run, truncate, write_masks

ALL = Augment(
    flip=0.5,
    mask=MaskAugment((0.5, 2.0), 10, blur=0.5, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1),
)
FILL = (124, 116, 104)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("masks")
    write_masks(root / "train", 11, suffix=".webp")
    write_masks(root / "val", 5, seed=1)
    (root / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    return root


def opened(folder, augment=ALL, seed=1, **options):
    return open_data(DataConfig(f"masks:{folder}", train_size=17, augment=augment, **options), seed=seed)


@pytest.fixture(scope="module")
def alone(folder):
    """Return three epochs of batches loaded without workers or other ranks."""
    loader = opened(folder).train_batches(4)
    return [run(loader, epoch) for epoch in range(3)]


def coordinates():
    """Return an image whose colour and mask are the position of each pixel: (16 x, 16 y, 0) and 14 y + x."""
    y, x = np.mgrid[:14, :14].astype(np.uint8)
    return Pair(np.dstack((16 * x, 16 * y, 0 * x)), 14 * y + x)


def crop(augment=None, flip=0.0, size=17, seed=0):
    return MaskCrop(augment or MaskAugment(), flip, size, FILL, "bilinear", seed)


def test_data_knows_its_classes_shapes_and_images(folder):
    data = opened(folder)
    assert isinstance(data, SegmentationData)
    assert data.task == "segmentation"
    assert data.classes == ("sky", "road", "car", "tree")
    assert (data.num_train, data.num_val, data.ignore_index) == (11, 5, 255)
    assert (data.input_shape, data.test_shape) == ((3, 17, 17), (3, 20, 24))
    assert data.val_names == ("000", "001", "002", "003", "004")
    assert data.palette.shape == (4, 3)
    assert data.palette.dtype == torch.uint8


def test_training_batches_are_crops_in_the_order_of_the_epoch(folder):
    data = opened(folder, Augment())
    order, batches = order_of(1, 2, 11), run(data.train_batches(5), 2)
    assert len(batches) == 2
    images, masks = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (images.shape, images.dtype, masks.shape, masks.dtype) == (
        (10, 3, 17, 17),
        torch.uint8,
        (10, 17, 17),
        torch.uint8,
    )
    for index, image, mask in zip(order, images, masks, strict=False):
        whole = np.asarray(Image.open(folder / "train" / "labels" / f"{index:03}.png"))
        pixels = np.asarray(Image.open(folder / "train" / "images" / f"{index:03}.webp"))
        found = [
            (top, left)
            for top in range(4)
            for left in range(8)
            if (whole[top : top + 17, left : left + 17] == mask.numpy()).all()
            and (pixels[top : top + 17, left : left + 17] == image.permute(1, 2, 0).numpy()).all()
        ]
        assert len(found) == 1


def test_validation_batches_are_whole_images(folder):
    data = opened(folder)
    batches = list(data.val_batches(2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    masks = torch.cat([masks for _, masks in batches])
    for index in range(5):
        whole = np.asarray(Image.open(folder / "val" / "labels" / f"{index:03}.png"))
        assert_close(masks[index], torch.from_numpy(whole.copy()), atol=0, rtol=0)
        name, pixels, mask = data.val_example(index)
        assert name == data.val_names[index]
        assert_close(mask, masks[index], atol=0, rtol=0)
        assert_close(pixels, torch.cat([images for images, _ in batches])[index], atol=0, rtol=0)
    for world_size in (2, 3):
        ranks = [list(data.val_batches(1, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert_close(torch.cat([masks for rank in ranks for _, masks in rank]), masks, atol=0, rtol=0)


def test_prepared_images_map_back_to_pixels(folder):
    data = opened(folder)
    pixels = data.val_example(0).pixels
    normalized = data.prepare(pixels[None])
    assert_close(normalized[0, 0], (pixels[0] / 255 - 0.485) / 0.229)
    assert_close(data.to_pixels(normalized)[0], pixels / 255)


def test_validation_batches_end_where_the_size_changes(tmp_path):
    write_masks(tmp_path / "train", 2)
    write_masks(tmp_path / "val", 3, size=(24, 20))
    write_masks(tmp_path / "more", 3, size=(20, 24))
    for name, suffix in (("images", ".png"), ("labels", ".png")):
        for number in range(3):
            path = tmp_path / "more" / name / f"{number:03}{suffix}"
            path.rename(tmp_path / "val" / name / f"{number + 3:03}{suffix}")
    data = open_data(DataConfig(f"masks:{tmp_path}"))
    assert [tuple(masks.shape) for _, masks in data.val_batches(2)] == [
        (2, 20, 24),
        (1, 20, 24),
        (2, 24, 20),
        (1, 24, 20),
    ]
    assert len(data.val_batches(4)) == 2


def test_batches_do_not_depend_on_workers_cache_or_where_they_start(folder, alone):
    for options in ({"workers": 1}, {"cache": "none"}):
        loader = opened(folder, **options).train_batches(4)
        assert_same_batches(run(loader, 2), alone[2])
        assert_same_batches(run(loader, 1, skip=1), alone[1][1:])
    assert not (alone[0][0][0] == alone[1][0][0]).all()


def test_batches_do_not_depend_on_ranks_or_batch_size(folder, alone):
    data = opened(folder)
    ranks = [run(data.train_batches(2, rank=rank, world_size=2), 1) for rank in range(2)]
    together = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in zip(*ranks, strict=True)]
    assert_same_batches(together, alone[1])
    singly = run(data.train_batches(1), 1)
    for position, (images, masks) in enumerate(singly[:8]):
        assert_close(images[0], alone[1][position // 4][0][position % 4], atol=0, rtol=0)
        assert_close(masks[0], alone[1][position // 4][1][position % 4], atol=0, rtol=0)


@pytest.mark.parametrize("degrees", [0, 10, 180])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 2.0), (4.0, 4.0)])
def test_image_and_mask_stay_aligned(degrees, scale):
    transform = crop(MaskAugment(scale, degrees, rotation=1.0), flip=0.5)
    inside = 0
    for key in range(40):
        x, y, _, mask = transform(coordinates(), 0, key).int()
        border = mask == 255
        # Bilinear interpolation of a ramp is the position, to 1 / 32 pixel; the mask is of the nearest pixel.
        for position, nearest in ((x, mask % 14), (y, mask // 14)):
            assert (position / 16 - nearest)[~border].abs().max() <= 0.5 + 1 / 32 + 1e-4
        assert (x[border] == FILL[0]).all()
        assert (y[border] == FILL[1]).all()
        inside += int((~border).sum())
    assert inside > 40 * 30


def test_crop_without_augmentation_is_a_window_with_the_image_in_the_middle():
    both = crop()(coordinates(), 0, 0)
    assert_close(both[3, 1:15, 1:15], torch.from_numpy(coordinates().mask), atol=0, rtol=0)
    assert (both[3] == 255).sum() == 17 * 17 - 14 * 14


def test_scale_is_uniform_in_its_range():
    transform = crop(MaskAugment((0.5, 2.0)), size=64)
    areas = [int((transform(coordinates(), 0, key)[3] != 255).sum()) for key in range(200)]
    zooms = np.sqrt(areas) / 14
    assert zooms.min() < 0.6
    assert zooms.max() > 1.9
    assert abs(np.median(zooms) - 1.25) < 0.15


def test_flip_mirrors_the_crop_and_changes_no_other_number():
    augment = MaskAugment((0.5, 2.0), 10)
    for key in range(10):
        plain, flipped = crop(augment)(coordinates(), 3, key), crop(augment, flip=1.0)(coordinates(), 3, key)
        difference = (flipped.flip(2) != plain).any(0)
        assert difference.float().mean() < 0.01  # rounding at the border of a pixel


def test_colours_change_the_image_alone_and_leave_its_surroundings():
    pair = Pair(np.random.default_rng(0).integers(0, 256, (14, 14, 3), np.uint8), coordinates().mask)
    plain = crop(MaskAugment(degrees=10))(pair, 0, 1)
    for name in ("blur", "brightness", "contrast", "saturation", "hue"):
        changed = crop(MaskAugment(degrees=10, **{name: 0.5 if name == "hue" else 1.0}))(pair, 0, 1)
        assert_close(changed[3], plain[3], atol=0, rtol=0)
        border = plain[3] == 255
        assert_close(changed[:3, border], plain[:3, border], atol=0, rtol=0)
        assert (changed[:3, ~border] != plain[:3, ~border]).float().mean() > 0.5


def test_colour_map_agrees_with_torchvision():
    image = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3  # nothing is clipped
    means = image.flatten(1).mean(1)
    expected = functional.adjust_contrast(functional.adjust_brightness(image, 1.2), 0.8)
    expected = functional.adjust_saturation(expected, 1.3)
    matrix, shift = colour_map(means, 1.2, 0.8, 1.3, 0.0)
    # torchvision's grey uses weights with four digits.
    assert_close((matrix @ image.flatten(1) + shift).reshape(image.shape), expected, atol=2e-4, rtol=0)
    grey = functional.adjust_contrast(functional.adjust_brightness(image[:1], 1.2), 0.8)
    matrix, shift = colour_map(means[:1], 1.2, 0.8, 1.3, 0.3)
    assert_close((matrix @ image[:1].flatten(1) + shift).reshape(grey.shape), grey)


def test_hue_turns_about_the_grey_axis():
    colours = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.1, 0.2]]).T
    full, half = (colour_map(torch.zeros(3), 1, 1, 1, hue)[0] for hue in (1.0, 0.5))
    assert_close(full, torch.eye(3), atol=1e-5, rtol=0)
    assert_close(half @ half, torch.eye(3), atol=1e-5, rtol=0)
    turned = half @ colours
    assert_close(turned[:, 0], colours[:, 0])
    grey = colours[:, 1] @ torch.tensor([0.299, 0.587, 0.114])
    assert_close(turned[:, 1], 2 * grey - colours[:, 1], atol=1e-5, rtol=0)


def test_blur_is_opencvs_5x5():
    image = torch.rand(3, 12, 13, generator=torch.Generator().manual_seed(0))
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / 1.1) ** 2)
    kernel = (taps[:, None] * taps).div(taps.sum() ** 2).expand(3, 1, 5, 5)
    expected = F.conv2d(F.pad(image[None], (2, 2, 2, 2), mode="replicate"), kernel, groups=3)[0]
    assert_close(gaussian_blur(image, 1.1), expected)


def test_greyscale_images(folder):
    data = opened(folder, Augment(flip=0.5, mask=MaskAugment((0.5, 2.0), 10, blur=0.5, contrast=0.5)), channels=1)
    images, masks = next(iter(data.train_batches(3)))
    assert (images.shape, masks.shape) == ((3, 1, 17, 17), (3, 17, 17))
    assert next(iter(data.val_batches(1)))[0].shape == (1, 1, 20, 24)


def test_single_split_is_divided_or_evaluated_whole(tmp_path):
    masks = write_masks(tmp_path, 20)
    data = open_data(DataConfig(f"masks:{tmp_path}?classes=4"))
    assert (data.num_train, data.num_val) == (18, 2)
    assert "single split: 2 of its 20 images" in data.notes[0]
    whole = open_evaluation_data(DataConfig(f"masks:{tmp_path}?classes=4"))
    assert (whole.num_train, whole.num_val, whole.notes[0]) == (0, 20, f"all images of masks:{tmp_path}?classes=4")
    assert_close(torch.cat([found for _, found in whole.val_batches(3)]), torch.from_numpy(masks), atol=0, rtol=0)
    train = open_evaluation_data(DataConfig(f"masks:{tmp_path}?classes=4"), "train")
    assert train.num_val == 18


def test_on_bad_skip_replaces_corrupt_images(folder, tmp_path):
    write_masks(tmp_path / "train", 6)
    write_masks(tmp_path / "val", 3)
    truncate(tmp_path / "train" / "images" / "002.png")
    truncate(tmp_path / "val" / "labels" / "001.png")
    config = DataConfig(f"masks:{tmp_path}?classes=4", train_size=8, on_bad="skip")
    data = open_data(config)
    assert sum(len(images) for images, _ in run(data.train_batches(2))) == 6
    assert sum(len(images) for images, _ in data.val_batches(1)) == 2
    assert data.corrupt.count == 2
    with pytest.raises(DataError, match=r"images/002.png' is truncated.*fix or remove it"):
        open_data(DataConfig(config.uri))


def test_settings_of_the_other_task_are_refused(folder):
    with pytest.raises(UsageError, match=r"augment\.crop does not apply to images with masks"):
        opened(folder, Augment(crop="random-resized"))
    with pytest.raises(UsageError, match="test_size does not apply"):
        opened(folder, test_size=32)
    with pytest.raises(UsageError, match="'fake:8x2' has no masks"):
        open_data(DataConfig("fake:8x2", augment=ALL))
    with pytest.raises(UsageError, match="holds images with masks"):
        open_image_data(DataConfig(f"masks:{folder}"))
    assert isinstance(open_image_data(DataConfig("fake:8x2")), ImageData)
    assert open_data(DataConfig("fake:8x2")).task == "classification"


def test_crops_larger_than_the_images_are_told(folder):
    assert (
        "Crops of 321x321 pixels are larger than some images (24x20)"
        in open_data(DataConfig(f"masks:{folder}")).notes[-1]
    )
    assert not opened(folder).notes
