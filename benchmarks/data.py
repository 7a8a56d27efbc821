"""Throughput of the data loader alone, compared with plain torchvision in the same run.

    python benchmarks/data.py --cifar FOLDER --photos FOLDER [--size 96] [--workers 0 1 2] [--rounds 3]

Both folders are image folders (``train/CLASS/…``). CIFAR: 32 x 32, cached in memory, pad-crop and flip, without and
with an erased square. Photos: decoded in every epoch, random-resized crop and flip, without and with AutoAugment. The
peer is ``torchvision.datasets.ImageFolder`` with the v2 transforms of the same names and a ``DataLoader`` with the same
batch size and number of workers; it has no cache and decodes CIFAR in every epoch. Rounds alternate between the two.
Throughputs are medians with quartiles over the rounds, each an epoch or --images images; ratios are medians of the
ratios within a round. The start of the workers and the first batch are excluded on both sides.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from repvgg.data import Augment, DataConfig, open_data

BATCH = 128


def peer(folder: str, transforms: list[Any], workers: int) -> Iterable[Any]:
    dataset = ImageFolder(str(Path(folder) / "train"), v2.Compose([*transforms, v2.PILToTensor()]))
    return DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def cases(arguments: argparse.Namespace, workers: int) -> dict[str, tuple[Iterable[Any], Iterable[Any]]]:
    """Return the loaders (ours, peer) by the name of the case."""

    def ours(folder: str, size: int, augment: Augment, cache: Any) -> Iterable[Any]:
        config = DataConfig(f"imagefolder:{folder}", train_size=size, augment=augment, workers=workers, cache=cache)
        return open_data(config).train_batches(BATCH)

    found: dict[str, tuple[Iterable[Any], Iterable[Any]]] = {}
    if arguments.cifar:
        crop = [v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        augment = Augment(crop="pad", flip=0.5)
        found["cifar, crop + flip"] = (
            ours(arguments.cifar, 32, augment, "memory"),
            peer(arguments.cifar, crop, workers),
        )
        erased = Augment(crop="pad", flip=0.5, erase=1.0)
        found["cifar, crop + flip + erase"] = (
            ours(arguments.cifar, 32, erased, "memory"),
            peer(arguments.cifar, [*crop, v2.PILToTensor(), v2.RandomErasing(1.0), v2.ToPILImage()], workers),
        )
    if arguments.photos:
        crop = [v2.RandomResizedCrop(arguments.size), v2.RandomHorizontalFlip()]
        for policy, more in (
            ("none", []),
            ("autoaugment", [v2.AutoAugment(interpolation=v2.InterpolationMode.BILINEAR)]),
        ):
            augment = Augment(crop="random-resized", flip=0.5, policy=policy)
            found[f"photos, random-resized + flip{' + autoaugment' if more else ''}"] = (
                ours(arguments.photos, arguments.size, augment, "none"),
                peer(arguments.photos, [*crop, *more], workers),
            )
    return found


def images_per_second(loader: Iterable[Any], most: int) -> float:
    batches = iter(loader)
    next(batches)  # starts the workers
    start, images = time.perf_counter(), 0
    for _, labels in batches:
        images += len(labels)
        if images >= most:
            break
    return images / (time.perf_counter() - start)


def spread(values: list[float], show: Callable[[float], str]) -> str:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{show(median)} ({show(low)}-{show(high)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", metavar="FOLDER")
    parser.add_argument("--photos", metavar="FOLDER")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000, help="maximum number of images per round")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'case':44}{'workers':>8}  {'images/s (quartiles)':30}{'torchvision':26}{'ratio':>18}")
    for workers in arguments.workers:
        for name, loaders in cases(arguments, workers).items():
            speeds: tuple[list[float], list[float]] = ([], [])
            for _ in range(arguments.rounds):
                for loader, into in zip(loaders, speeds, strict=True):
                    into.append(images_per_second(loader, arguments.images))
            ratios = [mine / other for mine, other in zip(*speeds, strict=True)]
            integer = "{:.0f}".format
            print(
                f"{name:44}{workers:>8}  {spread(speeds[0], integer):30}{spread(speeds[1], integer):26}"
                f"{spread(ratios, '{:.2f}'.format):>18}",
                flush=True,
            )


if __name__ == "__main__":
    main()
