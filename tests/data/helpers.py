"""Folders of small images, and helpers for batches."""

import io

import numpy as np
import torch
from PIL import Image

from repvgg.data.counter_rng import epoch_order


def noise(seed, size=(16, 16), channels=3):
    """Return an image (width, height) of seeded noise, smooth enough for JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return image.resize(size, Image.Resampling.BICUBIC)


def write_class_folders(root, counts, size=(16, 16), suffix=".png", seed=0):
    """Write class folders with ``counts[name]`` images each; return the paths by class."""
    paths = {}
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        paths[name] = [root / name / f"{number:03}{suffix}" for number in range(count)]
        for number, path in enumerate(paths[name]):
            noise(10_000 * seed + 100 * label + number, size).save(path)
    return paths


def write_splits(root, train, val, **options):
    write_class_folders(root / "train", train, **options)
    write_class_folders(root / "val", val, seed=1, **options)
    return root


def write_masks(folder, count, size=(24, 20), classes=4, suffix=".png", seed=0):
    """Write ``count`` images and index masks of blocks of noise; return the masks (count, H, W)."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    width, height = size
    masks = []
    for number in range(count):
        noise(1000 * seed + number, size).save(folder / "images" / f"{number:03}{suffix}")
        blocks = np.random.default_rng(1000 * seed + number).integers(0, classes, (height // 4, width // 4), np.uint8)
        masks.append(blocks.repeat(4, 0).repeat(4, 1))
        Image.fromarray(masks[-1]).save(folder / "labels" / f"{number:03}.png")
    return np.stack(masks)


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def truncate(path):
    """Cut off the second half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def run(loader, epoch=0, skip=0):
    """Return the batches of an epoch."""
    loader.set_epoch(epoch)
    loader.skip(skip)
    return [(images.clone(), labels.clone()) for images, labels in loader]


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, other_x, atol=0, rtol=0)
        torch.testing.assert_close(y, other_y, atol=0, rtol=0)


def order_of(seed, epoch, length):
    return epoch_order(seed, epoch, length).tolist()


def flatten(lists):
    return [item for items in lists for item in items]
