import copy
import sys

import pytest
import torch
from torch.testing import assert_close
from torchvision import transforms
from torchvision.transforms import v2

import repvgg.data
from repvgg.data import Augment, DataConfig, open_data
from repvgg.data.transforms import BatchTransforms
from repvgg.errors import DataError, MissingDependencyError, UsageError
from tests.data.helpers import noise, write_class_folders, write_splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("opening"), {"a": 5, "b": 4}, {"a": 2, "b": 2}, size=(40, 30))


def opened(folder, **options):
    return open_data(DataConfig(f"imagefolder:{folder}", **options))


def test_prepared_images_equal_torchvision(folder):
    data = opened(folder, train_size=20, test_size=24)
    assert (data.input_shape, data.test_shape) == ((3, 20, 20), (3, 24, 24))
    peer = v2.Compose(
        [
            v2.Resize(27),
            v2.CenterCrop(24),
            transforms.ToTensor(),
            v2.Normalize(data.mean, data.std),
        ]
    )
    ((images, labels),) = data.val_batches(4)
    expected = torch.stack(
        [peer(noise(10_000 + 100 * label + number, (40, 30))) for label in (0, 1) for number in (0, 1)]
    )
    assert images.dtype == torch.uint8
    assert_close(data.prepare(images), expected, atol=0, rtol=0)
    again, same = data.val_images([3, 0])
    assert_close(again, expected[[3, 0]], atol=0, rtol=0)
    assert_close(same, labels[[3, 0]], atol=0, rtol=0)
    assert_close(data.to_pixels(again), images[[3, 0]].float() / 255, atol=1e-6, rtol=0)


def test_prepare_passes_normalized_images_and_keeps_its_input(folder):
    prepare = opened(folder, train_size=16).prepare
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    before = images.clone()
    prepared = prepare(images)
    assert prepare(prepared) is prepared
    assert_close(images, before, atol=0, rtol=0)
    assert not prepare.state_dict()
    on_meta = copy.deepcopy(prepare).to("meta")
    assert on_meta(images.to("meta")).shape == images.shape


@pytest.mark.parametrize(
    ("channels", "mean", "std", "expected"),
    [
        (None, None, None, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        (1, None, None, ((pytest.approx(0.449),), (pytest.approx(0.226),))),
        (3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))),
        (None, (0.5,), (0.5,), ((0.5,) * 3, (0.5,) * 3)),
    ],
)
def test_normalization(folder, channels, mean, std, expected):
    data = opened(folder, train_size=16, channels=channels, mean=mean, std=std)
    assert (data.mean, data.std) == expected


def test_default_size_of_a_folder_is_224_pixels(folder):
    data = opened(folder, cache="none")
    assert data.input_shape == data.test_shape == (3, 224, 224)
    images, _ = next(iter(data.train_batches(2)))
    assert images.shape == (2, 3, 224, 224)


def test_training_images_without_random_crop_equal_validation_images(folder, tmp_path):
    write_class_folders(tmp_path, {"a": 5, "b": 4}, size=(40, 30))
    data = opened(folder, train_size=20, val=f"imagefolder:{tmp_path}")
    train = {tuple(x.flatten().tolist()) for images, _ in data.train_batches(9) for x in images}
    val = {tuple(x.flatten().tolist()) for images, _ in data.val_batches(9) for x in images}
    assert len(train) == 9
    assert train == val


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_erased_squares_are_grey(folder, cache):
    data = opened(folder, train_size=16, cache=cache, augment=Augment(erase=1.0, erase_size=1.0))
    images, _ = next(iter(data.train_batches(9)))
    middle = data.prepare(images)[:, :, 8, 8]
    assert middle.abs().min(1).values.le(0.02).sum() >= 4


def test_padding_larger_than_the_image_is_rejected(folder):
    with pytest.raises(UsageError, match="cannot be padded by reflection with 16 pixels"):
        opened(folder, train_size=16, augment=Augment(crop="pad", crop_padding=16))


def test_val_images_rejects_a_corrupt_image(tmp_path):
    write_splits(tmp_path, {"a": 2, "b": 2}, {"a": 1, "b": 1})
    (tmp_path / "val" / "b" / "000.png").write_bytes(b"")
    data = opened(tmp_path, train_size=16, on_bad="skip")
    assert data.val_images([0])[1].tolist() == [0]
    with pytest.raises(DataError, match="is empty"):
        data.val_images([0, 1])


def test_no_numbers_are_drawn_without_augmentation(folder, monkeypatch):
    def drawn(*_):
        raise AssertionError("numbers were drawn")

    monkeypatch.setattr("repvgg.data.transforms.uniforms", drawn)
    assert len(list(opened(folder, train_size=16).train_batches(3))) == 3
    with pytest.raises(AssertionError, match="numbers were drawn"):
        BatchTransforms(Augment(flip=0.5), 0, (0.0,), (0.0,)).jitter_crop_flip(
            torch.zeros(1, 1, 2, 2), 0, torch.zeros(1).long()
        )


@pytest.mark.parametrize(
    ("module", "uri"),
    [("PIL", "fake:20x2"), ("torchvision.datasets", "torchvision:CIFAR10:."), ("sklearn.datasets", "digits:")],
)
def test_missing_package_is_one_sentence_that_names_the_extra(monkeypatch, module, uri):
    monkeypatch.setitem(sys.modules, module, None)  # makes importing it raise ModuleNotFoundError
    with pytest.raises(MissingDependencyError) as caught:
        repvgg.data.open_data(DataConfig(uri))
    package = module.partition(".")[0]
    assert str(caught.value) == f"This needs {package!r}, which is not installed: pip install 'repvgg[train]'."
