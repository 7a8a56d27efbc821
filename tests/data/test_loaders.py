import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

from repvgg.data import AffineJitter, Augment, DataConfig, TrainLoader, open_data
from repvgg.errors import DataError, UsageError
from tests.data.helpers import assert_same_batches, noise, order_of, run, truncate, write_splits

FAST = Augment(crop="pad", crop_padding=2, flip=0.5, erase=0.3, jitter=AffineJitter(10, 0.05, 0.1))
GENERAL = Augment(crop="random-resized", flip=0.5, policy="trivialaugment", erase=0.3)
COUNTS = {"ant": 9, "bee": 8, "cow": 6}  # 23 images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("images"), COUNTS, {"ant": 3, "bee": 2, "cow": 2})


def opened(folder, augment, seed=1, **options):
    return open_data(DataConfig(f"imagefolder:{folder}", train_size=16, augment=augment, **options), seed=seed)


@pytest.fixture(scope="module", params=[FAST, GENERAL], ids=["fast", "general"])
def alone(request, folder):
    """Return an Augment and three epochs of batches loaded without workers or other ranks."""
    data = opened(folder, request.param)
    loader = data.train_batches(4)
    return request.param, [run(loader, epoch) for epoch in range(3)]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(folder, alone, workers):
    augment, epochs = alone
    loader = opened(folder, augment, workers=workers).train_batches(4)
    for epoch in (0, 2, 1):
        assert_same_batches(run(loader, epoch), epochs[epoch])
    assert_same_batches(run(loader, 1, skip=3), epochs[1][3:])
    assert_same_batches(run(loader, 1), epochs[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_all_ranks_equal_those_of_one_process(folder, alone, workers):
    augment, epochs = alone
    data = opened(folder, augment, workers=workers)
    loaders = [data.train_batches(2, rank=rank, world_size=2) for rank in range(2)]
    for epoch in range(2):
        ranks = [run(loader, epoch) for loader in loaders]
        together = [
            tuple(torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in zip(*ranks, strict=True)
        ]
        assert_same_batches(together, epochs[epoch])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_batches_do_not_depend_on_the_cache(folder, alone, cache):
    augment, epochs = alone
    assert_same_batches(run(opened(folder, augment, cache=cache).train_batches(4), 1), epochs[1])


def test_batch_is_a_slice_of_the_epoch_order(folder):
    data = opened(folder, Augment(), seed=5)
    labels = torch.tensor([0] * 9 + [1] * 8 + [2] * 6)
    loader = data.train_batches(5)
    assert isinstance(loader, TrainLoader)
    for epoch in (0, 3):
        order = torch.tensor(order_of(5, epoch, 23))
        batches = run(loader, epoch)
        assert len(batches) == len(loader) == 4
        for index, (images, found) in enumerate(batches):
            wanted = order[5 * index : 5 * index + 5]
            assert_close(found, labels[wanted], atol=0, rtol=0)
            for image, number in zip(images, wanted.tolist(), strict=True):
                label, position = int(labels[number]), number - [0, 9, 17][int(labels[number])]
                assert_close(image, v2.PILToTensor()(noise(100 * label + position)), atol=0, rtol=0)


def test_augmentation_does_not_depend_on_the_batch_size(folder):
    for augment in (FAST, GENERAL):
        data = opened(folder, augment)
        by_four = torch.cat([images for images, _ in run(data.train_batches(4), 2)])
        by_seven = torch.cat([images for images, _ in run(data.train_batches(7), 2)])
        assert_close(by_four, by_seven[:20], atol=0, rtol=0)


@pytest.mark.parametrize("augment", [FAST, GENERAL], ids=["fast", "general"])
def test_augmentation_depends_on_seed_and_epoch(folder, augment):
    first = torch.cat([images for images, _ in run(opened(folder, augment, seed=1).train_batches(4), 0)])
    for seed, epoch in ((2, 0), (1, 1)):
        other = torch.cat([images for images, _ in run(opened(folder, augment, seed=seed).train_batches(4), epoch)])
        assert (first != other).float().mean() > 0.5


@pytest.mark.parametrize("augment", [FAST, GENERAL], ids=["fast", "general"])
def test_global_random_state_is_unchanged(folder, augment):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    data = opened(folder, augment)
    for _ in data.train_batches(4):
        assert_close(torch.get_rng_state(), before, atol=0, rtol=0)
    list(data.val_batches(4))
    assert_close(torch.get_rng_state(), before, atol=0, rtol=0)


def test_skipped_batches_are_not_read(folder, monkeypatch):
    from repvgg.data.splits import FileSplit

    loader = opened(folder, GENERAL, cache="none").train_batches(4)
    read = []
    original = FileSplit.image
    monkeypatch.setattr(FileSplit, "image", lambda split, index: read.append(index) or original(split, index))
    assert len(run(loader, 0, skip=3)) == 2
    assert len(read) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_abandoned_pass_does_not_affect_the_next(folder, alone, workers):
    augment, epochs = alone
    loader = opened(folder, augment, workers=workers).train_batches(4)
    loader.set_epoch(1)
    for _ in loader:
        break
    assert_same_batches(run(loader, 1), epochs[1])


def test_invalid_arguments_are_rejected(folder):
    data = opened(folder, Augment())
    with pytest.raises(UsageError, match="23 training images do not fill one batch of 12 on each of 2 ranks"):
        data.train_batches(12, world_size=2)
    with pytest.raises(UsageError, match=r"rank must be in \[0, 2\), got 2"):
        data.train_batches(2, rank=2, world_size=2)
    with pytest.raises(UsageError, match="batch_size must be at least 1 image, got 0"):
        data.val_batches(0)
    with pytest.raises(UsageError, match="6 batches cannot be skipped"):
        data.train_batches(4).skip(6)


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 1), (2, 2), (3, 3), (50, 1), (1, 9)])
def test_validation_images_are_loaded_once_and_in_order(folder, cache, batch_size, world_size):
    data = opened(folder, FAST, cache=cache)
    loaders = [data.val_batches(batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [list(loader) for loader in loaders]
    assert [len(one) for one in batches] == [len(loader) for loader in loaders]
    assert torch.cat([labels for rank in batches for _, labels in rank]).tolist() == [0, 0, 0, 1, 1, 2, 2]
    images = torch.cat([images for rank in batches for images, _ in rank])
    assert_close(images[4], v2.PILToTensor()(noise(10_000 + 101)), atol=0, rtol=0)


def test_batches_are_those_of_earlier_versions(tmp_path):
    """Seed, epoch and image determine every pixel. These transforms use integers only: no platform differs."""
    for split, first, count in (("train", 0, 9), ("val", 100, 2)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                generator = np.random.Generator(np.random.PCG64(first + 20 * label + number))
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    augment = Augment(crop="pad", crop_padding=3, flip=0.5, erase=0.5, erase_size=0.3)
    loader = opened(tmp_path, augment, seed=12).train_batches(4, rank=1, world_size=2)
    digest = hashlib.sha256()
    for epoch in range(3):
        for images, labels in run(loader, epoch):
            digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "0ad24f540377a68f"


# Corrupt images


@pytest.fixture
def corrupt_folder(tmp_path):
    """Write a folder with two corrupt training images and a corrupt validation image."""
    write_splits(tmp_path, COUNTS, {"ant": 3, "bee": 2, "cow": 2})
    truncate(tmp_path / "train" / "bee" / "003.png")
    (tmp_path / "train" / "cow" / "001.png").write_bytes(b"")
    (tmp_path / "val" / "bee" / "000.png").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize(("workers", "cache"), [(0, "none"), (1, "none"), (0, "memory")])
def test_corrupt_image_is_named(corrupt_folder, workers, cache):
    with pytest.raises(
        DataError, match=r"(bee/003.png' is truncated|cow/001.png' is empty).*set on_bad='skip'"
    ) as caught:
        list(opened(corrupt_folder, Augment(), workers=workers, cache=cache).train_batches(23))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"val/bee/000.png' is not an image"):
        list(opened(corrupt_folder, Augment(), workers=workers, cache="none").val_batches(7))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_corrupt_images_are_replaced(corrupt_folder, workers, cache):
    data = opened(corrupt_folder, Augment(), workers=workers, cache=cache, on_bad="skip")
    corrupt = {9 + 3, 17 + 1}
    for epoch in range(4):
        order = order_of(1, epoch, 23)
        expected = []
        for position in range(20):
            while order[position % 23] in corrupt:
                position += 1
            expected.append(order[position % 23])
        labels = torch.cat([labels for _, labels in run(data.train_batches(4), epoch)])
        assert labels.tolist() == [0 if index < 9 else 1 if index < 17 else 2 for index in expected]
    assert data.corrupt.count == 2
    assert {os.path.basename(location) for location, _ in data.corrupt.first(5)} == {"003.png", "001.png"}
    batches = list(data.val_batches(7))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 2, 2]
    assert data.corrupt.count == 3
    assert data.corrupt.first(3)[-1][1] == "is not an image in one of the formats JPEG, PNG, BMP, WEBP, TIFF, PPM"
    assert len(data.corrupt.first(1)) == 1


def test_only_corrupt_images(tmp_path):
    write_splits(tmp_path, {"a": 3, "b": 3}, {"a": 1, "b": 1})
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="None of the 6 training images can be read"):
        list(opened(tmp_path, Augment(), on_bad="skip", cache="none").train_batches(2))
    with pytest.raises(DataError, match="None of the 6 images can be read"):
        opened(tmp_path, Augment(), on_bad="skip", cache="memory")


