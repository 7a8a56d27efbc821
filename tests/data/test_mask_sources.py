import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from repvgg.data import DataConfig, check_masks, open_data, open_evaluation_data
from repvgg.data.label_sets import ade20k_labels, cityscapes_labels, distinct_colours, voc_labels
from repvgg.errors import DataError, UsageError
from tests.data.helpers import noise, truncate, write_masks


def save(path, labels, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(labels, np.uint8))
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def save_photo(path, seed=0, size=(4, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, size).save(path)


def delivered(uri, **options):
    """Return the validation masks of a URI."""
    return [masks[0].tolist() for _, masks in open_evaluation_data(DataConfig(uri, **options)).val_batches(1)]


def write_one(root, labels, split="val", mode="L"):
    """Write ``split`` with one photo of 4 x 2 pixels and its mask."""
    save_photo(root / split / "images" / "a.jpg")
    save(root / split / "labels" / "a.png", labels, mode)


TWO_ROWS = [[0, 1, 2, 3], [3, 255, 0, 0]]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        write_one(tmp_path, TWO_ROWS, split)
    return tmp_path


# masks:


@pytest.mark.parametrize("mode", ["L", "P"])
def test_index_and_palette_masks(tmp_path, mode):
    for split in ("train", "val"):
        write_one(tmp_path, TWO_ROWS, split, mode)
    data = open_data(DataConfig(f"masks:{tmp_path}"))
    assert data.classes == ("class 0", "class 1", "class 2", "class 3")
    assert "has no classes.txt: the masks hold labels up to 3, which gives 4 classes" in data.notes[0]
    assert delivered(f"masks:{tmp_path}") == [TWO_ROWS]


def test_classes_file_names_labels(folder):
    (folder / "classes.txt").write_text("# streets\nsky\ntraffic light\n\ncar\nroad\n")
    data = open_data(DataConfig(f"masks:{folder}"))
    assert data.classes == ("sky", "traffic light", "car", "road")
    assert_close(data.palette, torch.from_numpy(distinct_colours(4)))
    assert open_evaluation_data(DataConfig(f"masks:{folder}/val")).classes == data.classes


@pytest.mark.parametrize("given", ["?ignore=3&classes=3", "option"])
def test_ignored_label_at_the_end(tmp_path, given):
    for split in ("train", "val"):
        write_one(tmp_path, [[0, 1, 2, 3]], split)
    uri, options = (
        (f"masks:{tmp_path}?classes=3", {"ignore_index": 3}) if given == "option" else (f"masks:{tmp_path}{given}", {})
    )
    for split in ("train", "val"):
        save_photo(tmp_path / split / "images" / "a.jpg", size=(4, 1))
    assert delivered(uri, **options) == [[[0, 1, 2, 255]]]
    assert open_data(DataConfig(uri, **options)).classes == ("class 0", "class 1", "class 2")


def test_ignored_label_between_others_moves_them_down(folder):
    (folder / "classes.txt").write_text("sky 1 1 1\nvoid 0 0 0\ncar 2 2 2\nroad 3 3 3\n")
    for split in ("train", "val"):
        write_one(folder, [[0, 1, 2, 3], [3, 1, 0, 0]], split)
    data = open_data(DataConfig(f"masks:{folder}", ignore_index=1))
    assert data.classes == ("sky", "car", "road")
    assert data.palette.tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert delivered(f"masks:{folder}", ignore_index=1) == [[[0, 255, 1, 2], [2, 255, 0, 0]]]


def test_colour_masks_need_colours_in_the_classes_file(folder):
    colours = np.array([[10, 20, 30], [128, 64, 128], [0, 0, 0]], np.uint8)
    for split in ("train", "val"):
        save(folder / split / "labels" / "a.png", colours[[[0, 1, 2, 0], [1, 1, 0, 2]]])
    (folder / "classes.txt").write_text("sky\nroad\nvoid\n")
    with pytest.raises(DataError, match=r"a.png' has colours \(mode RGB\) in place of labels: convert it to a PNG of"):
        delivered(f"masks:{folder}")
    (folder / "classes.txt").write_text("sky 10 20 30\nroad, 128, 64, 128\nvoid 0 0 0\n")
    assert delivered(f"masks:{folder}?ignore=2") == [[[0, 1, 255, 0], [1, 1, 0, 255]]]
    (folder / "classes.txt").write_text("sky 10 20 30\nroad 128 64 127\nvoid 0 0 0\n")
    with pytest.raises(
        DataError, match=re.escape("has the colour (128, 64, 128) in 3 pixels, which classes.txt does not")
    ):
        delivered(f"masks:{folder}")


def test_labels_out_of_range_are_refused(folder):
    with pytest.raises(DataError, match=r"holds label 3 in 2 pixels.*0 … 2, and 255 is ignored:.*set ignore_index"):
        delivered(f"masks:{folder}?classes=3")
    with pytest.raises(DataError, match=r"holds label 255 in 1 pixels.*0 … 2, and 3 is ignored"):
        delivered(f"masks:{folder}?classes=3&ignore=3")


def test_label_255_that_is_not_ignored_makes_no_classes(folder):
    """Without a number of classes, one unlabelled pixel would make 255 of them."""
    message = r"hold label 255, which marks unlabelled pixels .*, but 3 is ignored: ignore 255, or name the classes"
    with pytest.raises(DataError, match=message):
        open_data(DataConfig(f"masks:{folder}?ignore=3"))
    with pytest.raises(DataError, match=message):
        open_evaluation_data(DataConfig(f"masks:{folder}?ignore=3"))
    assert len(open_data(DataConfig(f"masks:{folder}")).classes) == 4


def test_files_that_do_not_fit_together(folder):
    save_photo(folder / "train" / "images" / "b.jpg")
    with pytest.raises(
        DataError, match=r"b.jpg' of .* has no mask: add the mask, remove the image, or set on_bad='skip'"
    ):
        open_data(DataConfig(f"masks:{folder}"))
    notes = open_data(DataConfig(f"masks:{folder}", on_bad="skip")).notes
    assert any("Left out, because it has no mask" in note for note in notes)
    save(folder / "train" / "labels" / "b.png", [[0, 1, 2]])
    with pytest.raises(DataError, match=r"b.png' has 3x1 pixels, but its image .*b.jpg' has 4x2"):
        open_data(DataConfig(f"masks:{folder}"))
    save_photo(folder / "train" / "images" / "b.png")
    with pytest.raises(DataError, match="have the same name: a mask belongs to one image"):
        open_data(DataConfig(f"masks:{folder}"))


def test_single_split_says_once_what_is_left_out(tmp_path):
    write_masks(tmp_path, 4)
    (tmp_path / "labels" / "003.png").rename(tmp_path / "labels" / "004.png")
    notes = open_data(DataConfig(f"masks:{tmp_path}?classes=4", on_bad="skip", train_size=8)).notes
    assert [note.split(":")[0] for note in notes[1:]] == [
        "Left out, because it has no mask",
        "Not used, because it is a mask without an image",
    ]


def test_jpeg_masks_are_refused(folder):
    noise(1, (4, 2)).save(folder / "train" / "labels" / "a.jpg")
    (folder / "train" / "labels" / "a.png").unlink()
    with pytest.raises(DataError, match="is a JPEG, which does not keep labels exactly: store masks as PNG"):
        open_data(DataConfig(f"masks:{folder}"))


def test_masks_in_16_bits(folder):
    Image.fromarray(np.array(TWO_ROWS, np.uint16)).save(folder / "val" / "labels" / "a.png")
    assert delivered(f"masks:{folder}") == [TWO_ROWS]
    Image.fromarray(np.array([[0, 1, 2, 300]] * 2, np.uint16)).save(folder / "val" / "labels" / "a.png")
    with pytest.raises(DataError, match="holds label 300, but labels go up to 255"):
        delivered(f"masks:{folder}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\n", "Masks need 2 … 255 classes, got 1"),
        ("sky\nroad\nsky\n", "has the class 'sky' twice"),
        ("sky 1 2 3\nroad\n", "has colours on some lines only"),
        ("sky 1 2 3\nroad 1 2 3\n", "has a colour twice"),
        ("".join(f"{index}\n" for index in range(257)), "has 257 names, but masks have at most 256 labels"),
    ],
)
def test_classes_files_that_are_refused(folder, text, message):
    (folder / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(DataConfig(f"masks:{folder}"))


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("masks:", DataError, "There is no folder ''"),
        ("masks:{}/train/images", DataError, "needs the folders 'images' and 'labels'"),
        ("masks:{}?ignore=x", UsageError, "Option 'ignore' of .* must be a label in 0 … 255, got 'x'"),
        ("masks:{}?classes=1", UsageError, "Option 'classes' of .* must be a number in 2 … 255, got '1'"),
        ("masks:{}?labels=1", UsageError, "has an unknown option 'labels'"),
        ("cityscapes:{}", DataError, "has no folder 'leftImg8bit'"),
        ("ade20k:{}", DataError, "has no folder 'images'"),
        ("voc:{}", DataError, "has no folder 'JPEGImages'"),
    ],
)
def test_uris_that_are_refused(folder, uri, error, message):
    with pytest.raises(error, match=message):
        open_data(DataConfig(uri.format(folder)))


