"""Sources of images with masks: ``masks:``, ``cityscapes:``, ``ade20k:`` and ``voc:``.

A mask gives each pixel of its image a label. What the labels mean is a :class:`~repvgg.data.label_sets.LabelSet`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from repvgg.data.config import DataConfig, DataUri, is_mask_uri, parse_uri
from repvgg.data.counter_rng import epoch_order
from repvgg.data.decode import is_image_name
from repvgg.data.label_sets import (
    IGNORE_INDEX,
    LabelSet,
    ade20k_labels,
    cityscapes_labels,
    class_count,
    numbered_labels,
    read_classes,
    uncounted_labels,
    voc_labels,
)
from repvgg.data.mask_files import MaskFiles, MaskSplit, largest_label
from repvgg.data.sources import EvalSplit
from repvgg.data.sources.local import TRAIN_FOLDER, VAL_FOLDERS, walk
from repvgg.errors import DataError, UsageError

_VAL_FRACTION = 0.1
_DEFAULT_CROP, _SCENE_CROP, _STREET_CROP = 321, 473, 713  # pixels; the latter two as in H. Zhao et al.
_LABEL_FOLDERS = ("labels", "masks")
_LOSSY = (".jpg", ".jpeg")


@final
@dataclass(frozen=True)
class MaskSource:
    """The splits of an opened URI and the source's defaults."""

    train: MaskSplit
    val: MaskSplit | None  # None where the URI holds a single split
    size: int  # default height and width of training crops
    notes: tuple[str, ...] = ()  # remarks for the user, a sentence each


def open_mask_source(config: DataConfig, *, strict: bool = True) -> MaskSource:
    """Open the URIs of ``config``; the result has a training and a validation split.

    Where a URI holds a single split and ``config.val`` is None, a tenth of the images becomes the validation split,
    always the same images, and a note says so.

    Args:
        config: the URIs.
        strict: refuse images without masks, unless ``config.on_bad`` is "skip", and empty splits.

    Raises:
        UsageError: a URI is malformed.
        DataError: the dataset does not exist, is of another layout, has no images or an image without a mask, or the
            classes of the splits differ.
    """
    source = _open(parse_uri(config.uri), config)
    notes = source.notes
    if config.val is not None:
        if not is_mask_uri(config.val):
            raise UsageError(f"{config.val!r} holds no masks: give validation images of the same kind as --val.")
        other = _open(parse_uri(config.val), config)
        if source.val is not None:
            notes = (f"The validation split of {config.uri!r} is ignored: {config.val!r} is used.",)
        # A URI that holds a single split is used completely.
        source = replace(source, val=other.train if other.val is None else other.val, notes=notes)
    elif source.val is None:
        source = _with_val_split(source, config.uri)
    source = _same_labels(source, config, strict=strict and config.on_bad == "raise")
    return _checked(source, config) if strict else source


def open_mask_evaluation_source(config: DataConfig, split: EvalSplit | None = None) -> MaskSource:
    """Open the URI of ``config`` to evaluate a model on it: the images are the validation split of the result.

    The arguments, and the choice of the split, are those of :func:`repvgg.data.sources.open_evaluation_source`.

    Raises:
        UsageError, DataError: see :func:`open_mask_source`.
    """
    uri = config.uri
    source = _open(parse_uri(uri), config)
    if source.val is None and split in ("train", "val"):
        source = _with_val_split(source, uri)
    source = _same_labels(source, config, strict=config.on_bad == "raise")
    train, val = source.train, source.val
    if val is None:
        chosen, which = train, "all images"
    elif split == "all":
        chosen, which = train.joined(val), "all training and validation images"
    else:
        chosen, which = (train, "the training images") if split == "train" else (val, "the validation images")
    notes = (f"{which} of {uri}", *_require_masks(chosen, uri, config.on_bad), *source.notes)
    return replace(source, train=chosen.select(()), val=chosen, notes=notes)


def _open(uri: DataUri, config: DataConfig) -> MaskSource:
    ignore = _ignore_index(uri, config)
    match uri.scheme:
        case "masks":
            return _open_folder(uri, IGNORE_INDEX if ignore is None else ignore)
        case "cityscapes":
            return _open_cityscapes(uri)
        case "ade20k":
            return _open_ade20k(uri)
        case _:
            return _open_voc(uri)