def test_death_of_a_worker_is_one_sentence(folder):
    loader = opened(folder, GENERAL, workers=1, cache="none").train_batches(4)
    batches = iter(loader)
    next(batches)
    for process in loader._loader._iterator._workers:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="A worker process died"):
        list(batches)


def test_images_of_several_sizes_are_not_cached_for_random_crops(tmp_path):
    write_splits(tmp_path, {"a": 3, "b": 3}, {"a": 1, "b": 1})
    noise(5, (20, 16)).save(tmp_path / "train" / "b" / "009.png")
    assert len(list(opened(tmp_path, GENERAL).train_batches(7))) == 1
    with pytest.raises(UsageError, match="several sizes"):
        opened(tmp_path, GENERAL, cache="memory")
    assert_same_batches(
        run(opened(tmp_path, FAST, cache="memory").train_batches(7)),
        run(opened(tmp_path, FAST, cache="none").train_batches(7)),
    )


KILLED = """
import sys, time
from repvgg.data import DataConfig, open_data
if __name__ == "__main__":
    batches = open_data(DataConfig(sys.argv[1], train_size=16, workers=2)).train_batches(4)
    iterator = iter(batches)
    next(iterator)
    print("loading", flush=True)
    time.sleep(300)
"""


def test_workers_end_when_the_run_is_killed(folder, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), f"imagefolder:{folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        try:
            assert killed.stdout.readline() == "loading\n"
            started = psutil.Process(killed.pid).children(recursive=True)
            assert len(started) >= 4  # the fork server, two workers, the resource tracker
        finally:
            killed.kill()
    assert psutil.wait_procs(started, timeout=30)[1] == []