def test_ignored_label_is_given_once(folder):
    with pytest.raises(UsageError, match="ignores label 3, but ignore_index is 4: drop one"):
        open_data(DataConfig(f"masks:{folder}?ignore=3", ignore_index=4))
    with pytest.raises(UsageError, match="The ignored label of ade20k is 0, got 255"):
        open_data(DataConfig(f"ade20k:{folder}", ignore_index=255))
    with pytest.raises(UsageError, match="ignore_index must be a label in 0 … 255, got 256"):
        DataConfig(ignore_index=256)


def test_validation_split_of_another_uri(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_photo(other / "images" / "z.jpg")
    save(other / "labels" / "z.png", [[0, 1, 1, 0]] * 2)
    data = open_data(DataConfig(f"masks:{folder}", val=f"masks:{other}"))
    assert (data.num_train, data.val_names, len(data.classes)) == (1, ("z",), 4)
    (other / "classes.txt").write_text("a\nb\nc\nd\n")
    (folder / "classes.txt").write_text("a\nb\nc\ne\n")
    with pytest.raises(DataError, match=r"differ: use the same classes.txt for both"):
        open_data(DataConfig(f"masks:{folder}", val=f"masks:{other}"))
    with pytest.raises(UsageError, match="'fake:8x2' holds no masks"):
        open_data(DataConfig(f"masks:{folder}", val="fake:8x2"))


# cityscapes:


def write_cityscapes(root, kind, labels):
    for split in ("train", "val"):
        save_photo(root / "leftImg8bit" / split / "bern" / "bern_000001_000019_leftImg8bit.png")
        save(root / "gtFine" / split / "bern" / f"bern_000001_000019_gtFine_{kind}.png", labels)
        save_photo(root / "gtFine" / split / "bern" / "bern_000001_000019_gtFine_color.png")


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    write_cityscapes(tmp_path, "labelIds", [[7, 8, 11, 33], [0, 6, 255, 29]])
    assert delivered(f"cityscapes:{tmp_path}") == [[[0, 1, 2, 18], [255] * 4]]
    data = open_data(DataConfig(f"cityscapes:{tmp_path}"))
    assert (len(data.classes), data.classes[13], data.palette[0].tolist()) == (19, "car", [128, 64, 128])
    assert data.val_names == ("bern/bern_000001_000019",)
    assert data.input_shape == (3, 713, 713)


def test_cityscapes_train_ids_and_other_files(tmp_path):
    write_cityscapes(tmp_path / "good", "labelTrainIds", [[0, 1, 2, 18], [255] * 4])
    assert delivered(f"cityscapes:{tmp_path / 'good'}") == [[[0, 1, 2, 18], [255] * 4]]
    write_cityscapes(tmp_path / "bad", "labelTrainIds", [[0, 1, 2, 19], [255] * 4])
    with pytest.raises(DataError, match="holds label 19 in 1 pixels, but the labels of the 19 classes are 0 … 18"):
        delivered(f"cityscapes:{tmp_path / 'bad'}")
    write_cityscapes(tmp_path / "instances", "instanceIds", [[0] * 4] * 2)
    with pytest.raises(DataError, match=r"holds neither \*_gtFine_labelIds.png nor \*_gtFine_labelTrainIds.png"):
        delivered(f"cityscapes:{tmp_path / 'instances'}")


def test_cityscapes_classes_in_the_order_of_their_ids():
    labels = cityscapes_labels("labelIds")
    ids = [label for label in range(256) if 0 <= labels.classes[label] < 255]
    assert [labels.classes[label] for label in ids] == list(range(19))
    assert dict(zip(labels.names, ids, strict=True)) | {
        "road": 7,
        "pole": 17,
        "rider": 25,
        "bus": 28,
        "train": 31,
    } == dict(zip(labels.names, ids, strict=True))


# ade20k: and voc:


def test_ade20k_ignores_0_and_shifts(tmp_path):
    for split in ("training", "validation"):
        save_photo(tmp_path / "images" / split / "ADE_1.jpg")
        save(tmp_path / "annotations" / split / "ADE_1.png", [[0, 1, 2, 150]] * 2)
    assert delivered(f"ade20k:{tmp_path}") == [[[255, 0, 1, 149]] * 2]
    data = open_data(DataConfig(f"ade20k:{tmp_path}"))
    assert (data.classes[0], data.classes[149], data.input_shape) == ("wall", "flag", (3, 473, 473))
    save(tmp_path / "annotations" / "validation" / "ADE_1.png", [[0, 1, 2, 151]] * 2)
    with pytest.raises(DataError, match=r"holds label 151 in 2 pixels.*1 … 150, and 0 is ignored"):
        delivered(f"ade20k:{tmp_path}")


@pytest.mark.parametrize("inside", ["", "VOC2012"])
def test_voc_reads_its_lists(tmp_path, inside):
    root = tmp_path / inside
    for seed, name in enumerate(("2007_1", "2007_2", "2007_3")):
        save_photo(root / "JPEGImages" / f"{name}.jpg", seed)
    for name in ("2007_1", "2007_2"):
        save(root / "SegmentationClass" / f"{name}.png", [[0, 20, 255, 15]] * 2, "P")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    (lists / "val.txt").write_text("2007_2\n")
    assert delivered(f"voc:{tmp_path}") == [[[0, 20, 255, 15]] * 2]
    data = open_data(DataConfig(f"voc:{tmp_path}"))
    assert (data.num_train, data.val_names, data.classes[15]) == (1, ("2007_2",), "person")
    assert data.palette[[1, 15, 20]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128]]
    (lists / "val.txt").write_text("2007_2\n2007_9\n")
    with pytest.raises(DataError, match="names '2007_9', but JPEGImages has no such image"):
        open_data(DataConfig(f"voc:{tmp_path}"))


