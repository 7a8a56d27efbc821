"""``repvgg eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg._progress import busy
from repvgg.cli._options import BatchSize, Checkpoint, InputSize, JsonFlag, option
from repvgg.cli._output import write_json, write_line, write_table
from repvgg.errors import UsageError

if TYPE_CHECKING:
    from repvgg.data import ImageData
    from repvgg.models import LoadedModel
    from repvgg.training import Evaluation


_SPLIT = "train, val (of a data set with a single split: what training would use) or all (default: val, or else all)."


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str, tyro.conf.arg(metavar="URI")],
    split: Annotated[Literal["train", "val", "all"] | None, option(_SPLIT, "{train,val,all}")] = None,
    form: Literal["both", "train", "plain"] = "both",
    batch: BatchSize = 64,
    input_size: InputSize = None,
    crop_fraction: float = 0.875,
    workers: int = 0,
    allow_commands: bool = False,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a checkpoint on labelled images: top-1, top-5, and accuracy by class.

    A checkpoint in the train form is also converted, and both forms are evaluated. A data set with a validation split
    is evaluated on that; any other, such as a folder of class folders, as a whole.

        repvgg eval runs/a0/train.safetensors --data imagefolder:/data/imagenet
        repvgg eval plain.safetensors --data imagefolder:photos/test
        repvgg eval plain.safetensors --data imagefolder:photos --split all

    Args:
        checkpoint: the file, of this library or another one.
        data: the data set, such as imagefolder:PATH or torchvision:CIFAR10:PATH.
        split: see above.
        form: which form to evaluate.
        batch: images per batch.
        input_size: height and width (default: from the checkpoint).
        crop_fraction: the central crop as a fraction of the short side.
        workers: processes that read images.
        allow_commands: run the shell command of webdataset:pipe:COMMAND.
        as_json: print JSON.
    """
    from repvgg.data import DataConfig, open_image_evaluation_data
    from repvgg.models import load

    loaded = load(checkpoint)
    about = loaded.metadata
    size = input_size or about.input_size
    opened = open_image_evaluation_data(
        DataConfig(
            uri=data,
            train_size=size,
            test_size=size,
            crop_fraction=crop_fraction,
            channels=1 if about.in_channels == 1 else 3,
            mean=about.mean or None,
            std=about.std or None,
            workers=workers,
            allow_commands=allow_commands,
        ),
        split,
    )
    _check_classes(loaded, opened)
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


def _check_classes(loaded: LoadedModel, data: ImageData) -> None:
    ours, theirs = loaded.metadata.classes, data.classes
    if loaded.model.num_classes != len(theirs):
        raise UsageError(f"The model has {loaded.model.num_classes} classes, but {data.uri} has {len(theirs)}.")
    if ours and ours != theirs:
        first = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        raise UsageError(
            f"The classes differ: number {first} is {ours[first]!r} in the model and {theirs[first]!r} in the data."
        )


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
