import os

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.testing import assert_close
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from repvgg.data import Augment, DataConfig, open_data
from repvgg.data.sources import open_source
from repvgg.data.splits import PackedStrings
from repvgg.errors import DataError, UsageError
from tests.data.helpers import encoded, noise, run, write_class_folders, write_splits

# imagefolder:


def folder(path, **options):
    return open_data(DataConfig(f"imagefolder:{path}", train_size=16, **options))


def val_labels(data):
    return torch.cat([labels for _, labels in data.val_batches(100)]).tolist()


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_names_of_the_validation_folder(tmp_path, name):
    write_class_folders(tmp_path / "train", {"b": 3, "a": 2})
    write_class_folders(tmp_path / name, {"a": 1, "b": 2})
    data = folder(tmp_path)
    assert (data.classes, data.num_train, data.num_val, data.notes) == (("a", "b"), 5, 3, ())
    assert data.input_shape == data.test_shape == (3, 16, 16)
    assert val_labels(data) == [0, 1, 1]


def test_validation_folder_takes_precedence_over_test(tmp_path):
    for split in ("train", "test", "validation"):
        write_class_folders(tmp_path / split, {"a": 2, "b": 2 if split == "validation" else 5})
    data = folder(tmp_path)
    assert data.num_val == 4
    assert data.notes == ("test/ is ignored: the validation images are those of validation/.",)


def test_files_equal_those_of_torchvision(tmp_path):
    write_splits(tmp_path, {"a": 2, "b": 3}, {"a": 1, "b": 1})
    for name in ("X.JPG", "y.Jpeg", "z.WEBP", "deep/er/one.tif"):
        (tmp_path / "train" / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(1).save(tmp_path / "train" / "a" / name)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    peer = ImageFolder(str(tmp_path / "train"))
    split = open_source(DataConfig(f"imagefolder:{tmp_path}")).train
    assert len(peer) == len(split) == 9
    assert [(split.location(index), int(split.labels[index])) for index in range(9)] == peer.samples


def locations(split):
    return [split.location(index) for index in range(len(split))]


def test_each_folder_is_entered_once(tmp_path):
    """Links in a circle have no end, and two links to one folder in each of 40 levels would be 2 ** 40 folders."""
    write_splits(tmp_path, {"a": 2, "b": 2}, {"a": 1, "b": 1})
    source = open_source(DataConfig(f"imagefolder:{tmp_path}"))
    plain = locations(source.train)
    train = tmp_path / "train"
    (train / "a" / "again").symlink_to(".")
    (train / "a" / "and_again").symlink_to("..")
    (train / "b" / "zoo").mkdir()
    noise(0).save(train / "b" / "zoo" / "x.png")
    (train / "b" / "link").symlink_to("zoo")
    level = train / "b"
    for _ in range(40):
        (level / "one").mkdir()
        (level / "two").symlink_to("one")
        level /= "one"
    noise(1).save(level / "deep.png")
    source = open_source(DataConfig(f"imagefolder:{tmp_path}"))
    of_b = [str(train / "b" / name) for name in ("000.png", "001.png", f"{'one/' * 40}deep.png", "zoo/x.png")]
    # ".." of class a is the folder with all classes.
    assert [path for path in locations(source.train) if "and_again" not in path] == [*plain[:2], *of_b]
    assert len(locations(source.train)) == 6 + 4
    assert len(source.notes) == 1
    assert "leads to a folder that is read already" in source.notes[0]
    assert source.notes[0].endswith("more.")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_files_that_are_no_images_are_named(tmp_path, on_bad):
    write_splits(tmp_path, {"a": 2, "b": 2}, {"a": 1, "b": 1})
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    (tmp_path / "train" / "a" / "zero.png").symlink_to("/dev/zero")
    data = folder(tmp_path, on_bad=on_bad, cache="none")
    if on_bad == "raise":
        with pytest.raises(DataError, match=r"pipe.png' is a FIFO .* on_bad='skip'|zero.png' is a device"):
            run(data.train_batches(6))
        return
    assert [len(labels) for _, labels in run(data.train_batches(6))] == [6]
    assert {reason.split(" and ")[0] for _, reason in data.corrupt.first(9)} == {"is a FIFO", "is a device"}


def test_hidden_files_are_ignored(tmp_path):
    write_splits(tmp_path, {"a": 2, "b": 2}, {"a": 1, "b": 1})
    write_class_folders(tmp_path / "train", {".ipynb_checkpoints": 2, "__MACOSX": 1})
    (tmp_path / "train" / "a" / "._000.png").write_bytes(b"junk")
    assert folder(tmp_path).num_train == 4


def test_single_split_is_divided_deterministically(tmp_path):
    write_class_folders(tmp_path, {"a": 20, "b": 31, "c": 2})
    first, again = (folder(tmp_path, augment=Augment(flip=0.5)) for _ in range(2))
    assert (first.num_train, first.num_val) == (47, 6)
    assert sorted(val_labels(first)) == [0, 0, 1, 1, 1, 2]
    assert "6 of its 53 images" in first.notes[0]
    for (images, _), (same, _) in zip(first.val_batches(6), again.val_batches(6), strict=True):
        assert_close(images, same, atol=0, rtol=0)
    source = open_source(DataConfig(f"imagefolder:{tmp_path}"))
    names = [split.location(index) for split in (source.train, source.val) for index in range(len(split))]
    assert len(set(names)) == 53


def test_validation_split_of_another_uri(tmp_path):
    write_class_folders(tmp_path / "one", {"a": 4, "b": 4})
    write_splits(tmp_path / "two", {"a": 9, "b": 9}, {"a": 1, "b": 2})
    assert folder(tmp_path / "one", val=f"imagefolder:{tmp_path / 'two'}").num_val == 3
    data = folder(tmp_path / "two", val=f"imagefolder:{tmp_path / 'one'}")
    assert (data.num_train, data.num_val) == (18, 8)
    assert "is ignored" in data.notes[0]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ({}, {"a": 1}, "contains no class folders"),
        ({"a": 0, "b": 0}, {"a": 1, "b": 1}, "no training images"),
        ({"a": 2, "b": 2}, {"a": 0, "b": 0}, "no validation images"),
        ({"a": 2}, {"a": 1}, "one class, 'a'"),
        ({"a": 2, "b": 2}, {"a": 1}, "Class 'b' of .* has no validation images"),
        ({"a": 2, "b": 2}, {"a": 1, "b": 0}, "Class 'b' of .* has no validation images"),
        ({"a": 2, "b": 2}, {"a": 1, "b": 1, "c": 1, "d": 1}, "Class 'c', 'd' of .* no training images"),
        ({"a": 2, "b": 2, "c": 0}, {"a": 1, "b": 1, "c": 1}, "Class 'c' of .* has no training images"),
    ],
)
def test_splits_that_do_not_match_are_rejected(tmp_path, train, val, message):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    write_splits(tmp_path, train, val)
    with pytest.raises(DataError, match=message) as caught:
        folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_folders(tmp_path):
    with pytest.raises(DataError, match="There is no folder"):
        folder(tmp_path / "none")
    with pytest.raises(DataError, match="contains no class folders"):
        folder(tmp_path)
    write_class_folders(tmp_path, {"a": 5, "b": 1})
    with pytest.raises(DataError, match=r"'b' of .* has one image.*--val URI"):
        folder(tmp_path)


