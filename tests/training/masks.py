"""Shared by the tests of segmentation: a small folder of images with masks, and a tiny network."""

from dataclasses import replace

import numpy as np
from PIL import Image

from repvgg.data import Augment, DataConfig, MaskAugment, open_data
from repvgg.models import PSPNetSpec, create_model
from repvgg.training import OptimConfig, TrainConfig, seeded

CLASSES = ("ground", "disc", "bar")
SPEC = PSPNetSpec("pspnet_tiny", "repvgg_t0", head_channels=16, auxiliary_channels=8, input_size=33)
CONFIG = TrainConfig(
    model="pspnet_tiny",
    recipe="test",
    epochs=2,
    batch_size=4,
    data=DataConfig(train_size=33, augment=Augment(flip=0.5, mask=MaskAugment(scale=(0.8, 1.2), degrees=10))),
    optim=OptimConfig(lr=0.02, lr_batch=None, schedule="poly", head_lr=10.0, weight_decay=1e-4),
    auxiliary_weight=0.4,
    threads=1,
    accelerator="cpu",
    dry_run=False,
)


def make_masks(folder, train=8, val=3, size=(41, 36), seed=0):
    """Write images of coloured shapes with their masks below ``folder``, a frame of each ignored; return its URI."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            pixels, mask = scene(random, *size)
            Image.fromarray(pixels).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / split / "labels" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return f"masks:{folder}"


def scene(random, width, height):
    """A disc and a bar on the ground: pixels (H, W, 3), and the class of each; 255 at the left and right border."""
    row, column = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    mask[(row - random.integers(height)) ** 2 + (column - random.integers(width)) ** 2 < (height // 4) ** 2] = 1
    mask[abs(column - random.integers(width)) < width // 10] = 2
    colours = np.array([(60, 120, 60), (200, 60, 40), (40, 60, 220)])
    pixels = (colours[mask] + random.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)
    mask[:, :2] = mask[:, -2:] = 255
    return pixels, mask


def tiny(seed=0, num_classes=3, spec=SPEC):
    with seeded(seed):
        return create_model(spec, num_classes)


def config_of(uri, **changes):
    return replace(CONFIG, data=replace(CONFIG.data, uri=uri), **changes)


def opened(uri, **changes):
    config = config_of(uri, **changes)
    return open_data(config.data, seed=config.seed)
