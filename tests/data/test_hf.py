"""Datasets of the Hugging Face library, written and read locally."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import v2

from repvgg.data import Augment, DataConfig, open_data
from repvgg.errors import DataError, UsageError
from tests.data.helpers import encoded, flatten, noise, run

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after every shuffled pass
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(number, first=0, **columns):
    """Return rows with an image, a label of three classes, and further columns."""
    rows = {
        "image": [{"bytes": encoded(noise(first + index)), "path": None} for index in range(number)],
        "label": [index % 3 for index in range(number)],
        **columns,
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"])}
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    splits = {"train": table(20), "validation": table(6, 100), "test": table(3, 200)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for number in range(4):
        table(6, 10 * number).to_parquet(folder / f"train-{number:05}-of-00004.parquet")
    table(6, 100).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def opened(path, options="", **config):
    return open_data(DataConfig(f"hf:{path}{options}", train_size=16, **config), seed=1)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_load_from_disk(saved, workers):
    data = opened(saved, workers=workers)
    assert (data.classes, data.num_train, data.num_val) == (("ant", "bee", "cow"), 20, 6)
    assert "'test' is ignored" in data.notes[0]
    ((images, labels),) = data.val_batches(6)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert_close(images[4], v2.PILToTensor()(noise(104)), atol=0, rtol=0)
    (batch,) = run(data.train_batches(20), 3)
    assert batch[1].bincount().tolist() == [7, 7, 6]


def test_parquet(parquet):
    data = opened(parquet)
    assert (data.num_train, data.num_val) == (24, 6)
    assert data.prepare(next(iter(data.train_batches(24)))[0]).isfinite().all()


def test_one_split(parquet):
    data = opened(parquet, "?split=test", val=f"hf:{parquet}?split=train")
    assert (data.num_train, data.num_val) == (6, 24)


def keys(batches):
    """Return a sorted list of values that identify the images."""
    return sorted(tuple(image.flatten()[:40].tolist()) for images, _ in batches for image in images)


@pytest.mark.parametrize(
    ("workers", "world_size"),
    [(0, 1), (0, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_stream_yields_every_image_once(parquet, workers, world_size):
    data = opened(parquet, "?streaming&length=24", workers=workers, cache="none")
    assert data.num_train == 24
    batches = [run(data.train_batches(2, rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    assert [len(one) for one in batches] == [12 // world_size] * world_size
    images = keys(flatten(batches))
    assert len(set(images)) == 24
    again = [run(data.train_batches(2, rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    for ours, theirs in zip(flatten(batches), flatten(again), strict=True):
        assert_close(ours, theirs, atol=0, rtol=0)
    other = [run(data.train_batches(2, rank=rank, world_size=world_size), 2) for rank in range(world_size)]
    assert keys(flatten(other)) == images
    assert any(not torch.equal(one[0], two[0]) for one, two in zip(batches[0], other[0], strict=True))


def test_validation_stream_keeps_the_order(parquet):
    data = opened(parquet, "?streaming", val=f"hf:{parquet}?split=test")
    ((images, labels),) = data.val_batches(10)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert_close(images[3], v2.PILToTensor()(noise(103)), atol=0, rtol=0)


def test_column_selection(tmp_path):
    folder = tmp_path / "columns"
    rows = table(12, kind=["x", "y"] * 6).rename_column("image", "photo")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder)
    assert opened(folder).classes == ("ant", "bee", "cow")
    assert opened(folder, "?label=kind").classes == ("x", "y")
    with pytest.raises(DataError, match="no column 'picture' but photo, label, kind"):
        opened(folder, "?image=picture")
    rows = rows.add_column("fine", [0, 1] * 6).cast_column("fine", datasets.ClassLabel(names=["p", "q"]))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    assert opened(tmp_path / "two").classes == ("ant", "bee", "cow")
    assert opened(tmp_path / "two", "?label=fine").classes == ("p", "q")
    rows = rows.rename_column("label", "coarse")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "neither")
    with pytest.raises(DataError, match="several columns that may be the label: choose one of coarse, fine"):
        opened(tmp_path / "neither")


def test_corrupt_rows_are_named(tmp_path):
    rows = {"image": [{"bytes": b"no image", "path": "x.png"}] * 2, "label": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "corrupt")
    with pytest.raises(DataError, match=r"x.png \(.*corrupt/train row \d\)' is not an image"):
        list(opened(tmp_path / "corrupt", augment=Augment(flip=0.5), cache="none").train_batches(1))


def test_labels_out_of_range_are_rejected(tmp_path):
    rows = {"image": [{"bytes": encoded(noise(i)), "path": None} for i in range(3)], "label": [0, 1, 5]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "high")
    with pytest.raises(DataError, match=r"row 2' has label 5, but the classes of .* are 0 … 1"):
        opened(tmp_path / "high", "?classes=2")
    with pytest.raises(DataError, match=r"row \d' has label 5, but the classes are 0 … 1"):
        list(opened(tmp_path / "high", "?classes=2&streaming&length=3").train_batches(3))


def test_missing_datasets_splits_and_options(tmp_path, parquet):
    with pytest.raises(DataError, match="cannot be opened"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match="no split 'extra'"):
        opened(parquet, "?split=extra")
    with pytest.raises(UsageError, match="unknown option 'pages'"):
        opened(parquet, "?pages=3")
    with pytest.raises(UsageError, match="names no dataset"):
        opened("")