def _ignore_index(uri: DataUri, config: DataConfig) -> int | None:
    """Return the ignored label from the URI's option ``ignore`` or the config; None where neither gives it."""
    text = uri.options.get("ignore")
    if text is None:
        value = config.ignore_index
    else:
        if not text.isdecimal() or int(text) > 255:
            raise UsageError(f"Option 'ignore' of {uri.text!r} must be a label in 0 … 255, got {text!r}.")
        value = int(text)
        if config.ignore_index not in (None, value):
            raise UsageError(
                f"{uri.text!r} ignores label {value}, but ignore_index is {config.ignore_index}: drop one."
            )
    official = {"cityscapes": IGNORE_INDEX, "ade20k": 0, "voc": IGNORE_INDEX}.get(uri.scheme)
    if official is not None and value not in (None, official):
        raise UsageError(f"The ignored label of {uri.scheme} is {official}, got {value}: leave ignore_index out.")
    return value


def _root(uri: DataUri, *inside: str) -> Path:
    """Return the folder of a URI, which must hold the folders ``inside``.

    Raises:
        DataError: one of them does not exist.
    """
    root = Path(os.path.expanduser(uri.rest))
    if not uri.rest or not root.is_dir():
        raise DataError(f"There is no folder {str(root) if uri.rest else ''!r}: give one as {uri.scheme}:PATH.")
    for name in inside:
        if not (root / name).is_dir():
            raise DataError(f"{str(root)!r} has no folder {name!r}, so it is not in the layout of {uri.scheme}:PATH.")
    return root


def _listed(folder: Path, notes: list[str]) -> dict[str, str]:
    """Return the image files below a folder: stem relative to it, with its folders → path.

    Raises:
        DataError: the folder cannot be read, or two files have the same stem.
    """
    found: dict[str, str] = {}
    repeated: list[str] = []
    try:
        listing = walk(folder, repeated)
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be read: {error.strerror or error}.") from error
    for below, files in listing:
        for name in filter(is_image_name, files):
            path = os.path.join(below, name)
            stem = os.path.splitext(os.path.relpath(path, folder))[0]
            if stem in found:
                raise DataError(f"{found[stem]!r} and {path!r} have the same name: a mask belongs to one image.")
            found[stem] = path
    if repeated:
        notes.append(f"Not entered, because it leads to a folder that is read already: {repeated[0]!r}.")
    return dict(sorted(found.items()))


def _paired(images: Mapping[str, str], masks: Mapping[str, str], labels: LabelSet) -> MaskSplit:
    """Return the split of the images and masks with equal keys.

    Raises:
        DataError: a mask is a JPEG.
    """
    if lossy := [path for path in masks.values() if path.lower().endswith(_LOSSY)]:
        raise DataError(f"{lossy[0]!r} is a JPEG, which does not keep labels exactly: store masks as PNG.")
    files = [MaskFiles(name, path, masks[name]) for name, path in images.items() if name in masks]
    unmasked = [path for name, path in images.items() if name not in masks]
    return MaskSplit(files, labels, unmasked, [path for name, path in masks.items() if name not in images])


# masks:


def _open_folder(uri: DataUri, ignore_index: int) -> MaskSource:
    """Open ``PATH/SPLIT/images`` and ``PATH/SPLIT/labels``, SPLIT being train and val (or validation, valid, test).

    ``PATH/images`` and ``PATH/labels`` are a single split. An image and its mask have the same name, but for the
    extension. ``PATH/classes.txt`` (of a single split: also beside PATH) names the labels, see
    :func:`~repvgg.data.label_sets.read_classes`; ``?classes=N`` gives their number; without either, the labels are
    those found in the masks.
    """
    uri.check_options("ignore", "classes")
    root = _root(uri)
    notes: list[str] = []
    is_single = not (root / TRAIN_FOLDER).is_dir()
    described = next((path for path in (root, root.parent)[: 1 + is_single] if (path / "classes.txt").is_file()), None)
    if described is not None:
        labels = read_classes(described / "classes.txt", ignore_index)
    elif "classes" in uri.options:
        number = class_count(uri.options["classes"], uri.text)
        labels = numbered_labels(number + (ignore_index < number), ignore_index)
    else:
        labels = uncounted_labels(ignore_index)
    if is_single:
        return MaskSource(_read_folder(root, labels, uri, notes), None, _DEFAULT_CROP, tuple(notes))
    train = _read_folder(root / TRAIN_FOLDER, labels, uri, notes)
    present = [name for name in VAL_FOLDERS if (root / name).is_dir()]
    val = _read_folder(root / present[0], labels, uri, notes) if present else None
    notes += [f"{name}/ is not read: the validation images are those of {present[0]}/." for name in present[1:]]
    return MaskSource(train, val, _DEFAULT_CROP, tuple(notes))


