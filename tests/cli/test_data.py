import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from repvgg.data import DataConfig, check_data
from repvgg.errors import UsageError


def picture(path, seed, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def photos(tmp_path):
    """Six training images and three validation images, none of them corrupt."""
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            picture(tmp_path / "photos" / "train" / name / f"{number}.png", 10 * label + number)
        picture(tmp_path / "photos" / "val" / name / "0.png", 100 + label)
    picture(tmp_path / "photos" / "val" / "dog" / "1.png", 102, (30, 20))
    return tmp_path / "photos"


def test_good_images(repvgg, photos):
    outcome = repvgg("data", "check", f"imagefolder:{photos}")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "class  train  validation",
        "cat        3           1",
        "dog        3           2",
        "all        6           3",
        "train: smallest 12 x 10, median 12 x 10, largest 12 x 10 pixels; 6 RGB",
        "validation: smallest 12 x 10, median 12 x 10, largest 30 x 20 pixels; 3 RGB",
        "9 images read, 0 bad",
    ]


@pytest.fixture
def spoiled(photos):
    """One of each kind of trouble."""
    train = photos / "train"
    (train / "cat" / "empty.jpg").write_bytes(b"")
    (train / "cat" / "page.jpg").write_text("<html>")
    picture(train / "dog" / "half.png", 50, (60, 60))
    whole = (train / "dog" / "half.png").read_bytes()
    (train / "dog" / "half.png").write_bytes(whole[: len(whole) // 2])
    picture(train / "dog" / "print.jpg", 51, mode="CMYK")
    picture(train / "dog" / "line.png", 52, (12, 1))
    (train / "dog" / "movie.gif").write_bytes(b"GIF89a")
    (photos / "val" / "cat" / "copy.png").write_bytes((train / "cat" / "1.png").read_bytes())
    (train / "dog" / "cat.png").write_bytes((train / "cat" / "2.png").read_bytes())
    return photos


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_that_is_wrong_is_listed(repvgg, spoiled, workers):
    outcome = repvgg("data", "check", f"imagefolder:{spoiled}", "--workers", workers)
    assert (outcome.code, outcome.err) == (1, "")
    lines = outcome.out.splitlines()
    train = spoiled / "train"
    for expected in (
        "bad, empty: 1",
        f"  {train}/cat/empty.jpg: is empty: it has 0 bytes",
        "bad, not an image: 1",
        "bad, truncated: 1",
        "converted from mode CMYK: 1",
        f"  {train}/dog/print.jpg",
        "one pixel high or wide: 1",
        "ignored: no image extension: 1",
        f"  {train}/dog/movie.gif",
        "in both splits: 1",
        f"  {train}/cat/1.png = {spoiled}/val/cat/copy.png",
        "the same image in two classes: 1",
        f"  {train}/cat/2.png = {train}/dog/cat.png",
        "16 images read, 3 bad",
    ):
        assert expected in lines, expected
    assert "cat        5           2" in lines


def test_json_has_everything(repvgg, spoiled):
    outcome = repvgg("data", "check", f"imagefolder:{spoiled}", "--json")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    assert (found["usable"], found["complete"], found["total"]) == (False, True, 16)
    assert found["parts"]["train"]["classes"] == {"cat": 5, "dog": 7}
    assert found["parts"]["train"]["modes"] == {"RGB": 8, "CMYK": 1}
    assert found["parts"]["held out"]["sizes"] == [[12, 10], [12, 10], [30, 20]]
    assert {bad["kind"] for bad in found["bad"]} == {"empty", "not an image", "truncated"}


def test_a_class_in_one_split_only_is_bad(repvgg, photos):
    picture(photos / "train" / "emu" / "0.png", 60)
    outcome = repvgg("data", "check", f"imagefolder:{photos}")
    assert outcome.code == 1
    assert "bad: Class 'emu' of" in outcome.out
    assert "emu        1           0" in outcome.out


def test_a_limit_spreads_over_the_classes(repvgg, photos):
    outcome = repvgg("data", "check", f"imagefolder:{photos}", "--limit", 2)
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()[1:4]]
    assert rows == [["cat", "1", "1"], ["dog", "1", "1"], ["all", "2", "2"]]


def test_the_other_part_from_elsewhere(repvgg, photos):
    outcome = repvgg("data", "check", f"imagefolder:{photos}/train", "--val", f"imagefolder:{photos}/val")
    assert outcome.code == 0
    assert "all        6           3" in outcome.out
    outcome = repvgg("data", "check", f"imagefolder:{photos}/train")
    assert outcome.code == 0
    assert "note: " in outcome.out


def test_ctrl_c_keeps_what_was_counted(repvgg, photos, monkeypatch):
    from repvgg.data.splits import FileSplit

    whole = FileSplit.image

    def interrupted(split, index):
        if "dog" in split.location(index):
            raise KeyboardInterrupt
        return whole(split, index)

    monkeypatch.setattr(FileSplit, "image", interrupted)
    monkeypatch.setattr("repvgg.data.loaders._CHUNK", 1)
    outcome = repvgg("data", "check", f"imagefolder:{photos}")
    assert outcome.code == 130
    assert "cat        3           0" in outcome.out
    assert "interrupted after 3 of 9 images" in outcome.out


def test_streams(repvgg, tmp_path):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for number in range(4):
            picture(tmp_path / "x.png", number)
            image = (tmp_path / "x.png").read_bytes() if number else b"broken"
            for suffix, data in (("png", image), ("cls", b"%d" % (number % 2))):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    uri = f"webdataset:{tmp_path}/one.tar?classes=2"
    outcome = repvgg("data", "check", uri, "--val", uri)
    assert outcome.code == 1
    assert (
        f"  {tmp_path}/one.tar/0.png: is not an image in one of the formats JPEG, PNG, BMP, WEBP, TIFF, PPM"
        in outcome.out
    )
    assert "8 images read, 2 bad" in outcome.out
    assert "in both splits: 3" in outcome.out


def test_what_cannot_be_opened(refused, tmp_path):
    assert "There is no folder" in refused("data", "check", f"imagefolder:{tmp_path / 'none'}")
    assert "imagefolder:PATH" in refused("data", "check", "photos")
    assert "limit must be at least 1" in refused("data", "check", "fake:10x2", "--limit", 0)


def test_progress_is_told(photos):
    reported = []
    report = check_data(
        DataConfig(f"imagefolder:{photos}"), on_progress=lambda done, total: reported.append((done, total))
    )
    assert reported == [(done, 9) for done in range(1, 10)]
    assert report.usable
    with pytest.raises(UsageError):
        check_data(DataConfig("fake:"), limit=-1)


def test_masks(repvgg, tmp_path):
    for split, seed in (("train", 1), ("val", 2)):
        picture(tmp_path / split / "images" / "a.png", seed)
        picture(tmp_path / split / "images" / "b.png", 10 * seed)
        (tmp_path / split / "labels").mkdir()
        labels = np.array([0, 0, 3, 11], np.uint8).repeat(30).reshape(10, 12)
        Image.fromarray(labels).save(tmp_path / split / "labels" / "a.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    command = ("data", "check", f"masks:{tmp_path}", "--ignore-index", 11)
    outcome = repvgg(*command)
    assert (outcome.code, outcome.err) == (1, "")
    assert outcome.out.splitlines() == [
        "class    train images  train pixels  validation images  validation pixels",
        "sky                 1        50.00%                  1             50.00%",
        "road                0         0.00%                  0              0.00%",
        "car                 0         0.00%                  0              0.00%",
        "tree                1        25.00%                  1             25.00%",
        "ignored             1        25.00%                  1             25.00%",
        "train: 1 images: 1 of 12 x 10 pixels",
        "train: never seen: road, car",
        "validation: 1 images: 1 of 12 x 10 pixels",
        "validation: never seen: road, car",
        "bad, image without mask: 2",
        f"  {tmp_path}/train/images/b.png",
        f"  {tmp_path}/val/images/b.png",
        "2 images read, 2 bad",
    ]
    report = json.loads(repvgg(*command, "--json").out)
    assert (report["task"], report["usable"], report["classes"]) == (
        "segmentation",
        False,
        ["sky", "road", "car", "tree"],
    )
    assert report["parts"]["train"]["ignored_share"] == 0.25
