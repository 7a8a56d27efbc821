"""``repvgg eval``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg._progress import busy
from repvgg.cli._evaluate_masks import MaskOptions, check_classes, evaluate_masks
from repvgg.cli._options import Checkpoint, InputSize, JsonFlag, option
from repvgg.cli._output import write_json, write_line, write_table
from repvgg.errors import UsageError

if TYPE_CHECKING:
    from repvgg.data import ImageData
    from repvgg.models import LoadedModel
    from repvgg.training import Evaluation


_BATCH = "images per batch (default: 64, or 1 with masks)."
_LABEL_BATCH, _MASK_BATCH = 64, 1
_NO_MASK_OPTIONS = MaskOptions()
_SPLIT = "train, val (of a data set with a single split: what training would use) or all (default: val, or else all)."


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, tyro.conf.arg(metavar="URI")],
    split: Annotated[Literal["train", "val", "all"] | None, option(_SPLIT, "{train,val,all}")] = None,
    form: Literal["both", "train", "plain"] = "both",
    batch: Annotated[int | None, option(_BATCH, "IMAGES")] = None,
    input_size: InputSize = None,
    crop_fraction: float = 0.875,
    workers: int = 0,
    allow_commands: bool = False,
    as_json: JsonFlag = False,
    masks: Annotated[MaskOptions, tyro.conf.arg(name="")] = _NO_MASK_OPTIONS,
) -> None:
    """Evaluate a checkpoint on labelled images, or on images with masks.

    Labels: top-1, top-5, and accuracy by class. Masks: IoU by class, mIoU, mean accuracy and pixel accuracy.

    A checkpoint in the train form is also converted, both forms are evaluated, and the equal predictions are counted:
    of images, or of all pixels. A data set with a validation split is evaluated on that; any other, such as a folder of
    class folders, as a whole.

        repvgg eval runs/a0/train.safetensors --data imagefolder:/data/imagenet
        repvgg eval plain.safetensors --data imagefolder:photos/test
        repvgg eval plain.safetensors --data imagefolder:photos --split all
        repvgg eval segment.safetensors --data masks:street --window 321 --flip

    Args:
        checkpoint: the file, of this library or another one.
        data: the data set, such as imagefolder:PATH or torchvision:CIFAR10:PATH.
        split: see above.
        form: which form to evaluate.
        batch: see above.
        input_size: height and width (default: from the checkpoint). Images with masks keep their size.
        crop_fraction: the central crop as a fraction of the short side.
        workers: processes that read images.
        allow_commands: run the shell command of webdataset:pipe:COMMAND.
        as_json: print JSON.
        masks: see there.
    """
    from repvgg.data.config import MASK_SCHEMES

    if data.partition(":")[0] in MASK_SCHEMES:
        _evaluate_masks(checkpoint, data, split, form, _MASK_BATCH if batch is None else batch, workers, as_json, masks)
        return
    if masks != _NO_MASK_OPTIONS:
        given = next(f.name for f in fields(MaskOptions) if getattr(masks, f.name) != f.default).replace("_", "-")
        raise UsageError(f"--{given} is for images with masks, but {data!r} has labels: leave it out.")
    batch = _LABEL_BATCH if batch is None else batch
    _evaluate_labels(checkpoint, data, split, form, batch, input_size, crop_fraction, workers, allow_commands, as_json)


def _evaluate_masks(
    checkpoint: Path,
    data: str,
    split: Literal["train", "val", "all"] | None,
    form: str,
    batch: int,
    workers: int,
    as_json: bool,
    options: MaskOptions,
) -> None:
    from repvgg.data import SegmentationData, open_evaluation_data
    from repvgg.models import load

    loaded = load(checkpoint)
    about = loaded.metadata
    opened = open_evaluation_data(
        about.data_config(uri=data, ignore_index=options.ignore_index, workers=workers),
        split,
    )
    assert isinstance(opened, SegmentationData)
    evaluate_masks(loaded, opened, options, form=form, batch=batch, as_json=as_json)


def _evaluate_labels(
    checkpoint: Path,
    data: str,
    split: Literal["train", "val", "all"] | None,
    form: str,
    batch: int,
    input_size: int | None,
    crop_fraction: float,
    workers: int,
    allow_commands: bool,
    as_json: bool,
) -> None:
    from repvgg.data import open_image_evaluation_data
    from repvgg.models import load
    from repvgg.training.tasks import check_task

    loaded = load(checkpoint)
    about = loaded.metadata
    size = input_size or about.input_size
    opened = open_image_evaluation_data(
        about.data_config(
            uri=data,
            train_size=size,
            test_size=size,
            crop_fraction=crop_fraction,
            workers=workers,
            allow_commands=allow_commands,
        ),
        split,
    )
    check_task(loaded.model, about.model, opened)
    check_classes(loaded, opened)
    results = _evaluate_forms(loaded, opened, form, batch)
    if as_json:
        write_json(
            {
                name: result.to_dict() | _per_class(result, opened) | {"data": opened.notes[0]}
                for name, result in results.items()
            }
        )
    else:
        _print(results, opened)


def _evaluate_forms(loaded: LoadedModel, data: ImageData, form: str, batch: int) -> dict[str, Evaluation]:
    from repvgg.models import collapse_loaded
    from repvgg.training import evaluate as run_evaluation

    have = loaded.metadata.form
    if form == "train" and have == "plain":
        raise UsageError("The checkpoint is in the plain form: it cannot be evaluated in the train form.")
    results = {}
    with busy("Evaluating"):
        if have == "train" and form in ("both", "train"):
            results["train form"] = run_evaluation(loaded.model, data.val_batches(batch), data.prepare)
        if form in ("both", "plain"):
            plain = loaded if have == "plain" else collapse_loaded(loaded)
            results["plain form"] = run_evaluation(plain.model, data.val_batches(batch), data.prepare)
    return results


def _print(results: dict[str, Evaluation], data: ImageData) -> None:
    rows = [["form", "top-1", "top-5", "class mean", "correct", "images"]]
    for name, result in results.items():
        numbers = [f"{100 * value:.2f}" for value in (result.accuracy, result.top(5), result.macro_accuracy)]
        rows.append([name, *numbers, f"{result.correct:,}", f"{len(result.labels):,}"])
    first = next(iter(results.values()))
    what, *notes = data.notes
    write_line(f"{len(first.labels):,} images: {what}")
    for note in notes:
        write_line(f"note: {note}")
    write_line()
    write_table(rows)
    write_line()
    rows = [["class", "images", *results]]
    for index, name in enumerate(data.classes):
        shares = [f"{100 * float(result.per_class[index]):.2f}" for result in results.values()]
        rows.append([name, f"{int(first.confusion[index].sum()):,}", *shares])
    write_table(rows)
    if len(results) == 2:
        one, other = results.values()
        write_line()
        write_line(f"{int((one.predictions == other.predictions).sum()):,} of {len(one.labels):,} predictions agree")


def _per_class(result: Evaluation, data: ImageData) -> dict[str, Any]:
    shares = [None if value != value else value for value in result.per_class.tolist()]
    return {"per_class": dict(zip(data.classes, shares, strict=True))}
