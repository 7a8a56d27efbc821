"""WebDataset: tar files, written and read locally."""

import io
import json
import tarfile

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import v2

from repvgg.data import Augment, DataConfig, open_data
from repvgg.errors import DataError, UsageError
from tests.data.helpers import assert_same_batches, encoded, flatten, noise, run

pytest.importorskip("webdataset")
AUGMENT = Augment(crop="random-resized", flip=0.5, erase=0.5)


def write_shard(path, numbers, label_file="cls", files=None):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            label = number % 3
            text = str(label) if label_file == "cls" else json.dumps({"label": label})
            image = (files or {}).get(number, encoded(noise(number)))
            for suffix, data in (("png", image), (label_file, text.encode())):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def write_shards(folder, counts=(7, 5, 6, 8), **options):
    """Write tar files with ``counts`` images, numbered consecutively."""
    folder.mkdir(parents=True)
    first = 0
    for index, count in enumerate(counts):
        write_shard(folder / f"part-{index}.tar", range(first, first + count), **options)
        first += count
    (folder / "classes.txt").write_text("ant\nbee\ncow\n")
    (folder / "sizes.json").write_text(json.dumps({f"part-{i}.tar": n for i, n in enumerate(counts)}))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "train")


def opened(folder, options="", pattern="part-*.tar", val=None, **config):
    uri = f"webdataset:{folder}/{pattern}"
    return open_data(DataConfig(uri + options, val=val or uri, train_size=16, **config), seed=1)


def numbers_of(batches):
    """Return the numbers of the images in the batches."""
    known = {tuple(v2.PILToTensor()(noise(number)).flatten().tolist()): number for number in range(40)}
    return [known[tuple(image.flatten().tolist())] for images, _ in batches for image in images]


