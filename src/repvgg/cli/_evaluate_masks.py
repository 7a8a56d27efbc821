"""What ``repvgg eval`` does with images that have masks."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from repvgg._files import check_output
from repvgg._progress import progress_bar
from repvgg.cli._mask_options import InferenceOptions
from repvgg.cli._options import Number, OptionalFile
from repvgg.cli._output import write_json, write_line, write_table
from repvgg.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from repvgg.data import SegmentationData
    from repvgg.models import LoadedModel
    from repvgg.training import MaskAgreement, SegmentationEvaluation
    from repvgg.training.samples import Sample

    Results = dict[str, SegmentationEvaluation]


@dataclass(frozen=True)
class MaskOptions(InferenceOptions):
    """Options of ``repvgg eval`` for images with masks.

    Attributes:
        absent: masks: how means count a class that is in neither truth nor prediction: not at all, or as IoU 0.
        ignore_index: masks: stored label that is not counted (default: that of the data set).
        report: masks: write a page with images, masks, errors and the confusion matrix to this .html file.
        overwrite: replace the file given as --report.
    """

    absent: Literal["ignore", "zero"] = "ignore"
    ignore_index: Number = None
    report: OptionalFile = None
    overwrite: bool = False


def evaluate_masks(
    loaded: LoadedModel, data: SegmentationData, options: MaskOptions, *, form: str, batch: int, as_json: bool
) -> None:
    """Evaluate a segmentation network in both forms, and print IoU per class or write JSON and a page.

    Args:
        loaded: the network.
        data: its validation images are used.
        options: see there.
        form: "both", "train" or "plain".
        batch: images at a time, those that have one size.
        as_json: print JSON.

    Raises:
        UsageError: the network is a classifier, or has other classes.
    """
    from repvgg.training.tasks import check_task

    check_task(loaded.model, loaded.metadata.model, data)
    check_classes(loaded, data)
    inference = options.inference
    if options.report is not None:
        if options.report.suffix not in (".html", ".htm"):
            raise UsageError(f"The report is a page: end {str(options.report)!r} in .html.")
        check_output(options.report, overwrite=options.overwrite)
    results, agreement, samples = _evaluate(loaded, data, options, form, batch)
    if as_json:
        found: dict[str, Any] = {name: result.to_dict() for name, result in results.items()}
        per_class = {name: dict(zip(data.classes, one["iou"], strict=True)) for name, one in found.items()}
        write_json(
            {name: one | {"iou_by_class": per_class[name], "data": data.notes[0]} for name, one in found.items()}
            | {"inference": str(inference)}
            | _agreement_numbers(agreement)
        )
    else:
        _print(results, agreement, data, options)
    if options.report is not None:
        _write_page(options.report, loaded, data, results, agreement, samples, options)
        if not as_json:
            write_line(f"wrote {options.report}")


def check_classes(loaded: LoadedModel, data: Any) -> None:
    """Check that a model has the classes of the data, in their order.

    Raises:
        UsageError: it has not.
    """
    ours, theirs = loaded.metadata.classes, tuple(data.classes)
    if loaded.model.num_classes != len(theirs):
        raise UsageError(f"The model has {loaded.model.num_classes} classes, but {data.uri} has {len(theirs)}.")
    if ours and ours != theirs:
        first = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        raise UsageError(
            f"The classes differ: number {first} is {ours[first]!r} in the model and {theirs[first]!r} in the data."
        )


def _evaluate(
    loaded: LoadedModel, data: SegmentationData, options: MaskOptions, form: str, batch: int
) -> tuple[Results, MaskAgreement | None, list[Sample]]:
    from repvgg.models import collapse_loaded
    from repvgg.training.samples import SampleCollector
    from repvgg.training.segmentation_evaluation import compare_segmentations

    have = loaded.metadata.form
    if form == "train" and have == "plain":
        raise UsageError("The checkpoint is in the plain form: it cannot be evaluated in the train form.")
    forms = {}
    if have == "train" and form in ("both", "train"):
        forms["train form"] = loaded.model
    if form in ("both", "plain"):
        forms["plain form"] = (loaded if have == "plain" else collapse_loaded(loaded)).model
    collector = SampleCollector(data.num_val, data.to_pixels)
    found, agreement = compare_segmentations(
        list(forms.values()),
        _with_progress(data, batch),
        data.prepare,
        num_classes=len(data.classes),
        ignore_index=data.ignore_index,
        inference=options.inference,
        absent=options.absent,
        on_batch=collector.add,
    )
    return dict(zip(forms, found, strict=True)), agreement if len(forms) > 1 else None, collector.samples


def _agreement_numbers(agreement: MaskAgreement | None) -> dict[str, int | None]:
    if agreement is None:
        return {}
    return {
        "same_pixels": agreement.same,
        "all_pixels": agreement.pixels,
        "different_in_float64": agreement.different_in_float64,
    }


def _with_progress(data: SegmentationData, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    with progress_bar("images") as on_progress:
        for images, masks in data.val_batches(batch):
            yield images, masks
            done += len(images)
            on_progress(done, data.num_val)


def _print(results: Results, agreement: MaskAgreement | None, data: SegmentationData, options: MaskOptions) -> None:
    first = next(iter(results.values()))
    what, *notes = data.notes
    write_line(f"{first.images:,} images: {what}; {options.inference}")
    for note in notes:
        write_line(f"note: {note}")
    write_line()
    rows = [["form", "mIoU", "mean accuracy", "pixel accuracy", "correct", "pixels"]]
    for name, result in results.items():
        numbers = [_percent(value) for value in (result.miou, result.mean_accuracy, result.pixel_accuracy)]
        rows.append([name, *numbers, f"{result.correct:,}", f"{result.pixels:,}"])
    write_table(rows)
    write_line()
    titles = ["IoU", "accuracy"] if len(results) == 1 else [f"IoU, {name}" for name in results]
    rows = [["class", "pixels", *titles]]
    for index, class_name in enumerate(data.classes):
        values = [float(result.iou[index]) for result in results.values()]
        if len(results) == 1:
            values.append(float(first.per_class[index]))
        rows.append([class_name, f"{int(first.confusion[index].sum()):,}", *map(_percent, values)])
    write_table(rows)
    write_line()
    write_line(f"absent classes: {first.rule}")
    if agreement is not None:
        write_line(f"train form and plain form: {agreement}")
    if data.corrupt.count:
        write_line(
            f"skipped {data.corrupt.count} corrupt images, the first of them {': '.join(data.corrupt.first(1)[0])}"
        )


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if value == value else "–"


def _write_page(
    path: Path,
    loaded: LoadedModel,
    data: SegmentationData,
    results: Results,
    agreement: MaskAgreement | None,
    samples: list[Sample],
    options: MaskOptions,
) -> None:
    from repvgg.studies.report.segmentation_page import SegmentationPage
    from repvgg.training.tasks import palette_of

    about = loaded.metadata
    SegmentationPage(
        name=about.model,
        headline=f"Evaluated on {data.notes[0]}.",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["repvgg", *sys.argv[1:]]),
        classes=data.classes,
        palette=palette_of(data),
        forms={name: result.to_dict() for name, result in results.items()},
        ignore_index=data.ignore_index,
        inference=str(options.inference),
        agreement=None if agreement is None else (agreement.same, agreement.pixels),
        samples=samples,
        skipped=data.corrupt.count,
        facts={
            "form of the file": about.form,
            "classes": about.num_classes,
            "trained at": f"{about.input_size} pixels",
        },
    ).write(path, overwrite=options.overwrite)