def _read_folder(folder: Path, labels: LabelSet, uri: DataUri, notes: list[str]) -> MaskSplit:
    masks = next((folder / name for name in _LABEL_FOLDERS if (folder / name).is_dir()), None)
    if not (folder / "images").is_dir() or masks is None:
        raise DataError(f"{str(folder)!r} needs the folders 'images' and 'labels', to be opened by {uri.scheme}:PATH.")
    return _paired(_listed(folder / "images", notes), _listed(masks, notes), labels)


# cityscapes:

_PHOTO = "_leftImg8bit"
_KINDS = ("labelIds", "labelTrainIds")  # the first that exists is used; both give the same classes


def _open_cityscapes(uri: DataUri) -> MaskSource:
    """Open ``leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` and ``gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png``.

    ``labelIds`` (0 … 33) and ``labelTrainIds`` (0 … 18 and 255) both give the 19 classes that are evaluated.
    """
    uri.check_options("ignore")
    root = _root(uri, "leftImg8bit", "gtFine")
    notes: list[str] = []
    train, val = (_read_cityscapes(root, split, notes) for split in ("train", "val"))
    return MaskSource(train, val, _STREET_CROP, tuple(notes))


def _read_cityscapes(root: Path, split: str, notes: list[str]) -> MaskSplit:
    photos, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder in (photos, masks):
        if not folder.is_dir():
            raise DataError(f"{str(root)!r} has no folder {str(folder.relative_to(root))!r}: complete the dataset.")
    images = {name.removesuffix(_PHOTO): path for name, path in _listed(photos, notes).items() if name.endswith(_PHOTO)}
    listed = _listed(masks, notes)
    for kind in _KINDS:
        suffix = f"_gtFine_{kind}"
        found = {name.removesuffix(suffix): path for name, path in listed.items() if name.endswith(suffix)}
        if found:
            return _paired(images, found, cityscapes_labels(kind))
    raise DataError(
        f"{str(masks)!r} holds neither *_gtFine_labelIds.png nor *_gtFine_labelTrainIds.png: colour images and "
        f"polygons are no labels."
    )


# ade20k:


def _open_ade20k(uri: DataUri) -> MaskSource:
    """Open ``images/training``, ``images/validation`` and the same folders below ``annotations``.

    The layout of ADEChallengeData2016: label 0 is ignored, and labels 1 … 150 are the classes 0 … 149.
    """
    uri.check_options("ignore")
    root = _root(uri, "images", "annotations")
    notes: list[str] = []
    splits = []
    for split in ("training", "validation"):
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            if not folder.is_dir():
                raise DataError(f"{str(root)!r} has no folder {str(folder.relative_to(root))!r}: complete the dataset.")
        splits.append(_paired(_listed(folders[0], notes), _listed(folders[1], notes), ade20k_labels()))
    return MaskSource(splits[0], splits[1], _SCENE_CROP, tuple(notes))


# voc:


def _open_voc(uri: DataUri) -> MaskSource:
    """Open PASCAL VOC 2012: ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation/{train,val}.txt``.

    PATH is VOCdevkit, or the folder VOC2012 in it. Label 255, the outlines of objects, is ignored.
    """
    uri.check_options("ignore")
    root = _root(uri)
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    images, masks, lists = root / "JPEGImages", root / "SegmentationClass", root / "ImageSets" / "Segmentation"
    for folder in (images, masks, lists):
        if not folder.is_dir():
            name = str(folder.relative_to(root))
            raise DataError(f"{str(root)!r} has no folder {name!r}, so it is not in the layout of voc:PATH.")
    notes: list[str] = []
    found = _listed(images, notes), _listed(masks, notes)
    train, val = (_read_voc(lists / f"{split}.txt", *found) for split in ("train", "val"))
    return MaskSource(train, val, _SCENE_CROP, tuple(notes))