def test_packed_strings_keep_names_that_are_not_text():
    names = ["a/ü.png", "b/\udcff.png", "", "c" * 300]
    packed = PackedStrings(names)
    assert (len(packed), [packed[index] for index in range(4)]) == (4, names)


def test_modes_and_channels(tmp_path):
    write_splits(tmp_path, {"a": 3, "b": 3}, {"a": 1, "b": 1})
    noise(0).convert("CMYK").save(tmp_path / "train" / "a" / "cmyk.jpg")
    noise(0).convert("RGBA").save(tmp_path / "train" / "a" / "alpha.png")
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tmp_path / "train" / "b" / "deep.png")
    for channels in (1, 3):
        data = folder(tmp_path, channels=channels)
        assert data.input_shape == (channels, 16, 16)
        assert len(data.mean) == len(data.std) == channels
        assert [images.shape[1] for images, _ in data.train_batches(9)] == [channels]


# torchvision:


def write_mnist(root, train=40, test=20, name="MNIST"):
    """Write files in the format of MNIST, with labels 0 … 9 in turn."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for prefix, number in (("train", train), ("t10k", test)):
        images = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = (np.arange(number) % 10).astype(np.uint8)
        head = bytes([0, 0, 8, 3]) + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + number.to_bytes(4, "big") + labels.tobytes()
        )
        arrays[prefix] = images
    return arrays


@pytest.mark.parametrize("name", ["MNIST", "mnist", "FashionMNIST"])
def test_mnist(tmp_path, name):
    arrays = write_mnist(tmp_path, name="FashionMNIST" if "Fashion" in name else "MNIST")
    data = open_data(DataConfig(f"torchvision:{name}:{tmp_path}"))
    assert (data.num_train, data.num_val, data.input_shape) == (40, 20, (1, 28, 28))
    assert len(data.classes) == 10
    assert data.classes[3] == ("Dress" if "Fashion" in name else "3 - three")
    ((images, labels),) = data.val_batches(20)
    assert_close(images, torch.from_numpy(arrays["t10k"]).unsqueeze(1), atol=0, rtol=0)
    assert labels.tolist() == [index % 10 for index in range(20)]


def test_cifar(tmp_path, monkeypatch):
    import pickle

    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", list("abcdefghij")))
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    for index, (name, _) in enumerate([*kind.train_list, *kind.test_list]):
        entry = {"data": pixels[10 * index : 10 * index + 10], "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(entry))
    data = open_data(DataConfig(f"torchvision:CIFAR10:{tmp_path}"))
    assert (data.num_train, data.num_val, data.input_shape) == (50, 10, (3, 32, 32))
    assert data.mean == (0.4914, 0.4822, 0.4465)
    ((images, labels),) = data.val_batches(10)
    assert_close(images, torch.from_numpy(pixels[50:].reshape(10, 3, 32, 32)), atol=0, rtol=0)
    assert labels.tolist() == list(range(10))


def test_gtsrb(tmp_path):
    """GTSRB has the splits "train" and "test", image files, and labels next to them."""
    root = tmp_path / "gtsrb"
    for label in range(3):
        folder = root / "GTSRB" / "Training" / f"{label:05}"
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{number}.ppm").write_bytes(encoded(noise(10 * label + number), "PPM"))
    images = root / "GTSRB" / "Final_Test" / "Images"
    images.mkdir(parents=True)
    for number in range(3):
        (images / f"{number}.ppm").write_bytes(encoded(noise(100 + number), "PPM"))
    rows = "".join(f"{number}.ppm;16;16;0;0;16;16;{number}\n" for number in range(3))
    (root / "GT-final_test.csv").write_text("Filename;Width;Height;X1;Y1;X2;Y2;ClassId\n" + rows)
    data = open_data(DataConfig(f"torchvision:GTSRB:{tmp_path}", train_size=16))
    assert (data.num_train, data.num_val, data.classes) == (12, 3, ("0", "1", "2"))
    ((images, labels),) = data.val_batches(3)
    assert_close(images[1], v2.PILToTensor()(noise(101)), atol=0, rtol=0)
    assert labels.tolist() == [0, 1, 2]


def test_unknown_or_missing_torchvision_datasets(tmp_path):
    with pytest.raises(DataError, match=r"torchvision:CIFAR10:.*:download"):
        open_data(DataConfig(f"torchvision:CIFAR10:{tmp_path}"))
    with pytest.raises(UsageError, match="no dataset 'CIFAR11'"):
        open_data(DataConfig(f"torchvision:CIFAR11:{tmp_path}"))
    with pytest.raises(UsageError, match="torchvision:NAME:PATH"):
        open_data(DataConfig("torchvision:CIFAR10"))


def test_arrays_support_every_augmentation(tmp_path):
    write_mnist(tmp_path)
    augment = Augment(crop="random-resized", policy="randaugment", erase=1.0)
    data = open_data(DataConfig(f"torchvision:MNIST:{tmp_path}", train_size=20, channels=3, augment=augment))
    (images, _), *_ = run(data.train_batches(40))
    assert (images.shape, images.dtype) == ((40, 3, 20, 20), torch.uint8)
    ((images, _),) = data.val_batches(20)
    assert images.shape == (20, 3, 20, 20)


# digits: and fake:


def test_digits_with_two_sizes_and_three_channels():
    data, grey = open_data(DataConfig(train_size=16, test_size=24, channels=3)), open_data(DataConfig(train_size=24))
    assert (data.input_shape, data.test_shape) == ((3, 16, 16), (3, 24, 24))
    images, labels = data.val_images([5])
    pixels, label = grey.val_images([5])
    assert_close(data.to_pixels(images), grey.to_pixels(pixels).expand(1, 3, 24, 24))
    assert_close(labels, label)


def test_jittered_digits_are_black_beyond_the_border():
    from repvgg.data import AffineJitter

    data = open_data(DataConfig(augment=Augment(jitter=AffineJitter(translate=0.9))))
    images, _ = next(iter(data.train_batches(64)))
    assert_close(data.to_pixels(images).amin(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert float(images.min()) == pytest.approx(-data.mean[0] / data.std[0], abs=1e-5)


def test_digits_support_policies():
    data = open_data(DataConfig(augment=Augment(policy="autoaugment")))
    images, _ = next(iter(data.train_batches(16)))
    assert (images.dtype, images.shape) == (torch.uint8, (16, 1, 32, 32))


def test_fake_images_are_separable():
    data = open_data(DataConfig("fake:400x8", train_size=16))
    assert (data.num_train, data.num_val, len(data.classes)) == (400, 80, 8)
    ((x, y),) = [(data.prepare(x).flatten(1), y) for x, y in data.train_batches(400)]
    ((val_x, val_y),) = [(data.prepare(x).flatten(1), y) for x, y in data.val_batches(80)]
    centres = torch.stack([x[y == label].mean(0) for label in range(8)])
    accuracy = (torch.cdist(val_x, centres).argmin(1) == val_y).float().mean()
    assert accuracy > 0.9
    assert torch.cdist(val_x, x).min() > 1


def test_fake_images_do_not_depend_on_the_seed():
    (first, _), *_ = open_data(DataConfig("fake:50x5")).val_batches(8)
    (again, _), *_ = open_data(DataConfig("fake:50x5"), seed=9).val_batches(8)
    assert_close(first, again, atol=0, rtol=0)
    assert first.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("uri", ["fake:x", "fake:10x1", "fake:3x10", "fake:many", "digits:8"])
def test_malformed_uris_are_rejected(uri):
    with pytest.raises(UsageError):
        open_data(DataConfig(uri))
