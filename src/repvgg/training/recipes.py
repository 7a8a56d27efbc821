"""Recipes: functions that return a complete config. Each docstring gives the command and the expected result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from repvgg.data import AffineJitter, Augment, DataConfig, MaskAugment
from repvgg.errors import UsageError
from repvgg.training.config import OptimConfig, QatConfig, TrainConfig

_IMAGENET = "imagefolder:imagenet"
_CROP_FLIP = Augment(crop="random-resized", flip=0.5)


def paper_simple() -> TrainConfig:
    """Return the paper's simple ImageNet schedule (§4.1), used for all models of Table 4.

    Command: ``repvgg train repvgg_a0 --recipe paper-simple --data imagefolder:PATH``. Expected (the paper's numbers,
    Table 4): A0 72.41, A1 74.46, A2 76.48, B0 75.14, B1 78.37 % top-1, on 8 GPUs.

    Global batch 256, SGD with momentum 0.9, learning rate 0.1 falling to 0 as a cosine over 120 epochs, weight decay
    1e-4 on the kernels of convolutions and linear layers only, random resized crops and flips.
    """
    return TrainConfig(
        model="repvgg_a0",
        recipe="paper-simple",
        epochs=120,
        batch_size=256,
        data=DataConfig(uri=_IMAGENET, train_size=224, augment=_CROP_FLIP, workers=8),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=1e-4, decay="paper"),  # for lr_batch=256, the default
    )


def paper_heavy() -> TrainConfig:
    """Return the paper's long ImageNet schedule (§4.1), used for the models of Table 5.

    Command: ``repvgg train repvgg_b2g4 --recipe paper-heavy --data imagefolder:PATH``. Expected (the paper's numbers,
    Table 5): B2g4 79.38, B3g4 80.21, B3 80.52 % top-1, on 8 GPUs.

    200 epochs with 5 of warm-up, label smoothing 0.1, mixup 0.2, AutoAugment (the ImageNet policy), crops and flips;
    otherwise as the simple schedule.
    """
    simple = paper_simple()
    return replace(
        simple,
        model="repvgg_b2g4",
        recipe="paper-heavy",
        epochs=200,
        data=replace(simple.data, augment=replace(_CROP_FLIP, policy="autoaugment")),
        optim=replace(simple.optim, warmup_epochs=5),
        label_smoothing=0.1,
        mixup=0.2,
    )


def plus() -> TrainConfig:
    """Return upstream's recipe for RepVGGplus-L2pse on ImageNet: trained at 256 pixels, evaluated at 320.

    Command: ``repvgg train repvggplus_l2pse --recipe plus --data imagefolder:PATH``. Expected (upstream's number):
    84.06 % top-1.

    300 epochs with 5 of warm-up, weight decay 4e-5, label smoothing 0.1, RandAugment, mixup 0.2, and the auxiliary
    heads with a weight of 0.1 each.
    """
    return TrainConfig(
        model="repvggplus_l2pse",
        recipe="plus",
        epochs=300,
        batch_size=256,
        data=DataConfig(
            uri=_IMAGENET,
            train_size=256,
            test_size=320,  # random resized crops magnify objects: larger test images match them (FixRes)
            augment=replace(_CROP_FLIP, policy="randaugment"),
            workers=8,
        ),
        optim=OptimConfig(lr=0.1, momentum=0.9, weight_decay=4e-5, decay="paper", warmup_epochs=5),
        label_smoothing=0.1,
        mixup=0.2,
        auxiliary_weight=0.1,
    )


def cifar() -> TrainConfig:
    """Return a recipe for 32x32 images on a small budget: CIFAR-10 on two CPU cores.

    Command: ``repvgg train repvgg_t2 --recipe cifar --data torchvision:CIFAR10:PATH --threads 2``, or
    ``imagefolder:PATH``. Expected: 89.0 % top-1 on images stored as JPEG of quality 75, in 32 minutes on two cores of
    an AMD EPYC (Zen 5), in bf16; float32 is faster on a CPU without instructions for bfloat16, and taken there.

    The architecture and the settings were chosen by runs of 6 epochs, in which more depth at 16x16 gained 1.0 points.
    See LOG.md.
    """
    return TrainConfig(
        model="repvgg_t2",
        recipe="cifar",
        epochs=20,
        batch_size=128,
        data=DataConfig(
            uri="torchvision:CIFAR10:cifar10", train_size=32, augment=Augment(crop="pad", crop_padding=3, flip=0.5)
        ),
        # Crops of 2 pixels and lr 0.25, instead of 4 and 0.15, gained 1.1 points in 6 epochs, norm_bias_lr 0.9.
        optim=OptimConfig(lr=0.25, lr_batch=128, nesterov=True, weight_decay=5e-4, norm_bias_lr=16.0, warmup_epochs=2),
        label_smoothing=0.1,
        ema=0.995,
        precision="auto",
        channels_last=True,
    )


def cifar_paper() -> TrainConfig:
    """Return the paper's simple schedule (§4.1) on 32x32 images, for ablations: nothing in it favours a block.

    Command: ``repvgg study table6 --recipe cifar-paper --data torchvision:CIFAR10:PATH``.

    One learning rate for all parameters, 0.1 at a batch of 256, falling to 0 as a cosine over 30 epochs, momentum 0.9,
    weight decay 1e-4 on kernels only, no warm-up, smoothing or average of weights. Crops of padded images stand in for
    random resized ones, which leave little of an image of 32 pixels.
    """
    simple = paper_simple()
    return replace(
        simple,
        model="repvgg_t2",
        recipe="cifar-paper",
        epochs=30,
        batch_size=128,
        data=DataConfig(
            uri="torchvision:CIFAR10:cifar10", train_size=32, augment=Augment(crop="pad", crop_padding=4, flip=0.5)
        ),
        precision="auto",
        channels_last=True,
    )


def finetune() -> TrainConfig:
    """Return a recipe to fine-tune a checkpoint on other images; the classifier is new if the classes differ.

    Command: ``repvgg train --recipe finetune --init MODEL.safetensors --data imagefolder:PATH``.
    """
    return TrainConfig(
        recipe="finetune",
        epochs=20,
        batch_size=64,
        data=DataConfig(uri="imagefolder:images", augment=_CROP_FLIP),
        optim=OptimConfig(lr=0.01, lr_batch=64, weight_decay=1e-4, warmup_epochs=1, clip=1.0),
        label_smoothing=0.1,
    )


def qat() -> TrainConfig:
    """Return a recipe for quantization-aware training of a checkpoint, for a few epochs on its own training images.

    Command: ``repvgg train --recipe qat --init RUN/train.safetensors --data imagefolder:PATH``, with the sizes and the
    augmentation of that run.
    """
    return TrainConfig(
        recipe="qat",
        epochs=3,
        batch_size=64,
        data=DataConfig(uri="imagefolder:images", augment=_CROP_FLIP),
        optim=OptimConfig(lr=0.01, lr_batch=64, weight_decay=1e-4, warmup_epochs=0.25, clip=1.0),
        label_smoothing=0.1,
        qat=QatConfig(enabled=True),
    )


def quickstart(seed: int = 0) -> TrainConfig:
    """Return the recipe for ``repvgg_t0`` on scikit-learn's digits at 20x20, on one CPU core.

    Command: ``repvgg quickstart``. Expected: at least 99.4 % of the 360 validation digits (358 to 360 correct over
    seeds 0 to 7), in 16 s of CPU time of one Xeon core limited to AVX2, a third of what 20 epochs at 32x32 take.

    Settings were chosen by five-fold cross-validation within the 1437 training images; the validation images were
    evaluated afterwards. 12 or 16 epochs at 20 pixels gave 7 errors, 12 or 20 epochs at 16 pixels 10 and 9, 10 or 14
    epochs at 24 pixels 12 and 13, and 20 epochs at 32 pixels, which take three times as long, 6.
    """
    return TrainConfig(
        model="repvgg_t0",
        recipe="quickstart",
        epochs=12,
        batch_size=64,
        data=DataConfig(
            uri="digits:",
            train_size=20,  # of scans of 8x8
            augment=Augment(jitter=AffineJitter(degrees=10, translate=0.08, scale=0.1)),
        ),
        optim=OptimConfig(lr=0.1, lr_batch=64, momentum=0.9, weight_decay=5e-4, warmup_epochs=2),
        label_smoothing=0.1,  # 6 errors of 1437 in cross-validation, 13 without
        seed=seed,
        # A second thread gains little on so small a network (1.0 s an epoch instead of 1.4 s at 32x32), and costs 4 to
        # 70 s an epoch when another program uses that core. Smaller images make it cheaper on any machine.
        threads=1,
        channels_last=True,
        accelerator="cpu",
    )


def pspnet() -> TrainConfig:
    """Return the paper's recipe for semantic segmentation on Cityscapes (§4.3), used for Table 8.

    Command: ``torchrun --nproc-per-node 8 -m repvgg train pspnet_repvgg_b2 --recipe pspnet --data cityscapes:PATH
    --init IMAGENET.safetensors``. Expected (the paper's numbers, Table 8): B1g2-fast 78.88, B1g2 78.70, B2-fast 79.52,
    B2 80.57 % mIoU, with sliding windows of 713 pixels, on 8 GPUs. It has not been run here.

    Global batch 16, SGD with momentum 0.9, learning rate 0.01 falling to 0 as ``(1 − t)^0.9`` over 40 epochs, weight
    decay 1e-4, crops of 713 pixels. What the paper leaves to PSPNet's own code is taken from there: synchronized batch
    norm, heads at 10 times the rate, an auxiliary loss of weight 0.4, zoom 0.5 to 2, rotation by up to 10 degrees, blur
    and flips.
    """
    return TrainConfig(
        model="pspnet_repvgg_b1g2",
        recipe="pspnet",
        epochs=40,
        batch_size=16,
        data=DataConfig(
            uri="cityscapes:cityscapes",
            train_size=713,
            augment=Augment(flip=0.5, mask=MaskAugment(scale=(0.5, 2.0), degrees=10, rotation=0.5, blur=0.5)),
            workers=8,
        ),
        optim=OptimConfig(lr=0.01, lr_batch=16, weight_decay=1e-4, decay="paper", schedule="poly", head_lr=10.0),
        auxiliary_weight=0.4,
        sync_bn=True,
    )


def pspnet_small() -> TrainConfig:
    """Return a recipe for a small set of images with masks on two CPU cores: CamVid at 480x360, 367 images.

    Command: ``repvgg train pspnet_repvgg_a0 --recipe pspnet-small --data masks:PATH --init CLASSIFIER.safetensors``.
    A step takes 3.7 CPU seconds in bf16 on an AMD EPYC (Zen 5), and the validation of an epoch 54, so that the run
    takes about 29 minutes on two cores that nothing else uses; see LOG.md. In float32 it takes twice as long.
    """
    return TrainConfig(
        model="pspnet_repvgg_a0",
        recipe="pspnet-small",
        epochs=15,
        batch_size=8,
        data=DataConfig(
            uri="masks:camvid",
            train_size=161,
            augment=Augment(flip=0.5, mask=MaskAugment(scale=(0.5, 1.5), degrees=10, rotation=0.5)),
        ),
        optim=OptimConfig(lr=0.01, lr_batch=8, weight_decay=1e-4, schedule="poly", head_lr=10.0, warmup_epochs=1),
        auxiliary_weight=0.4,
        precision="auto",
        channels_last=True,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "paper-simple": paper_simple,
    "paper-heavy": paper_heavy,
    "plus": plus,
    "cifar": cifar,
    "cifar-paper": cifar_paper,
    "finetune": finetune,
    "qat": qat,
    "quickstart": quickstart,
    "pspnet": pspnet,
    "pspnet-small": pspnet_small,
}


def recipe_of(name: str) -> TrainConfig:
    """Return the config of the recipe ``name``.

    Raises:
        UsageError: unknown recipe.
    """
    if name not in RECIPES:
        raise UsageError(f"There is no recipe {name!r}: choose one of {', '.join(RECIPES)}.")
    return RECIPES[name]()