def _read_voc(path: Path, images: Mapping[str, str], masks: Mapping[str, str]) -> MaskSplit:
    """Return the images that a list names; most images of VOC have no mask."""
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if lost := [name for name in names if name not in images]:
        raise DataError(f"{str(path)!r} names {lost[0]!r}, but JPEGImages has no such image: complete the dataset.")
    wanted = dict.fromkeys(names)
    chosen = {name: masks[name] for name in wanted if name in masks}
    return _paired({name: images[name] for name in wanted}, chosen, voc_labels())


# All sources:


def _with_val_split(source: MaskSource, uri: str) -> MaskSource:
    """Split the only split of a source in two."""
    split = source.train
    if len(split) < 2:
        raise DataError(f"{uri!r} has {len(split)} images with masks, which are too few for two splits: add some.")
    # Seed and epoch are fixed: runs with different seeds must be evaluated on the same images.
    order = epoch_order(0, 0, len(split)).tolist()
    number = max(1, round(_VAL_FRACTION * len(split)))
    note = f"{uri!r} holds a single split: {number} of its {len(split)} images, always the same, are for validation."
    train, val = split.select(sorted(order[number:])), split.select(sorted(order[:number]))
    return replace(source, train=train, val=val, notes=(*source.notes, note))


def _same_labels(source: MaskSource, config: DataConfig, *, strict: bool) -> MaskSource:
    """Return a source whose splits have the same classes, counted in the masks where no file names them.

    Masks that cannot be read are not counted, unless ``strict``.

    Raises:
        DataError: the classes differ, or a mask that has to be counted cannot be read or holds label 255, which is not
            ignored.
    """
    splits = [source.train] if source.val is None else [source.train, source.val]
    named = [split.labels for split in splits if split.labels.names]
    if len({labels.names for labels in named}) > 1:
        raise DataError(f"The classes of {config.uri!r} and {config.val!r} differ: use the same classes.txt for both.")
    if len(named) == len(splits):
        return source
    notes = source.notes
    if named:
        labels = named[0]
    else:
        number = 1 + max(largest_label(split, config.workers, strict=strict) for split in splits)
        if number > IGNORE_INDEX:
            raise DataError(
                f"The masks of {config.uri!r} hold label {IGNORE_INDEX}, which marks unlabelled pixels nearly "
                f"everywhere, but {splits[0].labels.ignore_index} is ignored: ignore {IGNORE_INDEX}, or name the "
                f"classes in classes.txt."
            )
        labels = numbered_labels(number, splits[0].labels.ignore_index)
        notes += (
            f"{config.uri!r} has no classes.txt: the masks hold labels up to {number - 1}, which gives {len(labels)} "
            f"classes.",
        )
    train, *val = [split if split.labels.names else split.with_labels(labels) for split in splits]
    return replace(source, train=train, val=val[0] if val else None, notes=notes)


def _checked(source: MaskSource, config: DataConfig) -> MaskSource:
    assert source.val is not None
    notes = source.notes
    for split, uri in ((source.train, config.uri), (source.val, config.val or config.uri)):
        notes += _require_masks(split, uri, config.on_bad)
    # The parts of a single split both carry its images without masks.
    return replace(source, notes=tuple(dict.fromkeys(notes)))


def _require_masks(split: MaskSplit, uri: str, on_bad: str) -> tuple[str, ...]:
    """Return notes on images without masks and masks without images.

    Raises:
        DataError: there are no images with masks, or images without masks and ``on_bad`` is not "skip".
    """
    if not len(split):
        what = f"none of {len(split.unmasked)} images has a mask" if split.unmasked else "it has no images"
        raise DataError(f"{uri!r} cannot be used, as {what}: an image and its mask have the same name.")
    if split.unmasked and on_bad != "skip":
        raise DataError(
            f"{_some(split.unmasked)} of {uri!r} has no mask: add the mask, remove the image, or set on_bad='skip'."
        )
    notes = []
    if split.unmasked:
        notes.append(f"Left out, because it has no mask: {_some(split.unmasked)}.")
    if split.unused:
        notes.append(f"Not used, because it is a mask without an image: {_some(split.unused)}.")
    return tuple(notes)


def _some(paths: Sequence[str]) -> str:
    return repr(paths[0]) + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else "")