@pytest.mark.parametrize("pattern", ["part-*.tar", "part-{0..3}.tar", "part-[0-3].tar"])
def test_tar_files_are_read_in_order(shards, pattern):
    data = opened(shards, pattern=pattern)
    assert (data.classes, data.num_train, data.num_val) == (("ant", "bee", "cow"), 26, 26)
    loader = data.val_batches(10)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [10, 10, 6]
    assert len(loader) == 3
    assert numbers_of(batches) == list(range(26))
    assert torch.cat([labels for _, labels in batches]).tolist() == [number % 3 for number in range(26)]
    images, labels = data.val_images([25, 3])
    assert_close(data.to_pixels(images)[1], v2.ToImage()(noise(3)).float() / 255, atol=1e-6, rtol=0)
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (0, 2), (0, 3), (0, 5), (1, 1), (2, 1), (2, 3)])
def test_validation_images_are_loaded_once(shards, workers, world_size):
    data = opened(shards, workers=workers)
    batches = [list(data.val_batches(4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(numbers_of(flatten(batches))) == list(range(26))
    assert all(len(labels) == 4 for rank in batches for _, labels in rank[:-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_reads_every_image_once(shards, workers):
    loader = opened(shards, workers=workers).train_batches(2)
    epochs = [numbers_of(run(loader, epoch)) for epoch in (0, 1, 0)]
    assert len(loader) == 13
    assert [sorted(epoch) for epoch in epochs] == [list(range(26))] * 3
    assert epochs[0] == epochs[2] != epochs[1]


def test_ranks_have_equal_numbers_of_batches(shards):
    data = opened(shards)
    batches = [run(data.train_batches(3, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(one) for one in batches] == [4, 4]
    seen = [set(numbers_of(one)) for one in batches]
    assert not seen[0] & seen[1]
    uneven = opened(shards, pattern="part-{0..1}.tar")
    batches = [run(uneven.train_batches(6, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(one) for one in batches] == [1, 1]
    numbers = sorted(flatten(map(numbers_of, batches)))
    assert len(set(numbers)) >= 11  # the rank with 5 images starts over for one more, which may be one of the other's


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_skipping_resumes_the_epoch(shards, workers, on_bad):
    loader = opened(shards, workers=workers, augment=AUGMENT, on_bad=on_bad).train_batches(3)
    full = run(loader, 2)
    for skip in (4, 7) if workers else range(9):
        assert_same_batches(run(loader, 2, skip=skip), full[skip:])
    assert_same_batches(run(loader, 2), full)


def test_augmentation_does_not_depend_on_workers(shards):
    """The number of workers changes the order, but not the images."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = []
    for workers in (0, 2):
        batches = run(opened(shards, workers=workers, augment=AUGMENT).train_batches(2), 1)
        found.append(sorted(tuple(image.flatten().tolist()) for images, _ in batches for image in images))
    assert found[0] == found[1]
    assert_close(torch.get_rng_state(), before, atol=0, rtol=0)


def test_stream_of_unknown_length(tmp_path):
    folder = write_shards(tmp_path / "s", label_file="json")
    (folder / "sizes.json").unlink()
    data = opened(folder)
    assert (data.num_train, data.num_val) == (None, None)
    loader = data.train_batches(4)
    assert len(run(loader)) == 6
    for unknown in (loader, data.val_batches(4)):
        with pytest.raises(TypeError):
            len(unknown)
    with pytest.raises(UsageError, match=r"\?length=N"):
        data.train_batches(4, world_size=2)
    assert len(run(opened(folder, "?length=60").train_batches(4))) == 15


def test_corrupt_examples(tmp_path):
    folder = write_shards(tmp_path / "s", files={3: b"no image", 8: encoded(noise(8))[:60]})
    with pytest.raises(DataError, match=r"part-\d.tar/000[38].png' is"):
        list(opened(folder).train_batches(26))
    data = opened(folder, on_bad="skip")
    numbers = numbers_of(data.val_batches(5))
    assert numbers == [number for number in range(26) if number not in (3, 8)]
    assert data.corrupt.count == 2
    assert data.corrupt.first(1)[0][0].endswith("part-0.tar/0003.png")


def test_truncated_tar_file(tmp_path):
    folder = write_shards(tmp_path / "s")
    data = (folder / "part-1.tar").read_bytes()
    (folder / "part-1.tar").write_bytes(data[: len(data) // 2 - 300])
    with pytest.raises(DataError, match=r"part-1.tar' is not a complete tar file"):
        list(opened(folder).val_batches(4))
    skipped = opened(folder, on_bad="skip")
    assert {*range(7), *range(12, 26)} <= set(numbers_of(skipped.val_batches(4)))
    assert skipped.corrupt.count == 1


def test_invalid_datasets_are_rejected(tmp_path):
    folder = write_shards(tmp_path / "s")
    with pytest.raises(DataError, match="has label 2, but the classes are 0 … 1"):
        list(opened(folder, "?classes=2", val=f"webdataset:{folder}/part-*.tar?classes=2").train_batches(26))
    with pytest.raises(DataError, match="name a validation set with --val URI"):
        open_data(DataConfig(f"webdataset:{folder}/part-0.tar"))
    with pytest.raises(DataError, match="There is no file"):
        opened(folder, pattern="none-*.tar")
    with pytest.raises(DataError, match=r"part-9\.tar"):
        opened(folder, pattern="part-{0,9}.tar")
    (folder / "sizes.json").write_text('{"part-0.tar": 7}')
    with pytest.raises(DataError, match="a number for every tar file"):
        opened(folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"put classes\.txt next to the tar files"):
        opened(folder)
    write_shard(folder / "part-0.tar", range(3), label_file="txt")
    with pytest.raises(DataError, match="has no label"):
        list(
            opened(
                folder, "?classes=3&length=3", "part-0.tar", f"webdataset:{folder}/part-0.tar?classes=3"
            ).train_batches(3)
        )


def test_commands_need_permission(shards, tmp_path):
    effect = tmp_path / "effect"
    tar = shards / "part-0.tar"
    uri = f"webdataset:pipe:touch {effect}; cat {tar}?classes=3"
    with pytest.raises(UsageError, match=r"runs the shell command 'touch .*--data.allow-commands"):
        open_data(DataConfig(uri, val=f"webdataset:{tar}"))
    with pytest.raises(UsageError, match="runs the shell command"):
        open_data(DataConfig(f"webdataset:{tar}", val=uri))
    with pytest.raises(UsageError, match="runs the shell command"):  # among others
        open_data(DataConfig(f"webdataset:{tar}::pipe:touch {effect}", val=f"webdataset:{tar}"))
    assert not effect.exists()
    data = open_data(DataConfig(uri, val=uri, train_size=16, allow_commands=True))
    assert numbers_of(data.val_batches(10)) == list(range(7))
    assert effect.exists()


@pytest.mark.parametrize("name", ["pipe:touch effect #.tar", "-", "http:--x.tar"])
def test_local_names_are_never_commands(tmp_path, monkeypatch, name):
    write_shards(tmp_path / "data", counts=(3,))
    monkeypatch.chdir(tmp_path / "data")
    (tmp_path / "data" / "sizes.json").unlink()
    (tmp_path / "data" / "part-0.tar").rename(name)
    data = open_data(DataConfig("webdataset:[ph-]*?classes=3", val="webdataset:[ph-]*?classes=3", train_size=16))
    assert numbers_of(data.val_batches(10)) == [0, 1, 2]
    assert not (tmp_path / "data" / "effect").exists()


def test_ranges_of_very_many_files():
    with pytest.raises(DataError, match="names 1,000,000,000,000 tar files"):
        open_data(DataConfig("webdataset:{000000..999999}{000000..999999}.tar?classes=3"))


def test_entries_that_are_larger_than_an_image_may_be(tmp_path):
    """A sparse or compressed entry may be a few bytes on disk."""
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("0000.png")
        entry.size = 2**40
        tar.addfile(entry)
    data = open_data(
        DataConfig(f"webdataset:{path}?classes=3", val=f"webdataset:{path}?classes=3", train_size=16, on_bad="skip")
    )
    assert list(data.val_batches(4)) == []
    assert "1,099,511,627,776 bytes" in data.corrupt.first(1)[0][1]