def test_palettes_have_a_colour_for_each_class():
    for labels, number in ((cityscapes_labels("labelIds"), 19), (ade20k_labels(), 150), (voc_labels(), 21)):
        assert labels.palette.shape == (number, 3)
        assert len(set(labels.names)) == number
    assert len({tuple(colour) for colour in distinct_colours(255).tolist()}) == 255


# The check:


@pytest.mark.parametrize("workers", [0, 1])
def test_check_lists_what_is_wrong(tmp_path, workers):
    masks = write_masks(tmp_path / "train", 6)
    write_masks(tmp_path / "val", 3, seed=1)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\nhorse\n")
    labels = tmp_path / "train" / "labels"
    truncate(labels / "000.png")
    save(labels / "001.png", [[0]])
    masks[2, 0, 0], masks[3, :5] = 9, 255
    save(labels / "002.png", masks[2])
    save(labels / "003.png", masks[3])
    (labels / "004.png").rename(labels / "004b.png")
    (tmp_path / "val" / "images" / "001.png").write_bytes((tmp_path / "train" / "images" / "005.png").read_bytes())
    report = check_masks(DataConfig(f"masks:{tmp_path}", workers=workers))
    assert not report.usable
    assert Counter(bad.kind for bad in report.corrupt) == {"truncated": 1, "mask": 2}
    assert report.corrupt[2].reason.startswith("holds label 9 in 1 pixels")
    assert report.unmasked == [str(tmp_path / "train" / "images" / "004.png")]
    assert report.unused == [str(labels / "004b.png")]
    assert report.duplicates == [
        (str(tmp_path / "train" / "images" / "005.png"), str(tmp_path / "val" / "images" / "001.png"))
    ]
    train, val = report.splits
    assert (train.images, val.images, report.total) == (5, 3, 8)
    expected = np.bincount(np.concatenate([masks[3].ravel(), masks[5].ravel()]), minlength=256)
    assert (train.pixels == expected).all()
    assert train.ignored == 5 * 24 / (2 * 480)
    assert report.never_seen(val) == ["horse"]
    as_json = report.to_dict()
    assert as_json["parts"]["train"]["pixels"]["sky"] == int(expected[0])
    assert as_json["parts"]["train"]["images_with_class"]["horse"] == 0
    assert as_json["parts"]["validation"]["never_seen"] == ["horse"]
    assert as_json["parts"]["train"]["sizes"] == [[24, 20, 2]]


def test_check_of_good_masks(folder):
    report = check_masks(DataConfig(f"masks:{folder}"), limit=1)
    assert report.usable
    assert report.duplicates == [(str(folder / "train" / "images" / "a.jpg"), str(folder / "val" / "images" / "a.jpg"))]
